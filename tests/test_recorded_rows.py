"""What a run records of its problems: each row once, found again by the judge, the audit and data.eval."""

import gc
import json
import weakref
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from cipo_fast.answers import read_lines
from cipo_fast.audit.__main__ import main as audit
from cipo_fast.config import Config, DataConfig, load_config
from cipo_fast.judge import main as judge
from cipo_fast.recorder import Recorder
from cipo_fast.records import Anchor, Group, Problem, Rollout
from cipo_fast.run_dir import Opened, set_aside
from cipo_fast.tasks.problems import quiet, read_problems

ROWS = Path(__file__).parent / "data" / "rows"
TESTS = [{"args": [n], "expected": 2 * n} for n in range(5000)]
SUM = {"tests": [{"args": [4], "expected": 8}], "entry_point": "f", "solution": "def f(x):\n    return x + x"}


def problem(name: str, verifier: str = "exact", answer: str = "4", **fields: Any) -> Problem:
    return Problem(name, ({"role": "user", "content": "2+2 \u2028?"},), answer, "tests", "", verifier, fields)


def group(asked: Problem, *texts: str) -> Group:
    """Right is said of a text with a 4, or one that doubles."""
    found = []
    for text in texts:
        right = "4" in text or "2 * x" in text
        found.append(Rollout(asked, [1], [2], [0.0], text, float(right), False, 0, "right" if right else "wrong", ""))
    return Group(asked, [1], found)


def config_of(folder: Path) -> Config:
    (folder.parent / "a.jsonl").write_text('{"prompt": "a", "answer": 1}\n')
    data = f"data.train={folder.parent / 'a.jsonl'}"
    return load_config([], [f"run.dir={folder}", data, "model.path=hub/model", "run.trackers=[]"])


def record(folder: Path, steps: dict[int, list[Group]], resume: int | None = None, held_out: Any = ()) -> None:
    """As a run of its own, that goes on after step `resume`."""
    folder.mkdir(exist_ok=True)
    with closing(Recorder(config_of(folder))) as recorder:
        recorder.open(Opened(resume is not None, {}), resume, held_out)
        for step, groups in steps.items():
            first = groups[0].rollouts[0]
            corrected = Anchor(first, 0, 0, [1], None, [group(first.problem, "still 4").rollouts[0]])
            recorder.step({"step": step}, groups, [corrected])


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def verdicts(path: Path) -> list[str]:
    return [line["verdict"] for line in lines(path)]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


def test_a_row_is_written_once_and_survives_the_end_of_a_process(run: Path) -> None:
    a, b, c = problem('a, "source": \'é"', x=TESTS), problem("b", answer="5"), problem("c", half="\ud800")
    record(run, {1: [group(a, "4", "5", "4")], 2: [group(b, "4"), group(a, "4", "5")]})
    rows = run / "rollouts" / "problems.jsonl"
    whole = rows.read_bytes()
    assert lines(rows) == [{"problem": p.id, "source": "tests", "row": p.row} for p in (a, b)]
    assert whole.count(json.dumps(TESTS).encode()) == 1
    for record_ in [r for n in (1, 2) for r in lines(run / "rollouts" / f"step-0000{n}.jsonl")]:
        assert record_["problem"] in (a.id, "b")
        assert "row" not in record_
        assert len(json.dumps(record_)) < 1000
    torn = json.dumps({"problem": "c", "source": "tests", "row": c.row})[:-9].encode()
    for tail in (b"", torn, torn[:5], bytes(100)):  # a kill -9, or a power cut, in the midst of a line
        rows.write_bytes(whole + tail)
        record(run, {3: [group(c, "4"), group(a, "4"), group(b, "5")]}, resume=2)
        assert lines(rows) == [{"problem": p.id, "source": "tests", "row": p.row} for p in (a, b, c)]
        assert rows.read_bytes().startswith(whole)
    compact = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines(rows))  # by another program
    rows.write_text(compact)
    record(run, {3: [group(a, "4"), group(b, "5")]}, resume=2)
    assert rows.read_text() == compact


def test_a_row_that_is_another_one_since_the_run_went_on(run: Path) -> None:
    """Each rollout is judged by the row that it had."""
    before, after = group(problem("a", answer="4"), "is 4", "4"), group(problem("a", answer="5"), "4", "5")
    record(run, {1: [before]})
    record(run, {2: [after]}, resume=1)
    record(run, {3: [after, group(problem("b"), "4")], 4: [group(problem("b"), "4")]}, resume=2)
    record(run, {5: [before]}, resume=4)
    assert [line["problem"] for line in lines(run / "rollouts" / "problems.jsonl")] == ["a", "a@2", "b"]
    assert judge([str(run)]) == 0
    found = lines(run / "rollouts.judged.jsonl")
    assert [line["problem"] for line in found] == ["a", "a", "a@2", "a@2", "a@2", "a@2", "b", "b", "a", "a"]
    assert [line["verdict"] for line in found] == [*["wrong", "right"] * 3, "right", "right", "wrong", "right"]


def test_the_judge_and_the_audit_look_rows_up(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "own.py").write_text("def same(response, row):\n    return row['gold'] == int(response) == 4\n")
    code = "```python\ndef f(x):\n    return {} * x\n```"
    groups = [
        group(problem("a", "math", policy={"percent": "value"}), "so \\boxed{4}", "\\boxed{5}"),
        group(problem("b", f"{tmp_path / 'own.py'}:same", "", gold=4), "4", "5"),
        group(problem("c", "code", "", **SUM), code.format(2), code.format(3)),
    ]
    record(run, {1: groups, 2: groups[::-1]})
    assert judge([str(run)]) == 0
    assert "second opinion: 12 of 14 verdicts" in capsys.readouterr().out  # the corrections are not as was said
    expected = ["right", "wrong"] * 6
    assert verdicts(run / "rollouts.judged.jsonl") == expected
    corrected = [c["verdict"] for line in lines(run / "rollouts.judged.jsonl") for c in line["corrections"] or ()]
    assert corrected == ["unparsable", "unparsable"]  # "still 4" has no box and is no program

    step = run / "rollouts" / "step-00002.jsonl"
    assert judge([str(step)]) == 0
    assert verdicts(step.with_suffix(".judged.jsonl")) == expected[:6]
    again = tmp_path / "again.jsonl"  # a judge's output is judged like its input
    assert judge([str(run / "rollouts.judged.jsonl"), "--out", str(again)]) == 0
    assert verdicts(again) == expected
    capsys.readouterr()
    for path in (run, step, run / "rollouts.judged.jsonl"):
        assert audit(["gaming", str(path)]) == 0
        assert "answers to 1 problems were run on Phi(T)" in capsys.readouterr().out
    assert audit(["own", str(run)]) == 0


def test_without_its_rows_a_run_cannot_be_judged(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(run, {1: [group(problem("a"), "4"), group(problem("b"), "4")], 2: [group(problem("a"), "5")]})
    rows = run / "rollouts" / "problems.jsonl"
    content = rows.read_bytes()
    rows.unlink()
    capsys.readouterr()
    for command in (judge, lambda args: audit(["gaming", *args])):
        for path in (run, run / "rollouts", run / "rollouts" / "step-00001.jsonl"):
            assert command([str(path)]) == 2
            error = capsys.readouterr().err
            assert f"{rows}: cannot be read (No such file or directory): rollouts are judged by the rows" in error
            assert error.count("\n") == 1
    assert audit(["own", str(run)]) == 0  # it judges nothing

    rows.write_bytes(content.splitlines(keepends=True)[0] + b'{"problem": "c"}\n[]\n\0\0\n')
    assert judge([str(run), "--overwrite"]) == 2
    found = lines(run / "rollouts.judged.jsonl")
    assert [line["verdict"] for line in found] == ["right", None, "wrong"]
    assert found[1]["why"] == f"problem 'b' is not in {rows}"
    rows.write_bytes(content.replace(b'"row": {', b'"row": '))
    assert judge([str(run), "--overwrite"]) == 2
    assert f"the row of problem 'a' in {rows} cannot be read" in capsys.readouterr().err


def test_a_row_is_in_memory_once_and_no_longer_than_it_is_used(run: Path) -> None:
    a, b = problem("a", x=TESTS), problem("b", x=TESTS)
    record(run, {step: [group(a, "4", "5"), group(b, "4")] for step in (1, 2)})
    found = list(read_lines(sorted((run / "rollouts").glob("step-*")), True))
    assert len({id(line.answers[0].row) for line in found}) == 2
    assert found[0].row_size > len(json.dumps(TESTS))
    assert [line.row_size > 0 for line in found] == [True, False, True, False, False, False]
    first = weakref.ref(found[0].answers[0].row)
    del found
    gc.collect()
    assert first() is None

    def most() -> Iterator[int]:
        kept: list[weakref.ref[Any]] = []
        for line in read_lines(sorted((run / "rollouts").glob("step-*")), True):
            kept.append(weakref.ref(line.answers[0].row))
            del line
            yield len({id(ref()) for ref in kept if ref() is not None})

    assert max(most()) <= 2


# -------------------------------------------------------------------------------------------------- held_out.jsonl


@pytest.mark.parametrize("path", sorted(ROWS.glob("*.jsonl")), ids=lambda path: path.stem)
@pytest.mark.parametrize("function", [False, True])
def test_held_out_problems_are_problems_again(path: Path, function: bool, run: Path, tmp_path: Path) -> None:
    """Of every data set, by its own verifier and by a user's function."""
    (tmp_path / "own.py").write_text("def judge(response, row):\n    return True\n")
    data = DataConfig(verifier=f"{tmp_path / 'own.py'}:judge" if function else None)
    same(read_problems(path, quiet, data), run)


def test_held_out_problems_ask_what_they_asked(run: Path, tmp_path: Path) -> None:
    """A function gets its row without what was added to the prompt."""
    (tmp_path / "own.py").write_text("def judge(response, row):\n    return True\n")
    row = {"prompt": "a", "verifier": "own.py:judge", "words": 3}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    (problem,) = read_problems(tmp_path / "rows.jsonl", quiet, DataConfig(instruction="Be brief."))
    assert problem.messages[0]["content"] == "a\n\nBe brief."
    same([problem], run)
    (again,) = read_problems(run / "held_out.jsonl")
    assert again.row == problem.row


def test_held_out_problems_of_every_verifier_are_problems_again(run: Path, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("def judge(response, row):\n    return True\n")
    suite = {"entry_point": "f", "test": "def check(candidate):\n    assert candidate(1)"}
    rows = [
        {"prompt": "a", "answer": 4.50},
        {"prompt": "b", "answer": "$4", "verifier": "math", "policy": {"percent": "value"}, "unit": "m"},
        {"prompt": "c", "answers": ["1", "2"], "verifier": "math"},
        {"prompt": "d", "tests": [{"args": [1], "expected": None}], "entry_point": "f", "solution": "f = print"},
        {"prompt": "e", "tests": [{"stdin": "1\n", "stdout": "é\u2028\n"}]},
        {"prompt": "def f(x):\n", "verifier": "code", **suite},
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "f"}], "answer": "1"},
        {"prompt": "g", "verifier": "own.py:judge", "words": [1, 2.5, None]},
        {"messages": [{"role": "user", "content": "h"}], "prompt": "x", "verifier": "own.py:judge", "id": "h"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems = read_problems(path)
    assert {p.verifier.rpartition(":")[2] for p in problems} == {"exact", "math", "code", "judge"}
    same(problems, run)


def same(problems: list[Problem], run: Path) -> None:
    record(run, {}, held_out=problems)
    again = read_problems(run / "held_out.jsonl")
    assert [(p.id, p.content, p.verifier) for p in again] == [(p.id, p.content, p.verifier) for p in problems]
    for one, other in zip(again, problems, strict=True):
        other.row.pop("attempt_right", None)  # CriticBench's, which no verifier reads
        assert {**one.row, **other.row} == one.row
        assert one.row.keys() - other.row.keys() <= ({"id"} if ".py:" in one.verifier else set())


# ------------------------------------------------------------------------------------------------------- a new run


def test_what_the_judge_made_of_a_run_is_set_aside_with_it(run: Path) -> None:
    record(run, {1: [group(problem("a"), "4")]})
    assert judge([str(run)]) == 0
    (run / "rollouts.judged.jsonl.part").write_text("{")  # of a judge that was ended
    (run / "mine.txt").write_text("")
    judged = (run / "rollouts.judged.jsonl").read_bytes()
    set_aside(run)
    assert sorted(p.name for p in run.iterdir()) == ["mine.txt", "previous"]
    (aside,) = (run / "previous").iterdir()
    assert (aside / "rollouts.judged.jsonl").read_bytes() == judged
    assert {"rollouts", "rollouts.judged.jsonl.part"} <= {p.name for p in aside.iterdir()}
    record(run, {1: [group(problem("a"), "5")]})
    assert judge([str(run)]) == 0  # nothing of the earlier one is in the way
    assert verdicts(run / "rollouts.judged.jsonl") == ["wrong"]
    assert judge([str(aside / "rollouts"), "--out", str(run / "earlier.jsonl")]) == 0
    assert verdicts(run / "earlier.jsonl") == ["right"]
