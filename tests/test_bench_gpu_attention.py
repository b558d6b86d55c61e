"""bench/gpu/tree_attention.py at its tiny shapes: every case runs, errors are those of fp16, files are written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "bench" / "gpu" / "tree_attention.py"
RATES = Path(__file__).parents[1] / "kernels" / "device_rates.json"


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the script itself is the test there")
def test_smoke(tmp_path):
    pytest.importorskip("triton")
    before = RATES.read_text(encoding="utf-8")
    env = os.environ | {"OUT": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", SCRIPT, "--smoke"]
    records = list(map(json.loads, subprocess.check_output(command, env=env, text=True, timeout=120).splitlines()))

    assert [r for r in records if "error" in r] == []
    ran = {(r["case"], r.get("implementation")) for r in records}
    assert {("correctness", name) for name in ("triton", "flash", "flex")} <= ran
    timed = {(r["implementation"], r["ragged"]) for r in records if r["case"] == "attention"}
    assert timed == {(name, r) for name in ("triton", "flash", "flex", "varlen", "cudnn") for r in (False, True)}
    assert {("stack", name) for name in ("triton", "flash", "varlen", "linear")} <= ran
    checked = [r for r in records if r["case"] == "correctness"]
    eps = torch.finfo(torch.float16).eps
    assert all(r[what]["error"] < eps for r in checked for what in ("o", "dq", "dk", "dv") if what in r)

    (written,) = tmp_path.glob("cpu-*-tree_attention.json")
    assert json.loads(written.read_text()) == records
    assert json.loads((tmp_path / RATES.name).read_text())["cpu"] == records[-1]["rates"]
    assert RATES.read_text(encoding="utf-8") == before
