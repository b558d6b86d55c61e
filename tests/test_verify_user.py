"""A user's own verifier: signatures, what it may return, what goes wrong in it, and how the user is told."""

from pathlib import Path
from typing import Any

import pytest

from cipo_fast.config import SandboxConfig, VerifyConfig
from cipo_fast.errors import UserError
from cipo_fast.verify import Judgement, VerifierFailure, judging, user
from cipo_fast.verify.workers.pool import Judges

ROW = {"prompt": "1 + 1?", "answer": "2", "level": 3}
CONVERSATION = {"prompt": [{"role": "user", "content": "1 + 1?"}], "answer": "2", "level": 3}
TRUE = """
def verify(response, row):
    return response == row["answer"]
"""


def named(folder: Path, code: str, name: str = "verify") -> str:
    path = folder / "own.py"
    path.write_text(code)
    for cached in (user.load, user._module, user._written_signature):
        cached.cache_clear()
    return f"{path}:{name}"


def judged(folder: Path, code: str, response: str = "2", row: dict[str, Any] = ROW) -> Judgement:
    verifier = named(folder, code)
    assert judging.check_row({**row, "verifier": verifier}) is None
    return judging.judge({**row, "verifier": verifier}, response)


def failure(folder: Path, code: str, response: str = "2") -> str:
    with pytest.raises(VerifierFailure) as caught:
        judged(folder, code, response)
    return str(caught.value)


@pytest.mark.parametrize(
    "code",
    [
        TRUE,
        "def verify(text, problem, tolerance=0): return int(text == problem['answer'])",
        "def verify(*both): return float(both[0] == both[1]['answer'])",
        "def verify(response, /, row): import numpy; return numpy.bool_(response == row['answer'])",
        "async def verify(response, row): return response == row['answer']",
        "verify = lambda response, row: response == row['answer']",
        "class Checker:\n    def __call__(self, response, row): return response == row['answer']\nverify = Checker()",
        "import functools\ndef keep(f): return functools.wraps(f)(lambda *a: f(*a))\n@keep\n" + TRUE.strip(),
        "if True:\n    def verify(response, row): return response == row['answer']",
        "def verify(prompts, completions, **columns): return [float(completions[0] == columns['answer'][0])]",
        "def verify(completions, answer, **_): return [1.0 if c == a else 0.0 for c, a in zip(completions, answer)]",
        "def verify(completions, answer): return [completions == answer]",
        "def verify(completions, answer, log_extra, log_metric, trainer_state=None, **_):\n"
        "    log_extra('x', answer); log_metric('y', 1.0)\n    return [int(completions == answer)]",
        "import numpy\ndef verify(completions, answer, **_): return numpy.array([completions == answer], dtype=float)",
        "async def verify(completions, answer, **_): return [float(completions == answer)]",
    ],
)
def test_signatures_that_are_called(tmp_path: Path, code: str) -> None:
    assert judged(tmp_path, code, "2").verdict == "right"
    assert judged(tmp_path, code, "3").verdict == "wrong"


def test_the_whole_row_is_given(tmp_path: Path) -> None:
    code = "def verify(response, row): return row['level'] == 3 and row['prompt'] == '1 + 1?' and 'verifier' in row"
    assert judged(tmp_path, code).verdict == "right"


def test_trl_gets_conversations_where_the_prompt_is_one(tmp_path: Path) -> None:
    """As in TRL's own format rewards: completion[0]["content"]; a prompt that is a text makes texts."""
    code = "def verify(prompts, completions, level, **_):\n    print(prompts)\n    return [%s]"
    messages = "completions == [[{'role': 'assistant', 'content': '2'}]] and prompts[0][0]['role'] == 'user'"
    assert judged(tmp_path, code % messages, row=CONVERSATION).verdict == "right"
    assert judged(tmp_path, code % "completions == ['2'] and prompts == ['1 + 1?'] and level == [3]").verdict == "right"
    unseen = "def verify(completions, **columns): return ['prompt' not in columns and 'completion' not in columns]"
    assert judged(tmp_path, unseen).verdict == "right"


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ("0.5", "0.5 (float)"),
        ("None", "None (NoneType)"),
        ("'yes'", "'yes' (str)"),
        ("[1.0]", "[1.0] (list)"),
        ("float('nan')", "nan (float)"),
        ("2", "2 (int)"),
        ("-1.0", "-1.0 (float)"),
        ("type('Odd', (), {'__repr__': lambda self: 1 / 0, '__eq__': lambda *_: True})()", "Odd"),
    ],
)
def test_rewards_are_0_or_1(tmp_path: Path, returned: str, said: str) -> None:
    text = failure(tmp_path, f"def verify(response, row): return {returned}")
    assert text.startswith(f"{tmp_path / 'own.py'}:verify returned ")
    assert said in text
    assert text.endswith("rewards are 0 or 1, return True or False")


@pytest.mark.parametrize("returned", ["1.0", "[]", "[1.0, 1.0]", "[None]", "[0.3]", "'1'"])
def test_trl_rewards_are_a_list_of_one(tmp_path: Path, returned: str) -> None:
    assert "returned" in failure(tmp_path, f"def verify(completions, **_): return {returned}")


def test_an_exception_names_its_line(tmp_path: Path) -> None:
    code = "def helper(x):\n    return {}[x]\n\ndef verify(response, row):\n    return helper(response)\n"
    verifier = f"{tmp_path / 'own.py'}:verify"
    assert failure(tmp_path, code) == f"{verifier} raised KeyError at own.py:2: '2'"
    assert failure(tmp_path, code.replace("{}[x]", "int('x')")).startswith(
        f"{verifier} raised ValueError at own.py:2: "
    )
    assert "SystemExit" in failure(tmp_path, code.replace("{}[x]", "exit(3)"))
    assert "RecursionError" in failure(tmp_path, code.replace("{}[x]", "helper(x)"))


@pytest.mark.parametrize(
    ("code", "name", "said"),
    [
        (TRUE, "absent", "own.py defines no function absent"),
        (TRUE, "not a name", "is not path/to/file.py:function"),
        (TRUE, "", "is not path/to/file.py:function"),
        ("def verify(response): return True", "verify", "takes (response): it must take (response, row)"),
        ("def verify(a, b, c): return True", "verify", "takes (a, b, c): it must take (response, row)"),
        ("def verify(response, *, row): return True", "verify", "it must take (response, row)"),
        ("def verify(completions, completion_ids): return [1]", "verify", "asks for completion_ids"),
        ("def verify(response, row)\n    return 1", "verify", "own.py:1 is no Python"),
        ("def verify(response, row): return '\0'", "verify", "own.py"),
    ],
)
def test_a_bad_verifier_is_refused_before_it_runs(tmp_path: Path, code: str, name: str, said: str) -> None:
    verifier = named(tmp_path, code, name)
    with pytest.raises(UserError) as caught:
        user.check_verifier(verifier)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert judging.check_row({**ROW, "verifier": verifier}) == str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no file .*/absent\.py"):
        user.check_verifier(f"{tmp_path}/absent.py:verify")
    (tmp_path / "text.txt").write_text("")
    with pytest.raises(UserError, match=r"text\.txt is no Python file"):
        user.check_verifier(f"{tmp_path}/text.txt:verify")


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    verifier = named(tmp_path, "def verify(completions, ground_truth, **_): return [1.0]")
    text = "asks for the column ground_truth, which the row has not"
    assert text in (judging.check_row({**ROW, "verifier": verifier}) or "")
    with pytest.raises(VerifierFailure, match=text):
        judging.judge({**ROW, "verifier": verifier}, "2")


def test_checking_runs_nothing(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    user.check_verifier(named(tmp_path, f"open({str(mark)!r}, 'w')\n{TRUE}"))
    assert not mark.exists()


@pytest.mark.slow
def test_in_a_worker(tmp_path: Path) -> None:
    """A file with a neighbour that it imports, its own torch, an import that takes longer than an answer may."""
    (tmp_path / "neighbour.py").write_text("import time\ntime.sleep(1.5)\nimport torch\nRIGHT = '2'\n")
    verifier = named(tmp_path, "import neighbour\ndef verify(response, row): return response == neighbour.RIGHT")
    broken = tmp_path / "broken.py"
    broken.write_text("import time\n\nimport no_such_module\ndef verify(response, row): return True\n")
    with Judges(VerifyConfig(workers=1, timeout_s=1.0), SandboxConfig()) as judges:
        judges.load([verifier, "exact", "math"])
        assert judges.submit({**ROW, "verifier": verifier}, "2").result(timeout=60).verdict == "right"
        assert judges.submit({**ROW, "verifier": verifier}, "3").result(timeout=60).verdict == "wrong"
        said = rf"{broken} cannot be imported: ModuleNotFoundError at broken\.py:3: No module named 'no_such_module'"
        with pytest.raises(UserError, match=said):
            judges.load([f"{broken}:verify"])
        with pytest.raises(VerifierFailure, match=said):
            judges.submit({**ROW, "verifier": f"{broken}:verify"}, "2").result(timeout=60)
