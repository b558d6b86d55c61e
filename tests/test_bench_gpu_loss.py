"""bench/gpu/fused_loss.py --smoke, which runs every method on tiny shapes: what a GPU will run has run before."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import sweep as sweeps
import torch
from cipo_kernels.launch_configs import CONFIGS_FILE

SCRIPT = Path(__file__).parents[1] / "bench/gpu/fused_loss.py"
OURS = ["logits", "exp"]
LIGER = {"liger_grpo", "liger_scaled_cross_entropy", "liger_cross_entropy"}
PEERS = {"eager", "torch_linear_cross_entropy", "eager_compiled"}


def smoke(folder: Path, *options: str, **environment: str) -> tuple[int, list[dict]]:
    """Exit status and lines."""
    environment = {**os.environ, "OUT": str(folder), "OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, "-W", "ignore", str(SCRIPT), "--smoke", *options]
    done = subprocess.run(command, env=environment, timeout=100, capture_output=True, text=True)
    [file] = folder.glob("*-fused_loss*.json")
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


def test_smoke_of_a_sweep(tmp_path: Path) -> None:
    """Every kernel at its default and at two other configurations; the fastest is kept, in $OUT alone."""
    before = CONFIGS_FILE.read_text()
    status, (_, *lines) = smoke(tmp_path, "--sweep")
    assert status == 0
    kernels = ("exp_gemm", "logp_gemm", "row_kernel")
    tried = [line for line in lines if line["what"] == "sweep"]
    assert [line["kernel"] for line in tried] == [kernel for kernel in kernels for _ in range(3)]
    assert all(line["ok"] and line["ms"] > 0 for line in tried)
    fastest = {line["kernel"]: line["config"] for line in lines if line["what"] == "fastest"}
    written = json.loads((tmp_path / CONFIGS_FILE.name).read_text())["cpu"]
    assert written.pop("source").keys() == {"fused_loss.py"}
    assert written == fastest
    assert fastest.keys() == set(kernels)
    for kernel, config in fastest.items():
        of_kernel = [line for line in tried if line["kernel"] == kernel]
        assert config == min(of_kernel, key=lambda line: line["ms"])["config"]
    assert CONFIGS_FILE.read_text() == before


def test_a_sweep_keeps_neither_what_fails_nor_what_is_wrong(monkeypatch) -> None:
    monkeypatch.setattr(sweeps, "launch_configs", lambda: configs)
    configs: dict = {"cpu": {"kernel": {"m": 9}}}
    right = torch.tensor([[1.0, 2.0], [1e-4, 0.0], [0.0, 3.0]])
    lost = right * torch.tensor([[1.0], [0.0], [1.0]])

    def run() -> list[torch.Tensor]:
        m = configs["cpu"].get("kernel", {}).get("m", 1)
        if m == 3:
            raise RuntimeError("out of resource")
        return [lost if m == 2 else right]

    def milliseconds(run) -> float:
        return 5.0 - configs["cpu"]["kernel"].get("m", 1)

    candidates = [{"m": 2}, {"m": 3}, {"m": 4}]
    lines = list(sweeps.sweep("kernel", candidates, run, milliseconds, "cpu"))
    assert [line.get("ok") for line in lines[:4]] == [True, False, None, True]
    assert lines[2]["error"] == "RuntimeError: out of resource"
    assert lines[-1]["config"] == configs["cpu"]["kernel"] == {"m": 4}


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
