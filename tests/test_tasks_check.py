"""`python -m cipo_fast.tasks check`, and golds that do not verify against themselves."""

import json
from pathlib import Path
from typing import Any

import pytest

from cipo_fast.config import SandboxConfig, VerifyConfig
from cipo_fast.errors import UserError
from cipo_fast.golds import without_bad_golds
from cipo_fast.records import Problem
from cipo_fast.tasks.__main__ import main
from cipo_fast.tasks.check import normalised, overlapping
from cipo_fast.tasks.problems import read_problems
from cipo_fast.verify.workers.pool import Judges

ROWS = Path(__file__).parent / "data" / "rows"


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def ask(text: str, answer: str = "1") -> Problem:
    return Problem(text, ({"role": "user", "content": text},), answer, "own")


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("What is $x + 1$?", "what is x+1", True),
        ("Is it 1.5 ?", "Is it 1.5?", True),
        ("Is it 1.5?", "Is it 15?", False),
        ("f 12", "f 1 2", False),
        ("a-b", "a+b", False),
        ("Caf\u00e9", "Cafe\u0301", True),
    ],
)
def test_questions_are_the_same_but_for_case_spaces_and_stops(one: str, other: str, same: bool) -> None:
    assert (normalised(ask(one)) == normalised(ask(other))) == same
    assert bool(overlapping([ask(one)], [ask(other)])) == same


def test_the_command_says_what_is_in_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[dict[str, Any]] = [{"prompt": f"What is {i} + 1?", "answer": i + 1} for i in range(20)]
    rows += [rows[0], {"prompt": "what is 1+1", "answer": 2}, {"prompt": "What is 2 + 1?", "answer": 4}]
    train = write(tmp_path / "a.jsonl", *rows)
    held_out = write(tmp_path / "e.jsonl", {"prompt": "What is 5+1 ?", "answer": 6})
    assert main(["check", str(train), str(ROWS / "math500.jsonl"), "--eval", str(held_out)]) == 1
    said = capsys.readouterr().out
    assert "24 problems" in said
    assert "23  a.jsonl, exact" in said
    assert "1  math500.jsonl, math" in said
    assert f"repeated: 1 to the letter ({train}:21)" in said
    assert "repeated: 2 but for case, spaces and punctuation" in said
    assert f"asked again with another answer: 1 ({train}:23)" in said
    assert f"held out too: 1 of 24 questions are in --eval ({train}:6)" in said
    assert "golds: 25 verify, 0 do not, 0 rows have none" in said
    assert main(["check", str(held_out)]) == 0


def test_golds_that_do_not_verify_are_listed_and_their_rows_dropped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(
        tmp_path / "a.jsonl",
        {"prompt": "a", "answer": "\\frac{1}{2}", "verifier": "math"},
        {"prompt": "b", "answer": "t(0,4]", "verifier": "math"},
        {"prompt": "c", "answer": "7", "verifier": "math", "policy": {"none": 1}},
        {"prompt": "d", "answer": 4},
        {"prompt": "e", "verifier": "code", "tests": []},
    )
    with Judges(VerifyConfig(workers=1), SandboxConfig()) as judges:
        said: list[str] = []
        kept = without_bad_golds(read_problems(path), judges, said.append)
        assert [p.messages[0]["content"][0] for p in kept] == ["a", "d"]
        assert said[0].startswith("data.train: 3 of 5 golds do not verify, their rows are dropped: ")
        assert all(f"{path}:{n} (" in said[0] for n in (2, 3, 5))
        with pytest.raises(UserError, match="no gold verifies against itself"):
            without_bad_golds(read_problems(path)[1:2], judges, said.append)
    assert main(["check", str(path)]) == 1
    assert f"  {path}:2: wrong: " in capsys.readouterr().out


@pytest.mark.slow
def test_every_fixture_verifies_against_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", *map(str, sorted(ROWS.glob("*.jsonl")))]) == 0
    said = capsys.readouterr().out
    assert " 0 do not, 2 rows have none" in said, said  # LiveCodeBench has tests and no solution


def test_answers_are_tried_by_a_function_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[dict[str, Any]] = [{"prompt": f"an even number, {i}", "answer": str(i)} for i in range(4)]
    file = write(tmp_path / "a.jsonl", *rows, {"prompt": "x", "anwser": "2"}, {"prompt": "y", "answer": "two"})
    (tmp_path / "v.py").write_text("def even(response, row):\n    return int(response) % 2 == 0\n")
    assert main(["check", str(file), f"data.verifier={tmp_path}/v.py:even"]) == 0
    said = capsys.readouterr().out
    assert "answers taken as responses, by functions of your own: 2 right, 3 not, 1 rows have none" in said
    assert f"  {file}:2: wrong\n  {file}:4: wrong\n  {file}:6: not judged (" in said
    assert main(["check", str(file), f"data.verifier={tmp_path}/v.py:evn"]) == 2
    error = capsys.readouterr().err
    assert error == f"error: verifier {tmp_path}/v.py:evn: {tmp_path}/v.py defines no function evn\n"


def test_bad_arguments_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for args, message in (
        (["check"], "name a file"),
        (["look"], "expected `check FILE"),
        (["check", str(tmp_path / "none.jsonl")], "no file"),
        (["check", "--fast", "a.jsonl"], "unknown option --fast"),
        (["check", "a.jsonl", "--eval"], "--eval: name a file"),
        (["check", str(write(tmp_path / "b.jsonl", {"x": 1}))], "b.jsonl:1: field 'answer' is missing"),
    ):
        assert main(args) == 2
        error = capsys.readouterr().err.strip()
        assert message in error
        assert "\n" not in error
