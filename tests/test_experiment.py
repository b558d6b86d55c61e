"""The grid's file, and the runner with very small real runs."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_train import SMALL

from cipo_fast import provenance, run_dir
from cipo_fast.config import configs_dir
from cipo_fast.experiment.__main__ import main
from cipo_fast.experiment.grid import changed_settings, read_grid

COMMAND = [sys.executable, "-m", "cipo_fast.experiment"]
FILE = """
name: small
about: What it is about.
settings: {{{settings}}}
seeds: [0, 1]
control: plain
arms:
  plain: {{configs: [grpo.yaml]}}
  ours: {{}}
"""


def write(path: Path, text: str = FILE, **more: str) -> str:
    given = dict(setting.split("=") for setting in SMALL) | more
    path.write_text(text.format(settings=", ".join(f"{key}: {value!r}" for key, value in given.items())))
    return str(path)


# ------------------------------------------------------------------------------------------------------------- the file


def test_every_arm_with_every_seed(tmp_path: Path) -> None:
    grid = read_grid(write(tmp_path / "small.yaml"), tmp_path / "out")
    assert [run.name for run in grid.runs] == ["plain-seed0", "ours-seed0", "plain-seed1", "ours-seed1"]
    last = grid.runs[-1]
    assert (last.config.seed, last.config.run.name, last.dir) == (1, "ours-seed1", tmp_path / "out" / "ours-seed1")
    assert last.config.correction.lambda_corr == 1.0
    assert grid.runs[0].config.correction.lambda_corr == 0.0
    assert "correction.lambda_corr" in changed_settings(grid.runs[0])
    assert not {"seed", "run.dir", "run.name"} & changed_settings(last).keys()


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("about:", "abuot:", "small.yaml:3: unknown key 'abuot': did you mean 'about'?"),
        ("control: plain", "", "small.yaml: no 'control', which has no default"),
        ("control: plain", "control: plian", "small.yaml: control=plian: no such arm; there are plain, ours"),
        ("[0, 1]", "[0, -1]", "small.yaml:5: seeds=-1: input should be greater than or equal to 0"),
        ("[0, 1]", "[0, 0]", "small.yaml: seeds: one is given twice"),
        ("ours: {{}}", "ours: {{settings: {{replay.tua: 1}}}}", "small.yaml: arm ours: unknown key 'replay.tua'"),
        ("ours: {{}}", "ours: {{configs: [none.yaml]}}", "small.yaml: arm ours: config file none.yaml: not found"),
        ("ours: {{}}", "ours: {{settings: {{seed: 3}}}}", "small.yaml: arms.ours.settings: seed is the grid's to set"),
        ("ours: {{}}", "ours/2: {{}}", "small.yaml:8: arms='ours/2': string should match"),
    ],
)
def test_files_that_are_refused(
    old: str, new: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([write(tmp_path / "small.yaml", FILE.replace(old, new)), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", sorted(path.name for path in (configs_dir() / "experiments").glob("*.yaml")))
def test_the_experiments_that_come_along(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their settings are taken, and no two arms are the same run."""
    monkeypatch.chdir(tmp_path)
    for made in ("words.jsonl", "hinted.jsonl", "runs/reads_hints/held_out.jsonl"):  # what their comments make first
        (tmp_path / made).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / made).touch()
    grid = read_grid(name)
    assert grid.out == Path("runs/experiments") / grid.experiment.name
    assert grid.experiment.name == Path(name).stem
    settings = {arm: changed_settings(grid.of(arm)[0]) for arm in grid.experiment.arms}
    same = [(a, b) for a in settings for b in settings if a < b and settings[a] == settings[b]]
    assert same == []


def test_a_dry_run_says_how_much_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([write(tmp_path / "small.yaml"), "--out", str(tmp_path / "out"), "--dry-run", "--jobs", "1"]) == 0
    shown = capsys.readouterr().out
    assert "plain (the control), 32 answers a step: correction.lambda_corr=0.0" in shown
    assert "ours, 64 answers a step: nothing more" in shown
    assert shown.count("python -m cipo_fast.train ") == 4
    assert "2 arms x 2 seeds = 4 runs" in shown
    assert f"to do: 8 steps, {2 * 2 * (32 + 64)} answers" in shown
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("args", [[], ["--help"], ["headline.yaml", "-h"]])
def test_help(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(args) == 0
    assert "--publish DIR" in capsys.readouterr().out


def test_a_report_is_not_of_other_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = write(tmp_path / "small.yaml"), tmp_path / "out"
    for run in read_grid(file, out).runs:
        run.dir.mkdir(parents=True)
        (run.dir / "config.yaml").write_text(run.config.to_yaml())
        (run.dir / "summary.json").write_text("{}")
    changed = write(tmp_path / "small.yaml", **{"replay.tau": "0.5"})
    assert main([changed, "--out", str(out), "--report"]) == 2
    assert "plain-seed0 has ended with other settings: replay.tau: 0.8 -> 0.5" in capsys.readouterr().err
    assert not (out / "results.md").exists()


def test_a_machine_that_does_not_answer_stops_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, body in (("nvidia-smi", "exec sleep 9"), ("git", "exit 1")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(provenance, "TIMEOUT_S", 0.2)
    assert provenance.machine()["gpu"] is None
    assert provenance.commit() is None


def test_kernels_of_another_checkout_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    commits = {"cipo_fast": "aaa", "cipo_kernels": "bbb"}
    monkeypatch.setattr(provenance, "_described", commits.__getitem__)
    assert provenance.commit() == "aaa, kernels of bbb"


def test_nothing_to_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([write(tmp_path / "small.yaml"), "--out", str(tmp_path / "out"), "--report"]) == 2
    assert "no run has ended yet" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------- the runner

RUN = """
name: small
about: What it is about.
settings: {{{settings}}}
seeds: [0]
control: ours
arms:
  ours: {{}}
  broken: {{settings: {{model.path: ./no-such-model}}}}
"""


def steps(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 200
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_grid_is_stopped_killed_and_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """SIGTERM: the run saves and ends. kill -9 of the runner: the run dies with it. The third command goes on from the
    newest checkpoint, reports the arm that cannot run, and compares what has ended."""
    monkeypatch.chdir(tmp_path)
    more = {
        "train.steps": "12", "eval.every": "6", "eval.problems": "4", "checkpoint.every": "1", "checkpoint.keep": "1",
        "checkpoint.export": "false", "model.embedded.warm_steps": "5",
    }  # fmt: skip
    file, out = write(tmp_path / "small.yaml", RUN, **more), tmp_path / "out"
    ours = out / "ours-seed0"

    @contextmanager
    def begin() -> Iterator[subprocess.Popen[str]]:
        command = [*COMMAND, file, "--out", str(out), "--jobs", "1"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as runner:
            try:
                yield runner
            finally:
                runner.kill()

    with begin() as runner:
        wait_until(lambda: steps(ours) >= 2, runner)
        runner.send_signal(signal.SIGTERM)
        shown, _ = runner.communicate(timeout=100)
    assert runner.returncode == 75
    assert "ours-seed0 has stopped at step" in shown
    stopped = steps(ours)
    assert 2 <= stopped < 12

    with begin() as runner:
        wait_until(lambda: steps(ours) >= stopped + 1, runner)
        pid = int((ours / "lock").read_text().split()[1])
        monkeypatch.setattr(run_dir, "LOCK_WAIT_S", 0.0)
        assert main([file, "--out", str(out)]) == 2  # a second runner
        assert is_running(pid)
        runner.kill()
        runner.wait()
    deadline = time.monotonic() + 5
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_running(pid)
    assert "--out=" in (told := capfd.readouterr().err)
    assert "in use by pid" in told
    assert not (ours / "summary.json").exists()

    with begin() as runner:
        shown, _ = runner.communicate(timeout=200)
    assert runner.returncode == 1
    assert "ours-seed0 has ended after" in shown
    assert "broken-seed0 failed at step 0" in shown
    assert "exit code 2:\n    error: data.train is not given" in shown
    assert "1 of 2 runs failed: broken-seed0" in capfd.readouterr().err
    rows = [json.loads(line) for line in (ours / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert "resumed after step" in (out / "ours-seed0.log").read_text()

    # What was computed is summed over all of the run's processes.
    evaluations = [json.loads(line) for line in (ours / "eval.jsonl").read_text().splitlines()]
    assert [row["step"] for row in evaluations] == [0, 6, 12]
    for row in evaluations:
        until = rows[: row["step"]]
        assert row["tokens/sampled"] == sum(r["tokens/sampled"] for r in until)
        assert row["flops/total"] == pytest.approx(sum(r["flops/sample"] + r["flops/train"] for r in until))
    assert all(r["flops/sample"] > 0 and r["flops/train"] > 0 for r in rows)

    text = (out / "results.md").read_text()
    assert "Not in it, since they have not ended: broken-seed0." in text
    (out / "results.md").unlink()
    assert main([file, "--out", str(out), "--report", "--publish", str(tmp_path / "docs")]) == 0
    assert (out / "results.md").read_text() == text == (tmp_path / "docs" / "results.md").read_text()

    # A run that has ended is not run again, nor taken for one with other settings.
    changed = write(tmp_path / "small.yaml", RUN, **{**more, "train.steps": "13"})
    assert main([changed, "--out", str(out)]) == 2
    assert "ours-seed0 has ended with other settings: train.steps: 12 -> 13" in capfd.readouterr().err
