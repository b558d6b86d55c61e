"""Tree attention on a GPU against what else could train CIPO's trees; one JSON line a case. torch and triton alone.

    python bench/gpu/tree_attention.py              minutes; also into bench/results/, or $OUT if that is set
    python bench/gpu/tree_attention.py --smoke      tiny shapes on any device, a check of this file: times mean nothing

First errors against fp64; then each attention alone, forward and backward; then a stack of decoder layers of Qwen3-4B's
shape, forward and backward. At the end the rates of this device go into kernels/device_rates.json (and $OUT).

Shapes: a prompt of P tokens, G rollouts of R; below each of F rollouts I tokens of glue and K corrections of R.
Attention alone also runs with `ragged` lengths of these means: lognormal, a fixed draw. They end inside tiles, as real
ones do, and theirs are the rates kept.
Peers get what a trainer without the tree kernel would run: FlexAttention on the same stream, or one causal row a
conversation, packed (varlen, no padding) or as dense batches of equal rows (cuDNN). `useful_tflops` counts the visible
pairs of the tree for all of them, 4 D FLOPs a pair and query head forward, 10 D backward; `own_tflops` counts
the pairs an implementation itself had to compute. Each case has the time we predicted for an H100 before any run.
"""

# ruff: noqa: E402, the interpreter is chosen before the imports

import importlib.util
import inspect
import json
import math
import os
import sys
import time
from functools import partial
from pathlib import Path
from random import Random

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton kernels are defined

import torch._dynamo
import torch._functorch.config
import torch.nn.functional as F
import triton
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

ROOT = Path(__file__).resolve().parents[2]
if importlib.util.find_spec("cipo_kernels") is None:  # not installed: the folder kernels/ is this package
    init = ROOT / "kernels" / "__init__.py"
    spec = importlib.util.spec_from_file_location("cipo_kernels", init, submodule_search_locations=[str(init.parent)])
    sys.modules["cipo_kernels"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["cipo_kernels"])
from cipo_kernels.rates import RATES_FILE, both_directions
from cipo_kernels.tree_attention import tree_attention, tree_attention_reference
from cipo_kernels.tree_layout import TreeLayout

# The interpreter has no bf16 products.
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float16
BLOCK = 128  # of the FlexAttention block mask
BACKENDS = ("triton", "flash")  # ours
SPREAD = 0.5  # sigma of ragged lengths

# Predicted TFLOP/s (forward, backward) on an H100, over the pairs each computes, and of layers without attention.
# triton: from the offline artefacts (wgmma, no spills; 7 GEMMs backward where atomics would need 5). flash: varlen's,
# less gathers and merges. Others: d128 causal 8k in bf16, read off MagiAttention's charts; varlen is FlashAttention-2.
PREDICTED = {"triton": (380, 230), "flash": (240, 230), "flex": (370, 217), "varlen": (350, 302), "cudnn": (538, 426)}
PREDICTED_LINEAR = 600

REAL = {
    "tree": {"P": 512, "G": 8, "F": 4, "K": 4, "I": 64},
    "R": (2048, 1024, 4096), "stack_R": (2048, 1024),  # the first one's rates are kept
    "check": {"P": 300, "G": 3, "R": 333, "F": 2, "K": 2, "I": 40},
    "hq": 32, "hkv": 8, "d": 128, "hidden": 2560, "mlp": 9728, "layers": 3,
}  # fmt: skip
SMOKE = {
    "tree": {"P": 40, "G": 2, "F": 1, "K": 2, "I": 8}, "R": (64,), "stack_R": (64,),
    "check": {"P": 40, "G": 2, "R": 130, "F": 1, "K": 2, "I": 8},
    "hq": 2, "hkv": 1, "d": 16, "hidden": 24, "mlp": 40, "layers": 2,
}  # fmt: skip


class Job:
    """A tree of CIPO's shape, and the same conversations as rows."""

    def __init__(self, P, G, R, F, K, I, ragged=False):  # noqa: E741
        lengths, parents, sampled = [P], [-1], []
        for rollout in range(G):
            anchor = len(lengths)
            lengths, parents, sampled = [*lengths, R], [*parents, 0], [*sampled, anchor]
            if rollout < F:
                glue = len(lengths)
                lengths, parents = [*lengths, I, *[R] * K], [*parents, anchor, *[glue] * K]
                sampled += range(glue + 1, glue + 1 + K)
        if ragged:
            rng = Random(0)
            lengths = [max(1, round(rng.lognormvariate(math.log(n) - SPREAD**2 / 2, SPREAD))) for n in lengths]
        self.tree = TreeLayout.from_parents(lengths, parents)
        self.layout = self.tree.to(DEVICE)
        self.rows = [root_path(self.tree, segment) for segment in sampled]  # token indices of each conversation

    def tokens(self, name):
        """Tokens that an implementation takes."""
        if name == "flex":
            return triton.cdiv(self.tree.num_tokens, BLOCK) * BLOCK
        return sum(map(len, self.rows)) if name in ("varlen", "cudnn") else self.tree.num_tokens

    def pairs(self, name):
        """Pairs that it computes."""
        if name in ("varlen", "cudnn"):
            return sum(len(row) * (len(row) + 1) // 2 for row in self.rows)
        return self.tree.visible_pairs()

    def positions(self, name):
        positions = self.tree.position_ids
        return (positions[torch.cat(self.rows)] if name == "varlen" else positions).to(DEVICE)


def root_path(tree, segment):
    """Token indices from the root to the end of a segment."""
    path = []
    while segment >= 0:
        path.insert(0, torch.arange(int(tree.start[segment]), int(tree.end[segment])))
        segment = int(tree.parent[segment])
    return torch.cat(path)


def random(*shape, seed=0):
    return torch.randn(*shape, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(seed)).to(DTYPE)


def random_inputs(tokens, shape):
    """q, k, v that require grad, and do."""
    heads = (shape["hq"], shape["hkv"], shape["hkv"], shape["hq"])
    q, k, v, do = (random(tokens, h, shape["d"], seed=i) for i, h in enumerate(heads))
    return [x.requires_grad_() for x in (q, k, v)], do


# ---- attentions: a function of q, k, v [tokens, H, D] that returns o


def ours(job, impl):
    return lambda q, k, v: tree_attention(q, k, v, job.layout, impl=impl)


def flex(job):
    mask = block_mask(job.tree, job.tokens("flex"))
    flex = flex_attention if DEVICE == "cpu" else torch.compile(flex_attention, dynamic=False)

    def run(q, k, v):
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return flex(q, k, v, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)

    return run


def block_mask(tree, tokens):
    """Full where every pair of a block is visible, partial where one may be, from the blocks' extremes."""
    end = F.pad(tree.subtree_end_of_token, (0, tokens - tree.num_tokens))  # nothing sees the padding
    min_end, max_end = end.view(-1, BLOCK).amin(1), end.view(-1, BLOCK).amax(1)
    first = torch.arange(0, tokens, BLOCK)
    q_first, k_first = first[:, None], first[None, :]
    full = (k_first + BLOCK - 1 <= q_first) & (q_first + BLOCK <= min_end)
    partial = (k_first <= q_first) & (q_first < max_end) & ~full

    def ordered(blocks):
        indices = blocks.int().argsort(dim=1, descending=True, stable=True).int()
        return blocks.sum(1).int()[None, None].to(DEVICE), indices[None, None].to(DEVICE)

    end = end.to(DEVICE)
    return BlockMask.from_kv_blocks(
        *ordered(partial),
        *ordered(full),
        BLOCK_SIZE=BLOCK,
        mask_mod=lambda _b, _h, q, k: (k <= q) & (q < end[k]),
        seq_lengths=(tokens, tokens),
    )


def varlen(job):
    lengths = list(map(len, job.rows))
    if DEVICE == "cpu":  # torch has none there

        def run(*qkv):
            rows = zip(*(x[None].split(lengths, 1) for x in qkv), strict=True)
            return torch.cat([causal(*row) for row in rows], 1)[0]

        return run
    from torch.nn.attention.varlen import varlen_attn

    ends = torch.tensor([0, *lengths]).cumsum(0).int().to(DEVICE)
    known = inspect.signature(varlen_attn).parameters  # torch 2.11 has other ones than 2.13
    options = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    options |= {"enable_gqa": True} if "enable_gqa" in known else {}
    return lambda q, k, v: varlen_attn(q, k, v, ends, ends, max(lengths), max(lengths), **options)


def cudnn(job):
    """Rows of one length form a batch."""
    lengths = sorted(map(len, job.rows))
    batches = [(n, lengths.count(n)) for n in sorted(set(lengths))]
    sizes = [n * count for n, count in batches]

    def run(*qkv):
        parts = zip(batches, *(x.split(sizes) for x in qkv), strict=True)
        outputs = [
            causal(*(x.unflatten(0, (count, n)) for x in batch), SDPBackend.CUDNN_ATTENTION)
            for (n, count), *batch in parts
        ]
        return torch.cat([o.flatten(0, 1) for o in outputs])

    return run


def causal(q, k, v, backend=SDPBackend.FLASH_ATTENTION):
    """Of [batch, tokens, H, D]; on CPU whatever there is."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(SDPBackend.MATH if DEVICE == "cpu" else backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


ATTENTIONS = {name: partial(ours, impl=name) for name in BACKENDS} | {"flex": flex, "varlen": varlen, "cudnn": cudnn}


# ---- correctness


def check(shape, name):
    """Errors against fp64, and those of flash attention on rows; ok: at most 1.2 times the latter.

    On CPU the rows are computed in fp32, a baseline that only rounds its results: ok says nothing there.
    """
    job = Job(**shape["check"])
    T, padded = job.tree.num_tokens, job.tokens(name)
    inputs, do = random_inputs(T, shape)
    # Tokens past T, which FlexAttention's blocks need, have no part in what comes before them.
    actual = gradients(ATTENTIONS[name](job), [pad(x, padded) for x in inputs], pad(do, padded), has_backward(name))
    exact = gradients(lambda *x: tree_attention_reference(*x, job.layout), [x.double() for x in inputs], do.double())
    rows = gradients(lambda *x: attend_rows(*x, job.rows), [x.float() for x in inputs], do.float())
    result = {"tokens": T}
    for what, a, r, e in zip(("o", "dq", "dk", "dv"), actual, rows, exact, strict=False):
        error, row_error = (((x.double() - e).norm() / e.norm()).item() for x in (a[:T], r))
        result[what] = {"error": error, "flash_rows_error": row_error, "ok": error <= 1.2 * row_error}
    return result | {"ok": all(x["ok"] for x in result.values() if isinstance(x, dict))}


def gradients(attention, inputs, do, backward=True):
    """o, and where asked for dq, dk and dv."""
    inputs = [x.detach().requires_grad_(backward) for x in inputs]
    o = attention(*inputs)
    return [o.detach(), *(torch.autograd.grad(o, inputs, do) if backward else ())]


def pad(x, tokens):
    return F.pad(x.detach(), (0, 0, 0, 0, 0, tokens - len(x)))


def has_backward(name):
    return DEVICE == "cuda" or name != "flex"  # which has none on CPU


def attend_rows(q, k, v, rows):
    """Flash attention of each row in DTYPE; a token's output is that of its first row. Gradients add up in fp32."""
    outputs = q.new_zeros(q.shape)
    done = torch.zeros(len(q), dtype=torch.bool)
    for row in rows:
        o = causal(*(x[None, row.to(DEVICE)].to(DTYPE) for x in (q, k, v)))[0]
        new = ~done[row]
        outputs = outputs.index_put((row[new].to(DEVICE),), o[new.to(DEVICE)].to(q.dtype))
        done[row] = True
    return outputs


# ---- attention alone


def time_attention(shape, name, R, ragged):
    job = Job(R=R, ragged=ragged, **shape["tree"])
    attention = ATTENTIONS[name](job)
    inputs, do = random_inputs(job.tokens(name), shape)
    constants = [x.detach() for x in inputs]
    times = {"forward": milliseconds(lambda: attention(*constants))}
    if has_backward(name):
        o = attention(*inputs)
        times["backward"] = milliseconds(lambda: torch.autograd.grad(o, inputs, do, retain_graph=True))
    pairs, own_pairs = job.tree.visible_pairs(), job.pairs(name)
    result = {"tokens": job.tokens(name), "pairs": pairs, "own_pairs": own_pairs}
    for (direction, ms), per_pair, rate in zip(times.items(), (4, 10), PREDICTED[name], strict=False):
        flops = per_pair * shape["hq"] * shape["d"]
        result[direction] = {
            "ms": ms,
            "useful_tflops": pairs * flops / ms / 1e9,
            "own_tflops": own_pairs * flops / ms / 1e9,
            "predicted_h100_ms": own_pairs * flops / rate / 1e9,
        }
    return result


def milliseconds(run, rep=500):
    """Median of about `rep` ms of runs."""
    if DEVICE == "cuda":
        return triton.testing.do_bench(run, warmup=50, rep=rep, return_mode="median")
    start = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - start)


# ---- a stack of decoder layers


class Layer(nn.Module):
    """Qwen3's: RMSNorm, grouped-query attention with RMSNorm on q and k and RoPE; RMSNorm, SwiGLU."""

    def __init__(self, hidden, mlp, hq, hkv, d):
        super().__init__()
        linear = partial(nn.Linear, bias=False, device=DEVICE, dtype=DTYPE)
        norm = partial(nn.RMSNorm, eps=1e-6, device=DEVICE, dtype=DTYPE)
        self.d = d
        self.before_attention, self.before_mlp, self.q_norm, self.k_norm = norm(hidden), norm(hidden), norm(d), norm(d)
        self.q, self.k, self.v, self.o = (
            linear(hidden, hq * d), linear(hidden, hkv * d), linear(hidden, hkv * d), linear(hq * d, hidden)
        )  # fmt: skip
        self.gate, self.up, self.down = linear(hidden, mlp), linear(hidden, mlp), linear(mlp, hidden)

    def forward(self, x, cos, sin, attention):  # x [T, hidden]
        y = self.before_attention(x)
        q, k, v = (project(y).unflatten(1, (-1, self.d)) for project in (self.q, self.k, self.v))
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        x = x + self.o(attention(q, k, v).flatten(1))
        y = self.before_mlp(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def rotate(x, cos, sin):  # [T, H, D], [T, 1, D / 2]
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def no_attention(q, k, v):
    """Something cheap in its place, that every gradient goes through."""
    return (q.unflatten(1, (k.shape[1], -1)) + (k + v)[:, :, None]).flatten(1, 2)


def time_stack(shape, name, R):
    """A step with trees (ours), with packed rows (varlen), or with trees and no attention ("linear")."""
    job = Job(R=R, **shape["tree"])
    tokens, d = job.tokens(name), shape["d"]
    torch.manual_seed(0)
    layers = nn.ModuleList(
        Layer(*(shape[key] for key in ("hidden", "mlp", "hq", "hkv", "d"))) for _ in range(shape["layers"])
    )
    attention = no_attention if name == "linear" else ATTENTIONS[name](job)
    frequency = 1e6 ** (-torch.arange(0, d, 2, device=DEVICE) / d)
    angle = (job.positions(name)[:, None] * frequency)[:, None]  # [T, 1, D / 2]
    cos, sin = angle.cos().to(DTYPE), angle.sin().to(DTYPE)
    x, dy = random(tokens, shape["hidden"]).requires_grad_(), random(tokens, shape["hidden"], seed=1)

    def step():
        y = x
        for layer in layers:
            y = layer(y, cos, sin, attention)
        return torch.autograd.grad(y, [x, *layers.parameters()], dy)

    weights = sum(p.numel() for p in layers.parameters())
    linear, pair = 6 * weights * tokens, 14 * shape["layers"] * shape["hq"] * d
    peak = peak_gib(step)
    ms = milliseconds(step, rep=3000)
    predicted_ms = linear / PREDICTED_LINEAR / 1e9
    result = {"layers": shape["layers"], "weights": weights, "tokens": tokens, "ms": ms, "peak_gib": peak}
    if name == "linear":
        result["linear_tflops"] = linear / ms / 1e9
    else:
        predicted_ms += pair * job.pairs(name) / both_directions(*PREDICTED[name]) / 1e9
    return result | {"predicted_h100_ms": predicted_ms}


def peak_gib(run):
    """Beyond what was there before: activations and gradients."""
    if DEVICE == "cpu":
        run()
        return None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


# ---- the run


def main():
    smoke = "--smoke" in sys.argv[1:]
    if DEVICE == "cpu" and not smoke:
        sys.exit("no GPU: --smoke runs tiny shapes")
    # Compiled FlexAttention would free what a second backward pass over the same graph needs.
    torch._functorch.config.donated_buffer = False
    shape, out = SMOKE if smoke else REAL, os.environ.get("OUT")
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
    versions = {"device": device, "torch": torch.__version__, "triton": triton.__version__, "date": time.strftime("%F")}
    name = f"{device}-{versions['date']}-tree_attention.json".replace(" ", "-")
    results = [] if smoke and not out else [Path(out or ROOT / "bench" / "results") / name]
    rates = ([] if smoke else [RATES_FILE]) + ([Path(out) / RATES_FILE.name] if out else [])

    records = []
    for record in run_cases(shape):
        records.append(record | versions)
        print(json.dumps(records[-1]), flush=True)
        write(results, records)
    entry = rates_entry(records, shape, smoke)
    if entry is not None:
        write(rates, json.loads(RATES_FILE.read_text(encoding="utf-8")) | {device: entry})
    records.append({"case": "summary", "rates": entry, "rows_over_trees": step_ratios(records)} | versions)
    print(json.dumps(records[-1]), flush=True)
    write(results, records)


def write(files, value):
    for file in files:
        file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def run_cases(shape):
    cases = [("correctness", check, name, {}) for name in (*BACKENDS, "flex")]
    lengths = [{"R": R, "ragged": ragged} for R in shape["R"] for ragged in (False, True)]
    cases += [("attention", time_attention, name, arguments) for arguments in lengths for name in ATTENTIONS]
    stacks = ("linear", "varlen", *BACKENDS)
    cases += [("stack", time_stack, name, {"R": R}) for R in shape["stack_R"] for name in stacks]
    for case, function, name, arguments in cases:
        yield {"case": case, "implementation": name, **arguments, **run_case(function, shape, name, arguments)}


def run_case(function, shape, name, arguments):
    """Its result, or its error: a peer that this device or version lacks, a kernel of ours that fails."""
    try:
        return function(shape, name, **arguments)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
    finally:
        torch._dynamo.reset()
        if DEVICE == "cuda":
            torch.cuda.empty_cache()


def rates_entry(records, shape, smoke):
    """What device_rates.json will say of this device: our back-ends that ran and are right, at the first R, ragged."""
    R, last = shape["R"][0], records[-1]
    ran = [r for r in records if "error" not in r]
    ok = {r["implementation"] for r in ran if r["case"] == "correctness" and (smoke or r["ok"])}
    timed = {r["implementation"]: r for r in ran if r["case"] == "attention" and r["R"] == R and r["ragged"]}
    linear = next((r for r in ran if (r["case"], r["implementation"], r.get("R")) == ("stack", "linear", R)), None)
    attention = {
        name: {direction: rounded(timed[name][direction]["useful_tflops"]) for direction in ("forward", "backward")}
        for name in BACKENDS
        if name in timed and name in ok
    }
    if not attention or linear is None:
        return None
    return {
        "linear": rounded(linear["linear_tflops"]),
        "attention": attention,
        "fastest": max(attention, key=lambda name: both_directions(**attention[name])),
        "source": f"bench/gpu/tree_attention.py, {last['date']}, torch {last['torch']}, triton {last['triton']}",
    }


def rounded(x):
    return float(f"{x:.4g}")


def step_ratios(records):
    """By R and back-end: time of the stack's step with packed rows over that with trees."""
    ms = {(r["R"], r["implementation"]): r["ms"] for r in records if r["case"] == "stack" and "error" not in r}
    return {
        f"{R} {name}": ms[R, "varlen"] / trees
        for (R, name), trees in ms.items()
        if name in BACKENDS and (R, "varlen") in ms
    }


if __name__ == "__main__":
    main()
