"""A run's life: begun, ended by a signal or killed, gone on with; one at a time in its folder."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from test_train import (
    SMALL,
    TRAIN_PY,
    assert_equal_weights,
    command,
    environment,
    metrics,
    run_dir,
    timeless,
    train,
    wait_for_lines,
)

from cipo_fast import run_dir as life
from cipo_fast import train as train_module
from cipo_fast.checkpoint import Checkpoints, Progress
from cipo_fast.cipo.replay import ReplayState
from cipo_fast.config import Config, load_config
from cipo_fast.errors import Preempted, UserError
from cipo_fast.recorder import Recorder
from cipo_fast.run_dir import Opened, decide, inputs_of, locked

TORCHRUN = Path(sys.executable).with_name("torchrun")
ENDLESS = "train.steps=1000000"


# ----------------------------------------------------------------------------------------------- real ends of processes


def test_a_warm_start_ends_between_its_steps(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    args = command(folder, "train.steps=1", "model.embedded.warm_steps=100000", "model.embedded.warm_accuracy=1")
    with subprocess.Popen(args, env=environment(), stdout=-1, stderr=-1, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("warm start: "):
                break
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=100)[1]
    assert process.returncode == Preempted.exit_code
    assert "stopped by SIGTERM; the same command goes on\n" in said


def test_a_warm_start_that_falls_short_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And a function's name is looked for before it."""
    folder = tmp_path / "run"
    assert train(folder, "train.steps=0", "model.embedded.warm_steps=5", "model.embedded.warm_accuracy=1") == 0
    assert (
        "warm start: its steps are over, and 0.000 is below model.embedded.warm_accuracy=1" in capsys.readouterr().out
    )
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "answer": "b"}\n' * 9)
    (tmp_path / "v.py").write_text("def right(response, row):\n    return True\n")
    own = (f"data.train={tmp_path}/a.jsonl", f"data.verifier={tmp_path}/v.py:rihgt")
    assert train(tmp_path / "own", *own) == 2
    printed = capsys.readouterr()
    assert "warm start" not in printed.out
    assert printed.err == f"error: verifier {tmp_path}/v.py:rihgt: {tmp_path}/v.py defines no function rihgt\n"


def test_sigterm_ends_the_step_and_the_same_command_goes_on(
    tmp_path: Path, warm: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """... and while the run lives no other one enters its folder."""
    monkeypatch.setattr(life, "LOCK_WAIT_S", 0.0)
    folder, straight = run_dir(tmp_path, warm), run_dir(tmp_path, warm, "straight")
    with subprocess.Popen(
        command(folder, ENDLESS, "checkpoint.every=0"), env=environment(), stdout=-3, stderr=-1, text=True
    ) as process:
        wait_for_lines(folder / "metrics.jsonl", 3, process)  # type: ignore[arg-type]
        assert train(folder, "optim.lr=1e-4") == 2
        error = capsys.readouterr().err
        assert f"in use by pid {process.pid} on {socket.gethostname()} since " in error
        assert error.count("\n") == 1
        assert not (folder / "previous").exists()
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=100)[1]
    assert process.returncode == Preempted.exit_code
    done = len(metrics(folder))
    assert f"stopped by SIGTERM; saved as {folder}/checkpoints/step-{done}; the same command goes on\n" in said
    assert [p.name for p in (folder / "checkpoints").iterdir()] == [f"step-{done}"]
    assert not (folder / "lock").exists()
    started = (folder / "config.yaml").read_text()

    steps = f"train.steps={done + 2}"
    assert train(folder, steps, "checkpoint.every=0", "sync.probe_every=2") == 0
    printed = capsys.readouterr().out
    assert f"changed: train.steps: 1000000 -> {done + 2}" in printed
    assert f"resumed after step {done}" in printed
    assert (folder / "config.yaml").read_text() == started
    assert f"steps: {done + 2}" in (folder / f"config-from-step-{done}.yaml").read_text()
    assert train(straight, steps, "checkpoint.every=0") == 0
    assert_equal_weights(folder, straight)
    assert [{k: v for k, v in row.items() if "parity" not in k} for row in timeless(metrics(folder))] == [
        {k: v for k, v in row.items() if "parity" not in k} for row in timeless(metrics(straight))
    ]

    # That run has ended: the same command begins anew, and nothing of the old one is lost.
    assert train(folder, steps, "checkpoint.every=0", "train.steps=0") == 0
    (aside,) = (folder / "previous").iterdir()
    assert len(metrics(aside)) == done + 2
    assert {p.name for p in aside.iterdir()} >= {"config.yaml", f"config-from-step-{done}.yaml", "inputs.json", "model"}


def workers(torchrun: int) -> dict[int, int]:
    """{rank: process} of a torchrun on this machine."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if int((path / "stat").read_text().rsplit(")", 1)[1].split()[1]) == torchrun:
                found[int((path / "environ").read_bytes().split(b"\0RANK=")[1].split(b"\0")[0])] = int(path.name)
        except (OSError, IndexError):
            continue
    return found


def test_torchrun_restarts_a_killed_worker_from_the_newest_checkpoint(
    tmp_path: Path, warm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two ranks. One is killed: torchrun starts both again, and they go on. Then one alone is signalled: both save."""
    folder = run_dir(tmp_path, warm)
    arguments = [*SMALL, f"run.dir={folder}", "train.pack_tokens=256", ENDLESS, "checkpoint.every=2"]
    log = (tmp_path / "log").open("w")
    with subprocess.Popen(
        [TORCHRUN, "--standalone", "--nproc-per-node=2", "--max-restarts=1", TRAIN_PY, *arguments],
        env=environment(), stdout=log, stderr=log, cwd=tmp_path,
    ) as process:  # fmt: skip
        wait_for_lines(folder / "metrics.jsonl", 5, process)
        started = (folder / "config.yaml").read_text()
        os.kill(workers(process.pid)[1], signal.SIGKILL)
        deadline = time.monotonic() + 100
        while "resumed after step" not in (tmp_path / "log").read_text():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        wait_for_lines(folder / "metrics.jsonl", 9, process)
        os.kill(workers(process.pid)[1], signal.SIGUSR1)
        assert process.wait(100) == 1  # torchrun's own; the ranks' is in its report
    text = (tmp_path / "log").read_text()
    assert text.count("stopped by SIGUSR1; saved as ") == 1
    assert f"exitcode  : {Preempted.exit_code}" in text
    rows = metrics(folder)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert (folder / "checkpoints" / f"step-{len(rows)}" / "manifest.json").exists()
    assert not (folder / "previous").exists()
    assert (folder / "config.yaml").read_text() == started
    # Another number of ranks is a named difference, and no obstacle.
    assert train(folder, "train.pack_tokens=256", f"train.steps={len(rows) + 1}", "checkpoint.every=2") == 0
    assert "changed: ranks: 2 -> 1" in capsys.readouterr().out


def test_what_one_rank_finds_wrong(tmp_path: Path) -> None:
    """Only the rank whose pack is not finite keeps it; a first rank that fails at writing stops both."""
    script = Path(__file__).with_name("on_two_ranks.py")
    done = subprocess.run(
        [TORCHRUN, "--standalone", "--nproc-per-node=2", script],
        env=environment(),
        timeout=250,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("agreed") == 2


# ------------------------------------------------------------------------------------------------------ within the run


def test_a_signal_while_evaluating_loses_no_step(
    tmp_path: Path, warm: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, evaluate, at = run_dir(tmp_path, warm), train_module.evaluate, [1]
    evaluated: list[int] = []

    def signalled(*args: object) -> object:
        at[0] -= 1
        if at[0] == 0:
            os.kill(os.getpid(), signal.SIGINT)
        result = evaluate(*args)  # type: ignore[arg-type]
        evaluated.append(1)
        return result

    monkeypatch.setattr(train_module, "evaluate", signalled)
    args = ["train.steps=4", "eval.every=2", "checkpoint.every=0"]
    assert train(folder, *args) == Preempted.exit_code  # before training
    assert "stopped by SIGINT; the same command" in capsys.readouterr().err
    assert not (folder / "checkpoints").exists()
    at[0] = 2
    assert train(folder, *args) == Preempted.exit_code  # the one after step 2
    assert evaluated == [1]
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step-2"]
    assert train(folder, *args) == 0
    assert evaluated == [1, 1, 1]  # that one again, and the last
    assert [row["step"] for row in metrics(folder)] == [1, 2, 3, 4]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path, warm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cipo_fast import preemption

    monkeypatch.setattr(preemption, "AGAIN_S", -1.0)

    def twice(*_: object) -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(train_module, "evaluate", twice)
    assert train(run_dir(tmp_path, warm), "train.steps=1") == 130


def test_a_checkpoint_that_cannot_be_written_stops_a_run_at_its_end_only(
    tmp_path: Path, warm: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, publish = run_dir(tmp_path, warm), Checkpoints._publish

    def full(self: Checkpoints, part: Path, final: Path, files: dict) -> None:
        if final.name in failing:
            raise OSError(28, "No space left on device")
        publish(self, part, final, files)

    failing = {"step-2"}
    monkeypatch.setattr(Checkpoints, "_publish", full)
    args = ["train.steps=4", "checkpoint.every=1", "checkpoint.keep=9"]
    assert train(folder, *args) == 0
    assert (
        "step-2 cannot be saved (OSError: [Errno 28] No space left on device); the run goes on"
        in capsys.readouterr().out
    )
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step-1", "step-3", "step-4"]
    failing.add("step-4")
    assert train(folder, *args) == 1
    error = capsys.readouterr().err
    assert "step-4 cannot be saved" in error
    assert error.count("\n") == 1
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step-1", "step-3"]
    failing.clear()
    assert train(folder, *args) == 0  # from step 3
    assert [row["step"] for row in metrics(folder)] == [1, 2, 3, 4]


def test_metrics_that_cannot_be_written_stop_the_run_saved(
    tmp_path: Path, warm: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, step = run_dir(tmp_path, warm), Recorder.step

    def full(self: Recorder, metrics: dict, *more: object) -> None:
        if metrics["step"] == 2:
            raise OSError(28, "No space left on device")
        step(self, metrics, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(Recorder, "step", full)
    assert train(folder) == 1
    error = capsys.readouterr().err
    assert "cannot be written ([Errno 28] No space left on device); saved as " in error
    assert error.count("\n") == 1


# ---------------------------------------------------------------------------------------------------- go on, or anew


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def config_of(folder: Path, *args: str) -> Config:
    rows = "".join(f'{{"prompt": "q{i}", "answer": "{i}"}}\n' for i in range(3))
    data = folder.parent / "a.jsonl"
    if not data.exists():
        write(data, rows)
    return load_config([], [f"run.dir={folder}", f"data.train={data}", "run.view=plain", "model.path=hub/model", *args])


@pytest.fixture
def unfinished(tmp_path: Path) -> Path:
    """The folder of a run on two ranks that was ended after its checkpoint of step 5."""
    folder = tmp_path / "run"
    config = config_of(folder)
    write(folder / "checkpoints" / "step-5" / "state.json", "{}")
    write(folder / "config.yaml", config.to_yaml())
    write(folder / "inputs.json", json.dumps(inputs_of(config, 2)))
    return folder


def opened(folder: Path, *args: str, ranks: int = 2) -> Opened:
    config = config_of(folder, *args)
    return decide(config, inputs_of(config, ranks))


def test_auto_goes_on_with_the_same_and_begins_anew_otherwise(unfinished: Path) -> None:
    found = opened(unfinished)
    assert (found.resume, found.changed, found.lines) == (True, False, ())
    assert not opened(unfinished, "checkpoint.resume=false").resume
    write(unfinished / "summary.json", "{}")
    assert not opened(unfinished).resume
    assert opened(unfinished, "checkpoint.resume=true").resume  # a finished run, prolonged


@pytest.mark.parametrize("resume", ["auto", "true"])
def test_nothing_to_go_on_from(resume: str, tmp_path: Path) -> None:
    write(tmp_path / "run" / "checkpoints" / "step-2.part" / "state.json", "{}")
    if resume == "auto":
        assert opened(tmp_path / "run") == Opened(False, inputs_of(config_of(tmp_path / "run"), 2))
    else:
        with pytest.raises(UserError, match=r"no checkpoint in .*start without it"):
            opened(tmp_path / "run", "checkpoint.resume=true")


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("optim.lr=1e-5", "optim.lr: 1e-06 -> 1e-05"),
        ("seed=1", "seed: 0 -> 1"),
        ("loss.beta=0.1", "loss.beta: 0.0 -> 0.1"),
        ("correction.lambda_corr=0", "correction.lambda_corr: 1.0 -> 0.0"),
        ("rollout.samples_per_prompt=4", "rollout.samples_per_prompt: 8 -> 4"),
        ("rollout.engine=vllm", "rollout.engine: local -> vllm"),
        ("rollout.vllm.args={max_num_batched_tokens: 64}", "rollout.vllm.args.max_num_batched_tokens: None -> 64"),
        ("eval.samples=4", "eval.samples: 8 -> 4"),
        ("model.dtype=bfloat16", "model.dtype: float32 -> bfloat16"),
        ("optim.schedule=cosine", "optim.schedule: constant -> cosine"),
    ],
)
def test_what_changes_the_run_is_named_and_not_gone_on_with(setting: str, named: str, unfinished: Path) -> None:
    settings = [setting, "train.steps=77", "sync.probe_every=9"]  # the others do not count
    if "schedule" in setting:
        settings.pop(1)
    found = opened(unfinished, *settings)
    assert not found.resume
    assert f"set aside under previous/: {named}" in found.lines[0]
    with pytest.raises(UserError, match="allow_changes") as error:
        opened(unfinished, *settings, "checkpoint.resume=true")
    assert named in str(error.value)
    assert "sync" not in str(error.value)
    found = opened(unfinished, *settings, "checkpoint.allow_changes=true")
    assert found.resume
    assert found.changed
    assert f"changed: {named}" in found.lines


@pytest.mark.parametrize("resume", ["auto", "true"])
def test_what_does_not_change_the_run_is_named_and_accepted(resume: str, unfinished: Path) -> None:
    settings = ["run.view=live", "run.trackers=[]", "checkpoint.every=7", "eval.every=3", "train.steps=900",
                "rollout.server.port=8200", "rollout.server.timeout_s=60", "train.pack_tokens=32768",
                "sync.tolerance=0.1", "checkpoint.keep=3"]  # fmt: skip
    found = opened(unfinished, *settings, f"checkpoint.resume={resume}", ranks=4)
    assert found.resume
    assert len(found.lines) == len(settings) + 1
    assert "changed: ranks: 2 -> 4" in found.lines
    assert "changed: run.view: plain -> live" in found.lines


def test_steps_are_part_of_a_schedule_that_ends(unfinished: Path) -> None:
    write(unfinished / "config.yaml", config_of(unfinished, "optim.schedule=linear").to_yaml())
    assert opened(unfinished, "optim.schedule=linear").resume
    with pytest.raises(UserError, match=r"train\.steps: 500 -> 501"):
        opened(unfinished, "optim.schedule=linear", "train.steps=501", "checkpoint.resume=true")


def test_fewer_steps_than_are_done(unfinished: Path) -> None:
    with pytest.raises(UserError, match=r"at step 5, beyond train\.steps=4"):
        opened(unfinished, "train.steps=4")


def test_data_of_another_content_is_a_difference_and_another_name_is_not(unfinished: Path) -> None:
    data = unfinished.parent / "a.jsonl"
    moved = write(unfinished.parent / "moved.jsonl", data.read_text())
    found = opened(unfinished, f"data.train={moved}", "checkpoint.resume=true")
    assert found.resume
    assert found.changed
    write(data, data.read_text().replace('"2"', '"3"'))  # as long as before
    assert not opened(unfinished).resume
    with pytest.raises(UserError, match=r"data\.train content: "):
        opened(unfinished, "checkpoint.resume=true")


def test_a_model_folder_of_another_content_is_a_difference(unfinished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = unfinished.parent / "model"
    write(model / "config.json", "{}")
    (model / "model.safetensors").write_bytes(bytes(1000))
    keys = [f"model.path={model}"]
    before = config_of(unfinished, *keys)
    monkeypatch.setattr(life, "WHOLE", 100)
    write(unfinished / "config.yaml", before.to_yaml())
    write(unfinished / "inputs.json", json.dumps(inputs_of(before, 2)))
    assert opened(unfinished, *keys).resume
    (model / "model.safetensors").write_bytes(bytes(999) + b"x")
    assert "model.path content" in opened(unfinished, *keys).lines[0]


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda p: p.unlink(), "No such file"),
        (lambda p: p.write_text("a: [1"), "not the settings of a run"),
        (lambda p: p.write_text("- 1\n- 2\n"), "expected keys"),
        (lambda p: p.write_bytes(b"\xff\xfe\x00"), "not the settings of a run"),
        (lambda p: p.write_text("rollout:\n  group_size: 4\n"), "rollout.group_size"),
    ],
)
def test_settings_that_cannot_be_read(spoil: Callable[[Path], object], why: str, unfinished: Path) -> None:
    spoil(unfinished / "config.yaml")
    for resume in ("auto", "true"):
        with pytest.raises(UserError, match=why) as error:
            opened(unfinished, f"checkpoint.resume={resume}")
        assert "\n" not in str(error.value)
    assert opened(unfinished, "checkpoint.allow_changes=true").resume


def test_a_run_is_compared_with_what_it_last_went_on_with(unfinished: Path) -> None:
    changed = config_of(unfinished, "optim.lr=1e-5")
    life.enter(changed, Opened(True, inputs_of(changed, 2), changed=True), 5)
    assert (opened(unfinished, "optim.lr=1e-5").lines, opened(unfinished).resume) == ((), False)
    assert "lr: 1.0e-06" in (unfinished / "config.yaml").read_text()


def test_going_on_forgets_what_came_after(unfinished: Path) -> None:
    rows = [json.dumps({"step": i}) for i in range(1, 8)]
    write(unfinished / "metrics.jsonl", "\n".join([*rows[:6], "\0\0\0", rows[6]]) + "\n" + '{"step": 8, "se')
    write(unfinished / "rollouts" / "step-00005.jsonl", "")
    write(unfinished / "rollouts" / "step-00006.jsonl", "")
    for name in ("step-00005", "step-00006", "step-00010-n64", "model-n64"):
        write(unfinished / "evaluations" / name / "samples.jsonl", "")
    write(unfinished / "summary.json", "{}")
    config = config_of(unfinished)
    life.enter(config, Opened(True, {}), 5)
    assert (unfinished / "metrics.jsonl").read_text() == "\n".join(rows[:5]) + "\n"
    assert [p.name for p in (unfinished / "rollouts").iterdir()] == ["step-00005.jsonl"]
    assert {p.name for p in (unfinished / "evaluations").iterdir()} == {"step-00005", "model-n64"}
    assert not (unfinished / "summary.json").exists()
    assert (unfinished / "summary-until-step-5.json").exists()
    assert not list(unfinished.glob("config-from*"))  # nothing has changed
    life.enter(config, Opened(False, {}), None)
    assert {p.name for p in unfinished.iterdir()} == {"previous", "config.yaml", "inputs.json"}


def test_a_step_that_is_evaluated_again_has_one_row(unfinished: Path) -> None:
    """As after a run that was killed between a row and its next checkpoint."""
    recorder = Recorder(config_of(unfinished))
    progress = [Progress(step, ReplayState(0.3)) for step in (0, 5)]
    recorder.evaluation({"t1": 0.1}, progress[0])
    recorder.evaluation({"t1": 0.2}, progress[1])
    recorder.evaluation({"t1": 0.3}, progress[1])
    rows = [json.loads(line) for line in (unfinished / "eval.jsonl").read_text().splitlines()]
    assert [(row["step"], row["eval/t1"]) for row in rows] == [(0, 0.1), (5, 0.3)]


# ------------------------------------------------------------------------------------------------------------ the lock


def test_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(life, "LOCK_WAIT_S", 0.0)
    folder = tmp_path / "a" / "b"
    with locked(folder):
        with pytest.raises(UserError, match=rf"b: in use by pid {os.getpid()} on .* since 20"), locked(folder):
            pass
        with pytest.raises(UserError, match="in use"), locked(folder):  # the refused one has not let go of it
            pass
    assert not (tmp_path / "a").exists()  # made for nothing
    write(folder / "lock", "pid 1 on elsewhere since 1970\n")  # left by a kill -9
    with locked(folder):
        write(folder / "config.yaml", "")
    assert [p.name for p in folder.iterdir()] == ["config.yaml"]
    with pytest.raises(UserError, match="cannot be written"), locked(write(tmp_path / "file", "") / "run"):
        pass
