"""The judge as a command: every line comes out, in order, with a verdict or with why there is none."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cipo_fast.answers import read_record, with_answers
from cipo_fast.config import DataConfig, SandboxConfig, VerifyConfig
from cipo_fast.judge import MOST_LINES, judged, main
from cipo_fast.train import main as train
from cipo_fast.verify.workers.pool import Judges

ROOT = Path(__file__).parents[1]
VERIFIER = """
import time
def same(response, row):
    time.sleep(row.get("sleep", 0))
    return response == row["answer"]
def raises(response, row):
    raise KeyError("colour")
"""
TINY = [  # warm enough that some answers come to an end
    "model.embedded.hidden=64", "model.embedded.mlp=96", "model.embedded.warm_accuracy=0.05", "data.task=add",
    "rollout.prompts_per_step=8", "rollout.samples_per_prompt=4", "rollout.max_tokens=6", "eval.problems=4",
    "eval.samples=2", "run.trackers=[]", "run.view=plain", "train.steps=2", "checkpoint.export=false",
]  # fmt: skip


def exact(response: str, answer: str, **more: Any) -> dict[str, Any]:
    return {"response": response, "verifier": "exact", "answer": answer, **more}


def maths(response: str, answer: Any, **more: Any) -> dict[str, Any]:
    return {"response": response, "verifier": "math", "answer": answer, **more}


def write(path: Path, lines: list[Any]) -> Path:
    """Objects as JSON, bytes as they are."""
    path.write_bytes(b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n" for x in lines))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def command(*args: object) -> list[str]:
    return [sys.executable, "-m", "cipo_fast.judge", *map(str, args)]


def judge(*args: object) -> "subprocess.CompletedProcess[str]":
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command(*args), env=env, capture_output=True, text=True, timeout=120)


@pytest.fixture
def user(tmp_path: Path) -> str:
    path = tmp_path / "mine.py"
    path.write_text(VERIFIER)
    return str(path)


def test_every_verifier_in_order_with_the_lines_as_they_were(tmp_path: Path, user: str) -> None:
    call = {"verifier": "code", "entry_point": "double", "tests": [{"args": [4], "expected": 8}]}
    stdin = {"verifier": "code", "tests": [{"stdin": "2 3\n", "stdout": "5\n"}]}
    lines: list[tuple[Any, str]] = [
        (exact(" a\n", "a"), "right"),
        (maths("so \\boxed{\\frac{2}{4}}", "\\frac12"), "right"),
        (maths("so \\boxed{0.6}", "\\frac12"), "wrong"),
        (maths("no box here, sorry", "12"), "unparsable"),
        ({"response": "a", "verifier": f"{user}:same", "answer": "a", "sleep": 0.5}, "right"),
        ({"response": "b", "verifier": f"{user}:same", "answer": "a"}, "wrong"),
        ({**call, "response": "```python\ndef double(x):\n    return 2 * x\n```"}, "right"),
        ({**call, "response": "```python\ndef double(x):\n    return x ** 2\n```"}, "wrong"),
        ({**stdin, "response": "```python\nprint(sum(map(int, input().split())))\n```"}, "right"),
        ({**stdin, "response": "```python\nwhile True: pass\n```"}, "timeout"),
        (maths("\\boxed{7}", 7.0), "right"),
    ]
    kept = b'{"response" : "3", "verifier": "exact", "answer": 3, "x": 1.50, "big": 1e400 }  '
    out = tmp_path / "o.jsonl"
    file = write(tmp_path / "in.jsonl", [*(line for line, _ in lines), b"", kept])
    done = judge(file, "--out", out, "sandbox.cpu_s=1", "sandbox.answer_s=20")
    assert done.returncode == 0, done.stderr
    found = read(out)
    assert [r["verdict"] for r in found] == [*(verdict for _, verdict in lines), "right"]
    assert [{k: r[k] for k in line} for r, (line, _) in zip(found, lines, strict=False)] == [line for line, _ in lines]
    assert all(isinstance(r["why"], str) and r["seconds"] >= 0 for r in found)
    assert (
        out.read_bytes().splitlines()[-1].startswith(b'{"response" : "3", "verifier": "exact", "answer": 3, "x": 1.50')
    )
    assert "12 answers in 12 lines" in done.stdout
    assert "sandbox" in done.stdout  # which tier isolates
    assert done.stderr == ""


BAD = [
    (b"not json", "cannot be read as JSON"),
    (b"\x00\x01\xfe\xff\x80", "cannot be read as JSON"),
    (b"[1, 2]", "not a JSON object"),
    (b"[" * 100_000, "cannot be read as JSON"),
    (b'{"verifier": "exact", "answer": "a", "response": "to', "cannot be read as JSON"),
    ({"verifier": "exact", "answer": "a"}, "no field 'response'"),
    (exact("a", "a") | {"response": ["a"]}, "field 'response' is not text"),
    ({"response": "a", "answer": "a"}, "no field 'verifier'"),
    ({"response": "a", "verifier": "maths", "answer": "a"}, "maths"),
    ({"response": "a", "verifier": 3}, "field 'verifier' is not text"),
    ({"response": "a", "verifier": "exact"}, "answer"),
    ({"response": "a", "verifier": "exact", "answer": {"a": 1}}, "answer"),
    ({"response": "a", "verifier": "math"}, "answer"),
    ({"response": "a", "verifier": "code", "tests": []}, "tests"),
    ({"response": "a", "verifier": "code"}, "tests"),
    ({"response": "a", "verifier": "no_such_file.py:f"}, "no_such_file.py"),
    ({}, "no field"),
]


def test_bad_lines_lose_nothing(tmp_path: Path) -> None:
    lines = [line for bad, _ in BAD for line in (exact("a", "a"), bad)]
    file = write(tmp_path / "in.jsonl", [*lines, exact("b", "a")])
    done = judge(file)
    assert done.returncode == 2
    found = read(tmp_path / "in.judged.jsonl")
    assert [r["verdict"] for r in found] == ["right", None] * len(BAD) + ["wrong"]
    for number, (_, why) in enumerate(BAD):
        assert why in found[2 * number + 1]["why"]
        assert found[2 * number + 1]["fault"] == "bad line"
        assert f"{file}:{2 * number + 2}: " in done.stderr
    assert found[1]["line"] == "not json"
    assert done.stderr.splitlines()[-1].startswith(f"error: {len(BAD)} of {len(lines) + 1} lines could not be judged")


def test_answers_that_are_hard_to_read_are_judged(tmp_path: Path) -> None:
    lines = [
        b'{"verifier": "exact", "answer": "a", "response": "\xff\xfe"}',
        b'{"verifier": "math", "answer": "3", "response": "\xff \\\\boxed{3}"}',
        b'{"verifier": "math", "answer": "3", "response": "\\ud800 \\\\boxed{3}"}',
        maths("\0 \\boxed{3}", "3"),
        maths("9" * 10_000_000, "3"),
        maths("\\boxed{" + "(" * 400 + "7" + ")" * 400 + "}", "7"),
        maths("\\boxed{9^{9^{9^{9^9}}}}", "7"),
        exact("x" * 10_000_000, "3"),
    ]
    assert main([str(write(tmp_path / "in.jsonl", lines)), "--out", str(tmp_path / "o.jsonl")]) == 0
    verdicts = [r["verdict"] for r in read(tmp_path / "o.jsonl")]
    assert verdicts[:4] == ["wrong", "right", "right", "right"]
    assert verdicts[4] in ("wrong", "unparsable")
    assert set(verdicts[5:]) <= {"right", "wrong", "unparsable"}
    assert verdicts[-1] == "wrong"


def test_what_the_machinery_failed_has_no_verdict(tmp_path: Path, user: str, capsys) -> None:
    lines = [exact("a", "a"), {"response": "a", "verifier": f"{user}:raises"}, exact("b", "a")]
    file = write(tmp_path / "in.jsonl", lines)
    assert main([str(file)]) == 1
    found = read(tmp_path / "in.judged.jsonl")
    assert [r["verdict"] for r in found] == ["right", None, "wrong"]
    assert found[1]["fault"] == "not judged"
    assert "KeyError" in found[1]["why"]
    error = capsys.readouterr().err
    assert f"{file}:2: not judged: " in error
    assert "1 answers were not judged" in error


def test_nothing_is_written_over(tmp_path: Path, capsys) -> None:
    file = write(tmp_path / "in.jsonl", [exact("a", "a")])
    for args, line in (
        ([str(file), "--out", str(file)], "is the input"),
        ([], None),
        ([str(tmp_path / "no.jsonl")], "no such file"),
        ([str(tmp_path)], "no rollouts/step-*.jsonl"),
        ([str(file), str(file)], "one file or folder"),
        ([str(file), "--fast"], "unknown option --fast"),
        ([str(file), "--out"], "--out: name a file"),
        ([str(file), "verify.timeout=3"], "verify.timeout_s"),
        ([str(file), "--out", "/proc/no/o.jsonl"], "cannot be written"),
    ):
        assert main(args) == (0 if line is None else 2)
        error = capsys.readouterr().err
        assert line is None or (line in error and error.count("\n") == 1), error
    assert list(tmp_path.iterdir()) == [file]
    assert main([str(file)]) == 0
    assert main([str(file)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([str(file), "--overwrite"]) == 0
    assert file.read_text() == json.dumps(exact("a", "a")) + "\n"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_an_ended_judge_goes_on(tmp_path: Path, user: str, how: signal.Signals) -> None:
    lines = [
        {"response": "ab"[i % 2], "verifier": f"{user}:same", "answer": "a", "sleep": 0.05, "i": i} for i in range(100)
    ]
    file, part = write(tmp_path / "in.jsonl", [*lines[:3], b"bad", *lines[3:]]), tmp_path / "in.judged.jsonl.part"
    process = subprocess.Popen(command(file), env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE)
    while not part.exists() or part.read_bytes().count(b"\n") < 10:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(how)
    error = process.communicate(timeout=60)[1].decode()
    assert process.returncode == (-9 if how == signal.SIGKILL else 130)
    if how != signal.SIGKILL:
        assert error.splitlines()[-1] == "interrupted: the same command goes on from where it was"
    written = part.read_bytes().count(b"\n")
    with part.open("ab") as torn:
        torn.write(b'{"response": "a", "ver')
    done = judge(file)
    assert done.returncode == 2
    assert f"going on after the {written} lines" in done.stderr
    found = read(tmp_path / "in.judged.jsonl")
    assert [r.get("i") for r in found] == [0, 1, 2, None, *range(3, 100)]
    assert [r["verdict"] for r in found if "i" in r] == ["right", "wrong"] * 50
    assert "50 50.0%" in done.stdout  # the summary is of all lines
    assert not part.exists()


def test_a_part_of_another_input_is_refused(tmp_path: Path, capsys) -> None:
    file = write(tmp_path / "in.jsonl", [exact("a", "a")])
    part = write(tmp_path / "in.judged.jsonl.part", [exact("b", "a", verdict="wrong", why="", seconds=0.0)])
    assert main([str(file)]) == 2
    assert "another input" in capsys.readouterr().err
    assert part.exists()
    assert main([str(file), "--overwrite"]) == 0


def test_a_slow_answer_does_not_fill_the_memory(user: str) -> None:
    """While the first answer is judged, no more than MOST_LINES are read."""
    read_so_far = 0

    def lines():
        nonlocal read_so_far
        slow = {"response": "a", "verifier": f"{user}:same", "answer": "a", "sleep": 1.0}
        for record in [slow] + [exact("a", "a")] * 2000:
            read_so_far += 1
            yield with_answers(read_record(json.dumps(record).encode(), "x:1"), False, DataConfig())

    with Judges(VerifyConfig(), SandboxConfig()) as judges:
        found = judged(lines(), judges)
        next(found)
        assert MOST_LINES - 1 <= read_so_far <= MOST_LINES
        assert sum(1 for _ in found) == 2000


@pytest.mark.slow
def test_a_second_opinion_on_a_run(tmp_path: Path, warm: Path, capsys) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "warm_start").symlink_to(warm / "warm_start")
    assert train([*TINY, f"run.dir={run}"]) == 0
    assert main([str(run)]) == 0
    answers = [r for f in sorted((run / "rollouts").glob("step-*.jsonl")) for r in read(f)]
    corrections = [c for r in answers for c in r["corrections"] or ()]
    assert len(answers) == 64
    assert len(corrections) > 0
    total = len(answers) + len(corrections)
    assert f"second opinion: {total} of {total} verdicts are as they were" in capsys.readouterr().out
    found = read(run / "rollouts.judged.jsonl")
    assert [r["text"] for r in found] == [r["text"] for r in answers]
    assert [[c["verdict"] for c in r["corrections"] or ()] for r in found]
    assert all((r["verdict"] == "right") == (r["reward"] == 1) for r in found)

    first = run / "rollouts" / "step-00001.jsonl"  # a record that says otherwise
    records = read(first)
    records[2] |= {"reward": 1 - records[2]["reward"]}
    records[2].pop("verdict", None)
    write(first, records)
    assert main([str(run / "rollouts"), "--out", str(tmp_path / "again.jsonl")]) == 0
    said = capsys.readouterr().out
    assert f"second opinion: {total - 1} of {total} verdicts are as they were" in said
    assert f"{first}:3: was " in said


def test_help_says_how(capsys) -> None:
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    for word in ("--out", "--overwrite", "OUT.part", "Exit codes", "verdict_before"):
        assert word in said


def test_a_rows_own_error_is_a_tolerance(tmp_path: Path) -> None:
    """OlympiadBench's; judged anew too, and the judge's own word of before is none."""
    row = {"verifier": "math", "answer": "7.0", "error": "0.5", "response": "\\boxed{7.4}"}
    before = {**row, "verdict": None, "why": "x", "seconds": None}
    old = exact("a", "a", verdict=None, why="x", seconds=None, error="not judged")
    file = write(tmp_path / "in.jsonl", [row, {**row, "error": "0.1"}, {**before, "fault": "not judged"}, old])
    assert main([str(file)]) == 0
    found = read(tmp_path / "in.judged.jsonl")
    assert [line["verdict"] for line in found] == ["right", "wrong", "right", "right"]
    assert [line.get("error") for line in found] == ["0.5", "0.1", "0.5", None]
    assert not any("fault" in line for line in found)
    again = tmp_path / "again.jsonl"
    assert main([str(tmp_path / "in.judged.jsonl"), "--out", str(again)]) == 0
    assert [line["verdict"] for line in read(again)] == ["right", "wrong", "right", "right"]


def test_a_line_that_is_too_long_is_one_bad_line(tmp_path: Path, monkeypatch, capsys) -> None:
    from cipo_fast import answers

    monkeypatch.setattr(answers, "MAX_LINE", 1000)
    long = b'{"verifier": "exact", "answer": "a", "response": "' + b"a" * 5_000_000 + b'"}'
    file = write(tmp_path / "in.jsonl", [exact("a", "a"), long, exact("a", "a")])
    assert main([str(file)]) == 2
    found = read(tmp_path / "in.judged.jsonl")
    assert [line["verdict"] for line in found] == ["right", None, "right"]
    assert len(str(found[1])) < 1000
    assert f"{file}:2: a line of 5,00" in capsys.readouterr().err


def test_a_folder_is_not_made_for_out(tmp_path: Path, capsys) -> None:
    file = write(tmp_path / "in.jsonl", [exact("a", "a")])
    assert main([str(file), "--out", str(tmp_path / "no" / "o.jsonl")]) == 2
    assert "no folder" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
