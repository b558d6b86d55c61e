"""The fused loss on one GPU: is it right, how fast, in how much memory. One process, one JSON line a case.

    python bench/gpu/fused_loss.py            # under 6 minutes; torch and triton, peers where they are installed
    python bench/gpu/fused_loss.py --smoke    # tiny shapes, on CPU under Triton's interpreter: a check of this file

The lines go to stdout and to bench/results/<device>-<date>-fused_loss.json, or into the folder $OUT; those of --smoke
only there. First log-probs and gradients against fp64. Then forward + backward of one call, for each method and shape:
its time, interleaved with that of the floor, three bare bf16 GEMMs of the call's shapes (`of_floor` is floor time / own
time), and its peak memory. Beside ours is what we expected before any run: see `predict`. A case that fails prints its
error, and the next one follows. Exit status 1: a bar of correctness is missed, or our own code failed.
"""

import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

START = time.perf_counter()
SMOKE, CUDA = "--smoke" in sys.argv, torch.cuda.is_available()
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

from cipo_kernels import LossOutput, fused_linear_cipo_loss  # noqa: E402

VOCAB = 300 if SMOKE else 151936
SHAPES = [(6, 32)] if SMOKE else [(n, h) for h in (2560, 4096) for n in (8192, 16384, 32768)]  # targets, hidden size
CHECKED = (6, 32) if SMOKE else (256, 2560)
ROUNDS = 1 if SMOKE else 5
SEQUENCE = 3 if SMOKE else 1024  # targets a row, for peers that want rows
LIMIT_S = 330  # no case begins later
EPS_LOW, EPS_HIGH = 0.2, 0.28
OURS = ("logits", "exp")


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
    return lambda case: our_loss(case, impl).loss


def our_loss(case: dict, impl: str, chunk_targets: int | Literal["auto"] = "auto") -> LossOutput:
    return fused_linear_cipo_loss(**case, eps_low=EPS_LOW, eps_high=EPS_HIGH, impl=impl, chunk_targets=chunk_targets)


def eager(case: dict, gemm: torch.dtype = torch.bfloat16, softmax: torch.dtype = torch.float32) -> Tensor:
    """What trainers do without a fused head: bf16 logits, upcast for the log-softmax."""
    z = (case["hidden"][case["pred_index"]].to(gemm) @ case["weight"].to(gemm).T).to(softmax)
    return clipped_loss(z.log_softmax(-1).gather(1, case["target_id"][:, None])[:, 0], case)


def clipped_loss(logp: Tensor, case: dict) -> Tensor:
    q, a = (logp - case["old_logp"]).exp(), case["advantage"]
    return -(case["rl_weight"] * torch.minimum(q * a, q.clamp(1 - EPS_LOW, 1 + EPS_HIGH) * a)).sum()


def torch_linear_cross_entropy(case: dict) -> Tensor:
    """In chunks: without options it is eager's."""
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(case["hidden"], case["weight"], case["target_id"], options=options)


def liger_grpo(case: dict) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    rows = (-1, SEQUENCE)
    hidden, ids = case["hidden"].view(*rows, case["hidden"].shape[1]), case["target_id"].view(rows)
    loss = LigerFusedLinearGRPOLoss(
        beta=0.0, epsilon_low=EPS_LOW, epsilon_high=EPS_HIGH, use_ref_model=False, compiled=CUDA
    )
    return loss(
        _input=hidden,
        lin_weight=case["weight"],
        selected_token_ids=ids,
        attention_mask=torch.ones_like(ids),
        advantages=case["advantage"].view(rows)[:, 0],
        old_per_token_logps=case["old_logp"].view(rows),
    )[0]


def liger_cross_entropy(case: dict) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(case["weight"], case["hidden"], case["target_id"])


def methods() -> dict[str, Callable[[dict], Tensor]]:
    found = {impl: ours(impl) for impl in OURS} | {"eager": eager}
    if importlib.util.find_spec("liger_kernel") is not None:
        found |= {"liger_grpo": liger_grpo, "liger_cross_entropy": liger_cross_entropy}
    if hasattr(F, "linear_cross_entropy"):
        found["torch_linear_cross_entropy"] = torch_linear_cross_entropy
    return found | {"eager_compiled": torch.compile(eager, backend="inductor" if CUDA else "aot_eager")}


def step(method: Callable[[dict], Tensor], case: dict) -> list[Tensor]:
    """Forward and backward: gradients of hidden and weight."""
    leaves = [case["hidden"].detach().requires_grad_(), case["weight"].detach().requires_grad_()]
    return list(torch.autograd.grad(method(case | dict(zip(("hidden", "weight"), leaves, strict=True))), leaves))


class Floor:
    """The three GEMMs, 8192 targets at a time."""

    def __init__(self, case: dict[str, Tensor]) -> None:
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


def own_bytes(method: str, n: int, width: int) -> int:
    """Bytes of all that runs beside the three GEMMs.

    `logits`: the pass reads fp32 logits twice and writes bf16 once. `exp`: fp32 sums of S' and T' for every 64 columns,
    written once and read once. Both: x gathered (2 + 2 a number), d(hidden) filled with 0 (4), added to (4 + 8) and
    rounded (4 + 2); dW rounded (4 + 2). What GEMMs read and write (W three times a chunk, dW in fp32 read and written
    once a chunk, but not read in the first) is within them.
    """
    logits = {"logits": 10 * n * VOCAB, "exp": 2 * 2 * 4 * n * -(-VOCAB // 64)}[method]
    return logits + (4 + 4 + 12 + 6) * n * width + 6 * VOCAB * width


def predict(method: str, n: int, width: int) -> dict:
    """FLOPs, bytes beside the GEMMs, and the time they take where we know the chip.

    Assumed: cuBLAS at 790 TFLOP/s, 4% less with fp32 output, as ours have it; Triton's GEMM at 80% of 790; 82% of the
    memory's bandwidth, for the pass is no pipeline; nothing overlapping.
    """
    if method not in OURS:
        return {}
    gemm_flops = 2 * n * width * VOCAB
    found = {"flops": 3 * gemm_flops, "own_bytes": own_bytes(method, n, width)}
    chips = {"H100": 3.35e12, "H200": 4.8e12}  # bytes/s, SXM
    name = torch.cuda.get_device_name() if CUDA else ""
    bandwidth = next((b for chip, b in chips.items() if chip in name), None)
    if bandwidth is None:
        return found | {"predicted_ms": None}
    gemms = 3 * 1.04 if method == "logits" else 2 * 1.04 + 1 / 0.8
    return found | {"predicted_ms": 1000 * (gemms * gemm_flops / 790e12 + found["own_bytes"] / (0.82 * bandwidth))}


def check(impl: str) -> dict:
    """The bars: log-prob within 1e-5 of fp64 from the same inputs; gradient error at most twice that of bf16 eager.

    Two sizes of chunk, one of them ragged; `same_logp`: their log-probs are bitwise equal, as they must be for `exp`.
    """
    n, width = CHECKED
    found: dict = {"what": "check", "method": impl, "n": n, "width": width, "vocab": VOCAB, "ok": False}
    try:
        case = make_case(n, width)
        exact_z = case["hidden"].double() @ case["weight"].double().T
        exact_logp = exact_z.log_softmax(-1).gather(1, case["target_id"][:, None])[:, 0]
        exact = step(lambda c: eager(c, torch.float64, torch.float64), case)
        baseline = [relative_error(d, e) for d, e in zip(step(eager, case), exact, strict=True)]
        trained = case | {"weight": case["weight"].detach().requires_grad_()}  # without grad `exp` runs on the logits
        logp, again = (our_loss(trained, impl, c).logp for c in ("auto", n // 2 - 1))
        gradients = step(lambda c: our_loss(c, impl, n // 2 - 1).loss, case)
    except Exception as error:
        return found | {"error": sentence(error)}
    same, logp_error = torch.equal(logp, again), (logp.double() - exact_logp).abs().max().item()
    errors = [relative_error(d, e) for d, e in zip(gradients, exact, strict=True)]
    ok = logp_error <= 1e-5 and all(d <= 2 * b for d, b in zip(errors, baseline, strict=True))
    found |= {"ok": ok and (same or impl == "logits"), "same_logp": same, "logp_error": logp_error}
    return found | {"gradient_errors": errors, "eager_gradient_errors": baseline}


def sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def relative_error(d: Tensor, exact: Tensor) -> float:
    return ((d.double() - exact).norm() / exact.norm()).item()


def measure(name: str, method: Callable[[dict], Tensor], n: int, width: int) -> dict:
    found: dict = {"what": "time", "method": name, "n": n, "width": width, "vocab": VOCAB}
    found |= predict(name, n, width)
    if time.perf_counter() - START > LIMIT_S:
        return found | {"error": f"not run: {LIMIT_S} s were over"}
    try:
        case = make_case(n, width)
        floor = Floor(case)
        step(method, case)  # compiles
        peak = peak_gib(lambda: step(method, case))
        floor()
        pairs = [(milliseconds(floor), milliseconds(lambda: step(method, case))) for _ in range(ROUNDS)]
    except Exception as error:  # out of memory, or a peer whose interface has moved: say so and go on
        return found | {"error": sentence(error)}
    floor_ms, ms = (median(times) for times in zip(*pairs, strict=True))
    return found | {"ms": ms, "floor_ms": floor_ms, "of_floor": floor_ms / ms, "peak_gib": peak}


def lines() -> Iterator[dict]:
    import triton

    device, date = torch.cuda.get_device_name() if CUDA else "cpu", time.strftime("%F")
    yield {"what": "machine", "device": device, "torch": torch.__version__, "triton": triton.__version__, "date": date}
    yield from map(check, OURS)
    for name, method in methods().items():
        for n, width in SHAPES:
            yield measure(name, method, n, width)
            if CUDA:
                torch.cuda.empty_cache()


def results_path() -> Path:
    folder = os.environ.get("OUT", "")
    if SMOKE and not folder:
        return Path(os.devnull)
    path = Path(folder) if folder else Path(__file__).resolve().parents[1] / "results"
    path.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_name().replace(" ", "-") if CUDA else "cpu"
    return path / f"{device}-{time.strftime('%F')}-fused_loss.json"


def main() -> None:
    if not (CUDA or SMOKE):
        sys.exit("no GPU here; --smoke runs tiny shapes without one")
    good = True
    with results_path().open("w") as file:
        for line in lines():
            for out in (sys.stdout, file):
                print(json.dumps(line), file=out, flush=True)
            good &= line.get("ok", True) and not ("error" in line and line["method"] in OURS)
    sys.exit(not good)


if __name__ == "__main__":
    main()
