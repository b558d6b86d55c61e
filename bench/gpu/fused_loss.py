"""The fused loss on one GPU: is it right, how fast, in how much memory. One JSON line a measurement, on stdout.

    python bench/gpu/fused_loss.py > bench/results/fused_loss_<machine>.jsonl        # some minutes; torch and triton

First log-probs and gradients against fp64, then forward + backward of one call. `floor` is three bare bf16 GEMMs of
the call's shapes; every method is timed in turn with it, in one process, and `of_floor` is floor time / own time.
`predicted_ms` is what we expected before any run: see `predict`. Peers that are not installed are left out.
Without a GPU the same code runs tiny shapes under Triton's interpreter: a check of this file, its times mean nothing.
"""

import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"
os.environ["CIPO_KERNELS"] = "triton"
if importlib.util.find_spec("cipo_kernels") is None:  # not installed: the folder kernels/ is the package
    package = Path(__file__).resolve().parents[2] / "kernels"
    spec = importlib.util.spec_from_file_location("cipo_kernels", package / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    sys.modules["cipo_kernels"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["cipo_kernels"])

from cipo_kernels import fused_linear_cipo_loss  # noqa: E402

VOCAB = 151936 if CUDA else 300
SHAPES = [(n, h) for h in (2560, 4096) for n in (8192, 16384, 32768)] if CUDA else [(6, 32)]  # targets, hidden size
CHECKED = (256, 2560) if CUDA else (6, 32)
ROUNDS = 5 if CUDA else 1
SEQUENCE = 1024 if CUDA else 3  # targets a row, for peers that want rows
EPS_LOW, EPS_HIGH = 0.2, 0.28


def make_case(n: int, width: int) -> dict[str, Tensor]:
    """Logits as a trained model's: the target is 8 to 30 above noise, its probability between near 0 and near 1."""
    g = torch.Generator(DEVICE).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device=DEVICE)

    weight = (normal(VOCAB, width) / width**0.5).bfloat16()
    target = torch.randint(VOCAB, (n,), generator=g, device=DEVICE)
    peak = 8 + 22 * torch.rand(n, 1, generator=g, device=DEVICE)
    case = {"hidden": (1.5 * normal(n, width) + peak * weight[target]).bfloat16(), "weight": weight}
    return case | {
        "pred_index": torch.arange(n, device=DEVICE),
        "target_id": target,
        "old_logp": -4 * torch.rand(n, generator=g, device=DEVICE),
        "advantage": normal(n),
        "rl_weight": torch.full((n,), 1 / n, device=DEVICE),
        "ce_weight": torch.zeros(n, device=DEVICE),
    }


# ---- methods: case, its two leaves already set -> loss


def ours(impl: str) -> Callable[[dict], Tensor]:
    return lambda case: fused_linear_cipo_loss(**case, eps_low=EPS_LOW, eps_high=EPS_HIGH, impl=impl).loss


def eager(case: dict, gemm: torch.dtype = torch.bfloat16, softmax: torch.dtype = torch.float32) -> Tensor:
    """What trainers do without a fused head: bf16 logits, upcast for the log-softmax."""
    z = (case["hidden"][case["pred_index"]].to(gemm) @ case["weight"].to(gemm).T).to(softmax)
    return clipped_loss(z.log_softmax(-1).gather(1, case["target_id"][:, None])[:, 0], case)


def clipped_loss(logp: Tensor, case: dict) -> Tensor:
    q, a = (logp - case["old_logp"]).exp(), case["advantage"]
    return -(case["rl_weight"] * torch.minimum(q * a, q.clamp(1 - EPS_LOW, 1 + EPS_HIGH) * a)).sum()


def torch_linear_cross_entropy(case: dict) -> Tensor:
    return F.linear_cross_entropy(case["hidden"], case["weight"], case["target_id"])


def liger_methods() -> dict[str, Callable[[dict], Tensor]]:
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError:
        return {}

    def grpo(case: dict) -> Tensor:
        rows = (-1, SEQUENCE)
        hidden, ids = case["hidden"].view(*rows, case["hidden"].shape[1]), case["target_id"].view(rows)
        loss = LigerFusedLinearGRPOLoss(beta=0.0, epsilon_low=EPS_LOW, epsilon_high=EPS_HIGH, use_ref_model=False)
        return loss(
            _input=hidden,
            lin_weight=case["weight"],
            selected_token_ids=ids,
            attention_mask=torch.ones_like(ids),
            advantages=case["advantage"].view(rows)[:, 0],
            old_per_token_logps=case["old_logp"].view(rows),
        )[0]

    def cross_entropy(case: dict) -> Tensor:
        return LigerFusedLinearCrossEntropyLoss()(case["weight"], case["hidden"], case["target_id"])

    return {"liger_grpo": grpo, "liger_cross_entropy": cross_entropy}


def methods(n: int) -> dict[str, Callable[[dict], Tensor]]:
    found = {"logits": ours("logits"), "exp": ours("exp"), "eager": eager}
    if CUDA and n == 8192:  # compiling costs half a minute a shape
        found["eager_compiled"] = torch.compile(eager, dynamic=False)
    if hasattr(F, "linear_cross_entropy"):
        found["torch_linear_cross_entropy"] = torch_linear_cross_entropy
    return found | (liger_methods() if CUDA else {})


def step(method: Callable[[dict], Tensor], case: dict) -> list[Tensor]:
    """Forward and backward: gradients of hidden and weight."""
    leaves = [case["hidden"].detach().requires_grad_(), case["weight"].detach().requires_grad_()]
    return list(torch.autograd.grad(method(case | dict(zip(("hidden", "weight"), leaves, strict=True))), leaves))


class Floor:
    """The three GEMMs, 8192 targets at a time."""

    def __init__(self, case: dict) -> None:
        self.chunks, self.weight = case["hidden"].split(8192), case["weight"]
        self.z = torch.empty(len(self.chunks[0]), VOCAB, dtype=torch.bfloat16, device=DEVICE)
        self.dx, self.dw = torch.empty_like(self.chunks[0]), torch.empty_like(self.weight)

    def __call__(self) -> None:
        for x in self.chunks:
            torch.mm(x, self.weight.T, out=self.z)
            torch.mm(self.z, self.weight, out=self.dx)
            torch.mm(self.z.T, x, out=self.dw)


# ---- measuring


def milliseconds(run: Callable[[], object]) -> float:
    if CUDA:
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if CUDA:
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start)


def peak_gib(run: Callable[[], object]) -> float | None:
    """Memory beyond what was there before, gradients included."""
    if not CUDA:
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def predict(method: str, n: int, width: int) -> dict:
    """FLOPs, bytes of the pass over the logits, and the time they take where we know the chip.

    Assumed: cuBLAS at 790 TFLOP/s, Triton's GEMM at 80% of that, 90% of the memory's bandwidth, nothing overlapping.
    The pass reads fp32 logits twice and writes bf16 once; `exp` has none. dW in fp32 is read and written once a chunk,
    within its GEMM.
    """
    chips = {"H100": 3.35e12, "H200": 4.8e12}  # bytes/s, SXM
    name = torch.cuda.get_device_name() if CUDA else ""
    bandwidth = next((b for chip, b in chips.items() if chip in name), None)
    gemm_flops, pass_bytes = 2 * n * width * VOCAB, n * VOCAB * 10 if method == "logits" else 0
    facts = {"flops": 3 * gemm_flops, "pass_bytes": pass_bytes}
    if bandwidth is None:
        return facts | {"predicted_ms": None}
    gemms = 3 if method != "exp" else 2 + 1 / 0.8
    return facts | {"predicted_ms": 1000 * (gemms * gemm_flops / 790e12 + pass_bytes / (0.9 * bandwidth))}


def check() -> bool:
    """The bars: log-prob within 1e-5 of fp64 from the same inputs; gradient error at most twice eager's."""
    n, width = CHECKED
    case = make_case(n, width)
    exact_z = case["hidden"].double() @ case["weight"].double().T
    exact_logp = exact_z.log_softmax(-1).gather(1, case["target_id"][:, None])[:, 0]
    del exact_z
    exact = step(lambda c: eager(c, torch.float64, torch.float64), case)
    baseline = [relative_error(d, e) for d, e in zip(step(eager, case), exact, strict=True)]
    good = True
    for impl in ("logits", "exp"):
        with torch.enable_grad():  # without, `exp` would run on the logits
            leaf = case | {"weight": case["weight"].detach().requires_grad_()}
            logp = fused_linear_cipo_loss(**leaf, eps_low=EPS_LOW, eps_high=EPS_HIGH, impl=impl).logp
        logp_error = (logp.double() - exact_logp).abs().max().item()
        errors = [relative_error(d, e) for d, e in zip(step(ours(impl), case), exact, strict=True)]
        ok = logp_error <= 1e-5 and all(d <= 2 * b for d, b in zip(errors, baseline, strict=True))
        good = good and ok
        print_line(what="check", method=impl, n=n, width=width, vocab=VOCAB, ok=ok, logp_error=logp_error,
                   gradient_errors=errors, eager_gradient_errors=baseline)  # fmt: skip
    return good


def relative_error(d: Tensor, exact: Tensor) -> float:
    return ((d.double() - exact).norm() / exact.norm()).item()


def measure(n: int, width: int) -> None:
    case = make_case(n, width)
    floor, failed = Floor(case), {}
    runs: dict[str, Callable[[], object]] = {"floor": floor}
    peak = {}
    for name, method in methods(n).items():
        runs[name] = lambda method=method: step(method, case)
        try:
            runs[name]()  # compiles
            peak[name] = peak_gib(runs[name])
        except Exception as error:  # out of memory, or a peer whose interface has moved: say so and go on
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            del runs[name]
            if CUDA:
                torch.cuda.empty_cache()
    floor()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            times[name].append(milliseconds(run))
    shape = {"n": n, "width": width, "vocab": VOCAB}
    for name in runs:
        ms = median(times[name])
        numbers = {"ms": ms, "of_floor": median(times["floor"]) / ms, "peak_gib": peak.get(name)}
        expected = predict(name, n, width) if name in ("floor", "logits", "exp") else {}
        print_line(what="time", method=name, **shape, **numbers, **expected)
    for name, error in failed.items():
        print_line(what="failed", method=name, **shape, error=error)


def print_line(**fields: object) -> None:
    print(json.dumps(fields), flush=True)


def main() -> None:
    import triton

    name = torch.cuda.get_device_name() if CUDA else "cpu, interpreted: times mean nothing"
    print_line(
        what="machine", device=name, torch=torch.__version__, triton=triton.__version__, date=time.strftime("%F")
    )
    if not check():
        sys.exit("a bar of correctness is missed: no time is worth measuring")
    for n, width in SHAPES:
        measure(n, width)
        if CUDA:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
