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
PEERS = {"eager", "liger_grpo", "liger_cross_entropy", "torch_linear_cross_entropy", "eager_compiled"}


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
    checks, times = lines[:2], lines[2:]
    assert [(line["what"], line["method"], line["ok"]) for line in checks] == [("check", impl, True) for impl in OURS]
    expected = {*OURS, *PEERS}
    if importlib.util.find_spec("liger_kernel") is None:
        expected -= {"liger_grpo", "liger_cross_entropy"}
    assert {line["method"] for line in times} == expected
    assert all(line["what"] == "time" and line["ms"] > 0 and line["floor_ms"] > 0 for line in times)


def test_a_case_that_fails_says_so_and_the_next_one_runs(tmp_path: Path) -> None:
    peer = tmp_path / "path/liger_kernel"
    peer.mkdir(parents=True)
    (peer / "__init__.py").touch()  # a Liger whose interface has moved
    status, lines = smoke(tmp_path, PYTHONPATH=str(peer.parent))
    errors = {line["method"]: line["error"] for line in lines if "error" in line}
    assert errors.keys() == {"liger_grpo", "liger_cross_entropy"}
    assert all(error.startswith("ModuleNotFoundError: ") for error in errors.values())
    assert lines[-1]["method"] == "eager_compiled"
    assert "ms" in lines[-1]
    assert status == 0
