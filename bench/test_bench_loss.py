"""The fused loss against its reference, forward and backward: `pytest bench/ --benchmark-only -k loss`.

Runs on CUDA where there is one. Every case is checked against the reference before it is timed.
"""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from cipo_kernels import LossOutput, fused_linear_cipo_loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLEMENTATIONS = ["reference", "torch", *(["triton"] if DEVICE == "cuda" else [])]
SHAPES = {  # targets, hidden size, vocabulary
    "vocab32k": (4096, 256, 32768),
    "embedded": (3000, 128, 261),  # the default training job
}


def make_inputs(shape: str) -> tuple[dict, dict]:
    n, width, vocab = SHAPES[shape]
    g = torch.Generator().manual_seed(0)
    leaves = {"hidden": torch.randn(n, width, generator=g), "weight": torch.randn(vocab, width, generator=g) * 0.2}
    rest = {
        "pred_index": torch.arange(n),
        "target_id": torch.randint(vocab, (n,), generator=g),
        "old_logp": None,
        "advantage": torch.randn(n, generator=g),
        "rl_weight": torch.full((n,), 1 / n),
        "ce_weight": torch.full((n,), 0.1 / n),
    }
    leaves = {k: v.to(DEVICE).requires_grad_() for k, v in leaves.items()}
    return leaves, {k: v if v is None else v.to(DEVICE) for k, v in rest.items()}


def step(leaves: dict, rest: dict) -> LossOutput:
    for leaf in leaves.values():
        leaf.grad = None
    out = fused_linear_cipo_loss(**leaves, **rest)
    out.loss.backward()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return out


def check(leaves: dict, rest: dict, impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves CIPO_KERNELS at impl. fp32 sums in another order: logp to 1e-5, gradients to 1e-4 of their largest."""
    results = []
    for name in ("reference", impl):
        monkeypatch.setenv("CIPO_KERNELS", name)
        out = step(leaves, rest)
        results.append((out.loss.detach(), out.logp, *(x.grad for x in leaves.values())))
    for i, (expected, actual) in enumerate(zip(*results, strict=True)):
        atol = 1e-5 if i < 2 else 1e-4 * expected.abs().max().item()
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_forward_and_backward(shape, impl, benchmark, monkeypatch):
    benchmark.group = f"loss {shape} {DEVICE}"
    leaves, rest = make_inputs(shape)
    check(leaves, rest, impl, monkeypatch)
    rounds = 3 if shape == "vocab32k" else 30
    benchmark.pedantic(step, args=(leaves, rest), rounds=rounds, warmup_rounds=1)


def peak_mib(shape: str) -> float:
    """Memory a step needs beyond its inputs, in MiB. On CPU that of the process, so call it in a fresh one."""
    leaves, rest = make_inputs(shape)
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(leaves, rest)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    before = _status_mib("VmRSS")
    step(leaves, rest)
    return _status_mib("VmHWM") - before  # ru_maxrss would start at the parent's


def _status_mib(key: str) -> float:
    return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) / 2**10


@pytest.mark.skipif(DEVICE == "cuda", reason="a bar of the CPU; bench/gpu/fused_loss.py has those of a GPU")
def test_loss_bar(benchmark, monkeypatch):
    """The bar: at most 25% of the reference's peak memory and 1.1 times its time. Times interleaved, best of each."""
    leaves, rest = make_inputs("vocab32k")
    check(leaves, rest, "torch", monkeypatch)
    peak, seconds = {}, {"reference": [], "torch": []}
    for impl in seconds:
        monkeypatch.setenv("CIPO_KERNELS", impl)
        child = subprocess.run([sys.executable, __file__, "vocab32k"], capture_output=True, text=True, check=True)
        peak[impl] = float(child.stdout)
    for _ in range(3):
        for impl, times in seconds.items():
            monkeypatch.setenv("CIPO_KERNELS", impl)
            start = time.perf_counter()
            step(leaves, rest)
            times.append(time.perf_counter() - start)
    benchmark.pedantic(step, args=(leaves, rest), rounds=1)
    time_ratio = min(seconds["torch"]) / min(seconds["reference"])
    memory_ratio = peak["torch"] / peak["reference"]
    benchmark.extra_info |= {"peak_mib": peak, "memory_ratio": memory_ratio, "time_ratio": time_ratio}
    print(f"peak MiB {peak}, memory ratio {memory_ratio:.3f}, time ratio {time_ratio:.3f}")
    assert memory_ratio <= 0.25
    assert time_ratio <= 1.1


if __name__ == "__main__":
    print(peak_mib(sys.argv[1]))
