"""The fused loss on one GPU: is it right, how fast, in how much memory. One process, one JSON line a case.

    python bench/gpu/fused_loss.py            # 3 minutes; torch and triton, peers where they are installed
    python bench/gpu/fused_loss.py --sweep    # other tiles, warps and stages of our kernels: launch_configs.json
    python bench/gpu/fused_loss.py --smoke    # tiny shapes, on CPU under Triton's interpreter: a check of this file

The lines go to stdout and to bench/results/<device>-<date>-fused_loss.json, or into the folder $OUT; those of --smoke
only there. First every method, ours and peers, against fp64: one that is wrong is not timed (`check`, and for ours
`check_large` at a shape that is timed). Then, for each method and shape, its time, interleaved with that of the floor,
and its peak memory: forward + backward of a loss against three bare bf16 GEMMs of the call's shapes, 8,192 targets at a
time; log-probs and entropies without gradients against the first of them. `of_floor` is floor time / own time. Beside
ours is what we expected before any run: see `predict`. A case that fails prints its error, and the next one follows.
Exit status 1: a bar of correctness is missed, or our own code failed.
"""

import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

START = time.perf_counter()
SMOKE, SWEEP, CUDA = "--smoke" in sys.argv, "--sweep" in sys.argv, torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"
os.environ["CIPO_KERNELS"] = "triton"
import bootstrap  # noqa: E402, F401
from cipo_kernels import LossOutput, fused_linear_cipo_loss, fused_linear_logprob  # noqa: E402
from loss_accuracy import (  # noqa: E402
    EPS_HIGH,
    EPS_LOW,
    Exact,
    as_good_as_eager,
    clipped_loss,
    eager,
    eager_logp,
    errors,
    exact,
    make_case,
    step,
    within,
)
from records import LIMIT_S  # noqa: E402
from sweep import save, sweep  # noqa: E402

VOCAB = 300 if SMOKE else 151936
SHAPES = [(12, 64)] if SMOKE else [(n, h) for h in (2560, 4096) for n in (8192, 16384, 32768)]  # targets, hidden size
CHECKED = (12, 64) if SMOKE else (1024, 2560)
SAMPLED = 4 if SMOKE else 64  # rows of d(hidden) and of dW that a large shape is checked in
ROUNDS = 1 if SMOKE else 5
SEQUENCE = 4 if SMOKE else 1024  # targets a row, which have one advantage
OURS = ("logits", "exp")
GEMM_TILES = [
    {"group": 8}, {"group": 32}, {"stages": 3}, {"k": 128, "stages": 2}, {"n": 128}, {"n": 128, "warps": 4},
    {"m": 256, "n": 128}, {"m": 64}, {"m": 64, "warps": 4},
]  # fmt: skip
ROW_BLOCKS = [{"columns": 2048}, {"columns": 2048, "warps": 4}, {"columns": 8192}, {"columns": 8192, "warps": 16}]


def new_case(n: int, width: int) -> dict[str, Tensor]:
    return make_case(n, width, VOCAB, SEQUENCE, DEVICE)


# ---- methods: a case -> its loss, which is `of_logp` of the targets' log-probs


class Method(NamedTuple):
    loss: Callable[[dict], Tensor]
    of_logp: Callable[[Tensor, dict], Tensor]


def cross_entropy(logp: Tensor, case: dict) -> Tensor:
    return -logp.mean()


def ours(impl: str) -> Callable[[dict], Tensor]:
    return lambda case: our_loss(case, impl).loss


def our_loss(case: dict, impl: str, chunk_targets: int | Literal["auto"] = "auto") -> LossOutput:
    return fused_linear_cipo_loss(**case, eps_low=EPS_LOW, eps_high=EPS_HIGH, impl=impl, chunk_targets=chunk_targets)


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


def liger_scaled_cross_entropy(case: dict) -> Tensor:
    """From Liger 0.8.3 on; on sm_90 a CuTe DSL kernel."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as Function

    return clipped_loss(-Function.apply(case["hidden"], case["weight"], case["target_id"]), case)


def liger_cross_entropy(case: dict) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(case["weight"], case["hidden"], case["target_id"])


def quack_cross_entropy(case: dict) -> Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(case["hidden"], case["weight"], case["target_id"])


def methods() -> dict[str, Method]:
    found = {impl: Method(ours(impl), clipped_loss) for impl in OURS} | {"eager": Method(eager, clipped_loss)}
    if importlib.util.find_spec("liger_kernel") is not None:
        found["liger_grpo"] = Method(liger_grpo, clipped_loss)
        found["liger_scaled_cross_entropy"] = Method(liger_scaled_cross_entropy, clipped_loss)
        found["liger_cross_entropy"] = Method(liger_cross_entropy, cross_entropy)
    if importlib.util.find_spec("quack") is not None:
        found["quack_cross_entropy"] = Method(quack_cross_entropy, cross_entropy)
    if hasattr(F, "linear_cross_entropy"):
        found["torch_linear_cross_entropy"] = Method(torch_linear_cross_entropy, cross_entropy)
    compiled = torch.compile(eager, backend="inductor" if CUDA else "aot_eager")
    return found | {"eager_compiled": Method(compiled, clipped_loss)}


def log_probs(case: dict) -> list[Tensor]:
    """(logp, entropy) as the trainer asks for old_logp and the reference's."""
    with torch.no_grad():
        operands = (case[k] for k in ("hidden", "weight", "pred_index", "target_id"))
        return list(fused_linear_logprob(*operands, return_entropy=True))


class Floor:
    """The bare GEMMs, 8192 targets at a time: three of a loss, or the first alone."""

    def __init__(self, case: dict[str, Tensor]) -> None:
        self.chunks, self.weight = case["hidden"].split(8192), case["weight"]
        self.z = torch.empty(len(self.chunks[0]), VOCAB, dtype=torch.bfloat16, device=DEVICE)
        self.dx, self.dw = torch.empty_like(self.chunks[0]), torch.empty_like(self.weight)

    def loss(self) -> None:
        for x in self.chunks:
            torch.mm(x, self.weight.T, out=self.z)
            torch.mm(self.z, self.weight, out=self.dx)
            torch.mm(self.z.T, x, out=self.dw)

    def log_probs(self) -> None:
        for x in self.chunks:
            torch.mm(x, self.weight.T, out=self.z)


# ---- is it right


def best_errors(ideal: Exact, right: Exact) -> dict[str, float]:
    """The best kernel's. Triton's interpreter cuts to bf16 where a GPU rounds: twice these."""
    return {name: (1 if CUDA else 2) * e for name, e in errors([ideal.d_hidden, ideal.d_weight], right).items()}


def check(name: str, method: Method) -> dict:
    """The bars of loss_accuracy.py. Ours: log-prob within 1e-5 of fp64 from the same inputs, and `within`. Peers:
    `as_good_as_eager`.

    Ours in two sizes of chunk, one of them ragged; `same_logp`: their log-probs are bitwise equal, as they must be for
    `exp`.
    """
    n, width = CHECKED
    found: dict = {"what": "check", "method": name, "n": n, "width": width, "vocab": VOCAB, "ok": False}
    everything = torch.arange(n, device=DEVICE), torch.arange(VOCAB, device=DEVICE)
    try:
        case = new_case(n, width)
        right = exact(case, method.of_logp, *everything, rounded=False)
        if name not in OURS:
            of_eager = errors(step(lambda c: method.of_logp(eager_logp(c), c), case), right)
            of_peer = errors(step(method.loss, case), right)
            return found | {"errors": of_peer, "eager": of_eager, "ok": as_good_as_eager(of_peer, of_eager)}
        best = best_errors(exact(case, method.of_logp, *everything, rounded=True), right)
        trained = case | {"weight": case["weight"].detach().requires_grad_()}  # without grad no gradients are taken
        logp, again = (our_loss(trained, name, c).logp for c in ("auto", n // 2 - 1))
        gradients = step(lambda c: our_loss(c, name, n // 2 - 1).loss, case)
    except Exception as error:
        return found | {"error": sentence(error)}
    same, logp_error = torch.equal(logp, again), (logp.double() - right.logp).abs().max().item()
    found |= {"same_logp": same, "logp_error": logp_error, "errors": errors(gradients, right), "best": best}
    ok = logp_error <= 1e-5 and within(found["errors"], best)
    return found | {"ok": ok and (same or name == "logits")}


def check_log_probs() -> dict:
    n, width = CHECKED
    found: dict = {"what": "check", "method": "log_probs", "n": n, "width": width, "vocab": VOCAB, "ok": False}
    try:
        case = new_case(n, width)
        z = (case["hidden"].double() @ case["weight"].double().T).log_softmax(-1)
        logp, entropy = log_probs(case)
    except Exception as error:
        return found | {"error": sentence(error)}
    logp_error = (logp - z.gather(1, case["target_id"][:, None])[:, 0]).abs().max().item()
    entropy_error = (entropy + (z.exp() * z).sum(1)).abs().max().item()
    found |= {"logp_error": logp_error, "entropy_error": entropy_error}
    return found | {"ok": logp_error <= 1e-5 and entropy_error <= 1e-4}


def check_large(impl: str) -> dict:
    """A shape that is timed, several chunks and more than 2^31 bytes of logits: sampled rows of both gradients."""
    n, width = SHAPES[0]
    found: dict = {"what": "check_large", "method": impl, "n": n, "width": width, "vocab": VOCAB, "ok": False}
    try:
        case = new_case(n, width)
        g = torch.Generator().manual_seed(1)
        rows = torch.randperm(n, generator=g)[:SAMPLED].sort().values.to(DEVICE)
        others = torch.randperm(VOCAB, generator=g)[:SAMPLED].to(DEVICE)
        ids = torch.cat([others, case["target_id"][rows]]).unique()
        right, ideal = (exact(case, clipped_loss, rows, ids, rounded) for rounded in (False, True))
        d_hidden, d_weight = step(ours(impl), case)
    except Exception as error:
        return found | {"error": sentence(error)}
    best = best_errors(ideal, right)
    found |= {"errors": errors([d_hidden[rows], d_weight[ids]], right), "best": best}
    return found | {"ok": within(found["errors"], best)}


def sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


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
    """Bytes of all that runs beside the GEMMs.

    `logits`: the pass reads fp32 logits twice and writes bf16 once. `exp`: fp32 sums of S' and T' for every 64 columns,
    written once and read once, S' twice; x and W[target] read for the anchor (2 + 2 a number), room for the x of rows
    to repeat (2), d(hidden) scaled in place (4 + 4), x scaled for dW (2 + 2). Both: x gathered (2 + 2),
    d(hidden) filled with 0 (4), added to (4 + 8) and rounded (4 + 2); dW rounded (4 + 2). `log_probs`: m, s and t of
    every 256 columns, written once and read once, m twice; x gathered. What GEMMs read and write (W three times a
    chunk, dW in fp32 read and written once a chunk, but not read in the first) is within them.
    """
    if method == "log_probs":
        return 7 * 4 * n * -(-VOCAB // 256) + 4 * n * width
    logits = {"logits": 10 * n * VOCAB, "exp": (2 + 3) * 4 * n * -(-VOCAB // 64) + 18 * n * width}[method]
    return logits + (4 + 4 + 12 + 6) * n * width + 6 * VOCAB * width


GEMMS = {"logits": 3 * 1.04, "exp": 2 * 1.04 + 1 / 0.8, "log_probs": 1 / 0.8}  # in times of one at 790 TFLOP/s
BANDWIDTH = {"H100": 3.35e12, "H200": 4.8e12}  # bytes/s, SXM


def expected_ms(method: str, n: int, width: int, chip: str) -> float:
    """Assumed: cuBLAS at 790 TFLOP/s, 4% less with fp32 output, as ours have it; Triton's GEMM at 80% of 790; 82% of
    the memory's bandwidth, for the pass is no pipeline; nothing overlapping."""
    seconds = GEMMS[method] * 2 * n * width * VOCAB / 790e12 + own_bytes(method, n, width) / (0.82 * BANDWIDTH[chip])
    return 1000 * seconds


def predict(method: str, n: int, width: int) -> dict:
    """FLOPs, bytes beside the GEMMs, and the time they take where we know the chip."""
    if method not in GEMMS:
        return {}
    flops = (1 if method == "log_probs" else 3) * 2 * n * width * VOCAB
    name = torch.cuda.get_device_name() if CUDA else ""
    chip = next((chip for chip in BANDWIDTH if chip in name), None)
    ms = None if chip is None else expected_ms(method, n, width, chip)
    return {"flops": flops, "own_bytes": own_bytes(method, n, width), "predicted_ms": ms}


def measure(name: str, run: Callable[[dict], list[Tensor]], n: int, width: int) -> dict:
    found: dict = {"what": "time", "method": name, "n": n, "width": width, "vocab": VOCAB}
    found |= predict(name, n, width)
    if time.perf_counter() - START > LIMIT_S:
        return found | {"error": f"not run: {LIMIT_S} s were over"}
    try:
        case = new_case(n, width)
        floor = Floor(case).log_probs if name == "log_probs" else Floor(case).loss
        run(case)  # compiles
        peak = peak_gib(lambda: run(case))
        floor()
        pairs = [(milliseconds(floor), milliseconds(lambda: run(case))) for _ in range(ROUNDS)]
    except Exception as error:  # out of memory, or a peer whose interface has moved: say so and go on
        return found | {"error": sentence(error)}
    floor_ms, ms = (median(times) for times in zip(*pairs, strict=True))
    return found | {"ms": ms, "floor_ms": floor_ms, "of_floor": floor_ms / ms, "peak_gib": peak}


def machine() -> dict:
    import triton

    device, date = torch.cuda.get_device_name() if CUDA else "cpu", time.strftime("%F")
    return {"what": "machine", "device": device, "torch": torch.__version__, "triton": triton.__version__, "date": date}


def lines() -> Iterator[dict]:
    yield machine()
    runs: dict[str, Callable[[dict], list[Tensor]]] = {"log_probs": log_probs}
    wrong = set()
    for line in [check_log_probs(), *map(check_large, OURS), *(check(*item) for item in methods().items())]:
        yield line
        wrong |= set() if line["ok"] else {line["method"]}
    runs |= {name: lambda case, loss=method.loss: step(loss, case) for name, method in methods().items()}
    for name in [name for name in runs if name not in wrong]:
        for n, width in SHAPES:
            yield measure(name, runs[name], n, width)
            if CUDA:
                torch.cuda.empty_cache()


def sweep_lines() -> Iterator[dict]:
    yield machine()
    case = new_case(*SHAPES[0])
    runs: dict[str, tuple[list[dict[str, int]], Callable[[], list[Tensor]]]] = {
        "exp_gemm": (GEMM_TILES, lambda: step(ours("exp"), case)),
        "logp_gemm": (GEMM_TILES, lambda: log_probs(case)),
        "row_kernel": (ROW_BLOCKS, lambda: step(ours("logits"), case)),
    }
    for kernel, (candidates, run) in runs.items():
        tried = candidates[-2:] if SMOKE else candidates
        yield from sweep(kernel, tried, run, lambda run: median(milliseconds(run) for _ in range(ROUNDS)), DEVICE)
        save(Path(__file__).name, DEVICE, os.environ.get("OUT"), SMOKE)


def results_path() -> Path:
    folder = os.environ.get("OUT", "")
    if SMOKE and not folder:
        return Path(os.devnull)
    path = Path(folder) if folder else Path(__file__).resolve().parents[1] / "results"
    path.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_name().replace(" ", "-") if CUDA else "cpu"
    return path / f"{device}-{time.strftime('%F')}-fused_loss{'_sweep' if SWEEP else ''}.json"


def main() -> None:
    if not (CUDA or SMOKE):
        sys.exit("no GPU here; --smoke runs tiny shapes without one")
    good = True
    with results_path().open("w") as file:
        for line in sweep_lines() if SWEEP else lines():
            for out in (sys.stdout, file):
                print(json.dumps(line), file=out, flush=True)
            is_ours = line.get("method") in (*OURS, "log_probs")
            good &= not is_ours or (line.get("ok", True) and "error" not in line)
    sys.exit(not good)


if __name__ == "__main__":
    main()
