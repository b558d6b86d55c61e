"""bench/gpu/fused_loss.py --smoke, which runs every method on tiny shapes: what a GPU will run has run before."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

SCRIPT = Path(__file__).parents[1] / "bench/gpu/fused_loss.py"
OURS = ["logits", "exp"]
LIGER = {"liger_grpo", "liger_scaled_cross_entropy", "liger_cross_entropy"}
PEERS = {"eager", "torch_linear_cross_entropy", "eager_compiled"}


def smoke(folder: Path, **environment: str) -> tuple[int, list[dict]]:
    """Exit status and lines."""
    environment = {**os.environ, "OUT": str(folder), "OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, "-W", "ignore", str(SCRIPT), "--smoke"]
    done = subprocess.run(command, env=environment, timeout=100, capture_output=True, text=True)
    [file] = folder.glob("*-fused_loss.json")
    assert file.read_text() == done.stdout, done.stderr
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


def test_smoke_runs_every_method(tmp_path: Path) -> None:
    status, (machine, *lines) = smoke(tmp_path)
    assert machine["torch"] == torch.__version__
    assert not [line for line in lines if "error" in line]
    assert status == 0
    times = [line for line in lines if line["what"] == "time"]
    checks = [line for line in lines if line not in times]
    assert all(line["ok"] for line in checks)
    assert [line["method"] for line in checks if line["what"] == "check_large"] == OURS
    expected = {*OURS, *PEERS, *(LIGER if importlib.util.find_spec("liger_kernel") else ())}
    expected |= {"quack_cross_entropy"} if importlib.util.find_spec("quack") else set()
    assert {line["method"] for line in checks} == {line["method"] for line in times} == expected | {"log_probs"}
    assert all(line["ms"] > 0 and line["floor_ms"] > 0 for line in times)


def test_a_case_that_fails_says_so_and_the_next_one_runs(tmp_path: Path) -> None:
    peer = tmp_path / "path/liger_kernel"
    peer.mkdir(parents=True)
    (peer / "__init__.py").touch()  # a Liger whose interface has moved
    status, lines = smoke(tmp_path, PYTHONPATH=str(peer.parent))
    errors = {line["method"]: line["error"] for line in lines if "error" in line}
    assert errors.keys() == LIGER
    assert not LIGER & {line["method"] for line in lines if line["what"] == "time"}
    assert all(error.startswith("ModuleNotFoundError: ") for error in errors.values())
    assert lines[-1]["method"] == "eager_compiled"
    assert "ms" in lines[-1]
    assert status == 0
