"""Rows of public data sets: each format with its traps, and what a missing field is called."""

import base64
import json
import pickle
import zlib
from pathlib import Path

import pytest

from cipo_fast.config import DataConfig
from cipo_fast.errors import UserError
from cipo_fast.records import Problem
from cipo_fast.tasks.formats import INSTRUCTION, recognised
from cipo_fast.tasks.formats_math import last_box
from cipo_fast.tasks.problems import quiet, read_problems

ROWS = Path(__file__).parent / "data" / "rows"
FORMAT = {  # file -> (what its rows are recognised as, verifier, problems in it)
    "aime24": ("aime", "math", 1),
    "aime24_capitals": ("aime", "math", 1),
    "aime25": ("qa", "math", 2),
    "amc23": ("amc23", "math", 2),
    "math500": ("math500", "math", 1),
    "math": ("math", "math", 2),
    "minerva": ("minerva", "math", 1),
    "minerva_short": ("qa", "math", 1),
    "olympiadbench": ("olympiadbench", "math", 4),
    "gsm8k": ("gsm8k", "math", 1),
    "dapo": ("dapo", "math", 2),
    "dapo_processed": ("dapo", "math", 1),
    "humaneval": ("humaneval", "code", 1),
    "mbpp": ("mbpp", "code", 1),
    "mbpp_plus": ("mbpp", "code", 1),
    "livecodebench": ("livecodebench", "code", 2),
    "criticbench": ("criticbench", "math", 1),
    "debugbench": ("debugbench", "code", 1),
}


def read(name: str, said: list[str] | None = None, **data: object) -> list[Problem]:
    return read_problems(
        ROWS / f"{name}.jsonl", quiet if said is None else said.append, DataConfig.model_validate(data)
    )


def rows(name: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (ROWS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def asked(problem: Problem) -> str:
    return problem.messages[-1]["content"]


def test_every_fixture_is_known() -> None:
    assert {path.stem for path in ROWS.glob("*.jsonl")} == set(FORMAT)


@pytest.mark.parametrize("name", FORMAT)
def test_a_format_is_told_from_its_fields_or_named(name: str) -> None:
    format, verifier, count = FORMAT[name]
    assert {recognised(row) for row in rows(name)} == {format}
    problems = read(name)
    assert len(problems) == count
    assert {p.verifier for p in problems} == {verifier}
    assert {p.source for p in problems} <= {f"{name}.jsonl", "math_dapo", "criticbench/GSM8K"}
    assert read(name, format=format) == problems
    if name != "criticbench":
        assert all(asked(p).endswith(INSTRUCTION[verifier]) for p in problems)
    json.dumps([p.row for p in problems], allow_nan=False)


@pytest.mark.parametrize(
    ("name", "answers"),
    [
        ("aime24", ["73"]),
        ("aime24_capitals", ["9"]),
        ("aime25", ["70", "32"]),
        ("amc23", ["27", "2.5"]),
        ("math500", [r"\frac{1}{2}"]),
        ("math", [r"\{1,\frac{-1}{1}\}", "2"]),
        ("minerva", ["1.0"]),
        ("minerva_short", ["1"]),
        ("olympiadbench", ["2", "3, -3", r"\frac{5}{2}", "(1,2), (3,4)"]),
        ("gsm8k", ["1250"]),
        ("dapo", ["34", "35"]),
        ("dapo_processed", ["34"]),
        ("criticbench", ["42"]),
    ],
)
def test_golds_are_what_is_meant(name: str, answers: list[str]) -> None:
    assert [p.answer for p in read(name)] == answers


MISSING = [  # (fixture, field, what the error says)
    ("aime24", "problem", "field 'problem' is missing (or 'question'"),
    ("aime24_capitals", "Answer", "field 'answer' is missing (or 'Answer'"),
    ("amc23", "answer", "field 'answer' is missing"),
    ("math500", "answer", "field 'answer' is missing"),
    ("math", "solution", "field 'solution' is missing"),
    ("math", "problem", "field 'problem' is missing"),
    ("minerva", "solution", "field 'solution' is missing"),
    ("olympiadbench", "final_answer", "field 'final_answer' is missing"),
    ("olympiadbench", "question", "field 'question' is missing"),
    ("gsm8k", "answer", "field 'answer' is missing"),
    ("gsm8k", "question", "field 'problem' is missing (or 'question'"),
    ("dapo", "prompt", "field 'prompt' is missing"),
    ("dapo", "reward_model", "field 'answer' is missing"),
    ("humaneval", "prompt", "field 'prompt' is missing"),
    ("humaneval", "entry_point", "field 'entry_point' is missing"),
    ("humaneval", "test", "field 'test' is missing"),
    ("mbpp", "test_list", "field 'test_list' is missing"),
    ("mbpp", "code", "field 'code' is missing"),
    ("mbpp", "text", "field 'prompt' is missing (or 'text')"),
    ("livecodebench", "question_content", "field 'question_content' is missing"),
    ("livecodebench", "public_test_cases", "field 'public_test_cases' is missing"),
    ("livecodebench", "private_test_cases", "field 'private_test_cases' is missing"),
    ("criticbench", "response", "field 'response' is missing"),
    ("criticbench", "response_label", "field 'response_label' is missing"),
    ("criticbench", "answer", "field 'answer' is missing"),
    ("debugbench", "buggy_code", "field 'buggy_code' is missing"),
    ("debugbench", "examples", "field 'examples' is missing"),
    ("debugbench", "language", "field 'language' is missing"),
    ("debugbench", "solution", "field 'solution' is missing"),
]


@pytest.mark.parametrize(("name", "field", "message"), MISSING)
def test_a_missing_field_is_named_with_its_line(tmp_path: Path, name: str, field: str, message: str) -> None:
    good = rows(name)[0]
    lacking = {key: value for key, value in good.items() if key != field}
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(good) + "\n" + json.dumps(lacking) + "\n")
    with pytest.raises(UserError) as caught:
        read_problems(path, quiet, DataConfig(format=FORMAT[name][0]))
    assert str(caught.value).startswith(f"{path}:2: {message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "field", "value", "message"),
    [
        ("aime24", "answer", "1000", "an AIME answer is an integer from 0 to 999"),
        ("aime24", "answer", "7.5", "an AIME answer is an integer"),
        ("aime24", "question", "Another one?", "fields 'problem' and 'question' differ"),
        ("amc23", "answer", float("nan"), "field 'answer' is NaN"),
        ("amc23", "answer", True, "neither text nor a number"),
        ("amc23", "question", 7, "field 'question' is not text"),
        ("amc23", "question", " ", "field 'question' is blank"),
        ("gsm8k", "answer", "7", "nothing after ####"),
        ("gsm8k", "answer", "7 #### ", "nothing after ####"),
        ("olympiadbench", "error", "small", "expected a tolerance"),
        ("olympiadbench", "final_answer", "2", "field 'final_answer' is not a list"),
        ("olympiadbench", "context", 3, "field 'context' is not text"),
        ("humaneval", "test", ["x"], "field 'test' is not text"),
        ("mbpp", "test_list", [], "field 'test_list' is an empty list"),
        ("mbpp", "code", "x = 1", "defines no function that 'test_list' calls"),
        ("livecodebench", "public_test_cases", "[", "field 'public_test_cases' is not JSON"),
        ("livecodebench", "public_test_cases", "[1]", "not a list of tests"),
        ("livecodebench", "private_test_cases", "%%%", "neither JSON nor base64"),
        ("livecodebench", "private_test_cases", base64.b64encode(b"no zlib").decode(), "neither JSON nor base64"),
        ("criticbench", "answer", [1.5, None], "neither text nor a number"),
    ],
)
def test_a_value_that_cannot_be_meant_is_refused(
    tmp_path: Path, name: str, field: str, value: object, message: str
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps({**rows(name)[0], field: value}) + "\n")
    with pytest.raises(UserError) as caught:
        read_problems(path, quiet, DataConfig(format=FORMAT[name][0]))
    assert str(caught.value).startswith(f"{path}:1: ")
    assert message in str(caught.value)


def test_rows_that_nobody_can_verify_are_dropped_and_named() -> None:
    said: list[str] = []
    for name in ("math", "olympiadbench", "criticbench", "debugbench"):
        read(name, said)
    text = "\n".join(said)
    assert "1 of 3 rows dropped: its solution has no box, which holds the gold (rows 2)" in text
    assert "1 of 5 rows dropped: a proof is asked for" in text
    assert "a code question: its tests are not in the row (rows 2)" in text
    assert "several answers are accepted" in text
    assert "a program in cpp: only Python can be run (rows 2)" in text
    assert "lists of nodes or trees, which its examples only draw (rows 3)" in text
    assert "its examples are no calls with values (rows 4)" in text
    assert "DebugBench is scored by an online judge; here by the examples that its rows show" in text


def test_dapo_counts_a_repeated_row_once_and_asks_for_a_box() -> None:
    said: list[str] = []
    problems = read("dapo", said)
    assert [p.id for p in problems] == ["a", "c"]
    assert said == [f"{ROWS / 'dapo.jsonl'}: 2 of 4 rows repeat earlier ones: dropped"]
    assert asked(problems[0]) == f"What is 3 + 31?\n\n{INSTRUCTION['math']}"
    assert problems[0].content == read("dapo_processed")[0].content
    untouched = read("dapo", instruction="none")[0]
    assert asked(untouched) == rows("dapo")[0]["prompt"][0]["content"]  # type: ignore[index]
    assert untouched.fields["policy"] == {"answer_line": True}
    assert "policy" not in problems[0].fields


def test_olympiadbench_shows_its_context_and_keeps_what_its_answers_need() -> None:
    one, two, three, four = read("olympiadbench")
    assert asked(one).startswith("Let $f(x)=x+1$.\n\nFind $f(1)$.")
    assert one.fields == {"answer_type": "Numerical"}
    assert two.fields["answers"] == ["3", "-3"]
    assert "several answers" in asked(two)
    assert (three.fields["unit"], three.fields["error"]) == ("km", 0.01)
    assert "in this unit: $km$" in asked(three)
    assert four.fields["answers"] == ["(1,2)", "(3,4)"]


def test_code_rows_have_the_tests_that_count() -> None:
    (humaneval,) = read("humaneval")
    assert humaneval.row["test"].startswith("def check(candidate)")
    assert humaneval.row["prompt"].startswith("def double")
    assert "```python\ndef double" in asked(humaneval)
    (mbpp,) = read("mbpp")
    assert mbpp.row["entry_point"] == "add"
    assert mbpp.row["test"] == "assert add(1, 2) == 3\nassert add(0, 0) == 0"
    assert "assert add(1, 2) == 3" in asked(mbpp)
    assert "assert add(0, 0)" not in asked(mbpp)  # not shown: an answer must do more than it sees
    (plus,) = read("mbpp_plus")
    assert plus.row["entry_point"] == "root"  # not isclose, which it calls first
    assert "results = [2, 3, 1.4142135623730951]" in plus.row["test"]
    assert plus.row["solution"].startswith("import math")
    (debug,) = read("debugbench")
    assert debug.row["tests"] == [{"args": [[1, 2], 1], "expected": [2, 3]}, {"args": [[], 5], "expected": []}]
    assert "n - k" in asked(debug)
    assert "n + k" not in asked(debug)


def test_livecodebench_has_public_and_private_tests() -> None:
    stdin, call = read("livecodebench")
    assert stdin.row["tests"] == [{"stdin": "1 2\n", "stdout": "3\n"}, {"stdin": "5 6\n", "stdout": "11\n"}]
    assert call.row["tests"] == [{"args": [[1, 2], 3], "expected": [1, 2, 3]}, {"args": [[], 0], "expected": [0]}]
    assert call.row["entry_point"] == "put"
    assert "def put(self" in asked(call)
    row = {**rows("livecodebench")[1], "metadata": "{}"}
    with pytest.raises(UserError, match=r"'metadata\.func_name' is missing"):
        from_row(row)


def from_row(row: dict[str, object]) -> Problem:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.jsonl"
        path.write_text(json.dumps(row))
        return read_problems(path)[0]


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("raise SystemExit('the pickle was run')",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps(Bomb()), "is refused: it holds"),
        (pickle.dumps(Bomb(), protocol=0), "is refused: it holds GLOBAL"),
        (pickle.dumps(["[]"]), "is refused: it holds"),
        (pickle.dumps(b"[]"), "is refused: it holds"),
        (pickle.dumps("[]")[:-3], "is refused"),
        (b"\x80\x04r\xff\xff\xff\xff.", "holds 0 texts"),  # memo index 2**32 - 1: 64 GB where it is run
        (b"", "is refused"),
        (pickle.dumps("not JSON"), "is not JSON"),
    ],
)
def test_a_pickle_is_read_and_not_run(content: bytes, message: str) -> None:
    packed = base64.b64encode(zlib.compress(content)).decode()
    with pytest.raises(UserError, match=f"field 'private_test_cases'.*{message}"):
        from_row({**rows("livecodebench")[0], "private_test_cases": packed})


def test_a_compressed_bomb_is_not_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cipo_fast.tasks.packed.MOST_BYTES", 1000)
    packed = base64.b64encode(zlib.compress(pickle.dumps("[" + " " * 100_000 + "]"))).decode()
    with pytest.raises(UserError, match="more than 1,000 bytes unpacked"):
        from_row({**rows("livecodebench")[0], "private_test_cases": packed})


def test_criticbench_asks_to_correct_its_attempt() -> None:
    (problem,) = read("criticbench")
    assert [m["role"] for m in problem.messages] == ["user", "assistant", "user"]
    assert problem.messages[1]["content"] == "It is 41."
    assert problem.fields == {"attempt_right": False}
    assert INSTRUCTION["math"] in asked(problem)


@pytest.mark.parametrize(
    ("text", "box"),
    [
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1} and \boxed{2}", "2"),
        (r"\boxed{1} and \boxed{2", "1"),
        (r"\boxed 7$.", "7"),
        (r"\fbox{3}", "3"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxedfoo{3}", None),
        ("none", None),
    ],
)
def test_the_last_box_of_a_solution(text: str, box: str | None) -> None:
    assert last_box(text) == box
