"""Tree attention on a GPU against what else could train CIPO's trees; one JSON line a case. torch and triton alone.

    python bench/gpu/tree_attention.py              minutes; also into bench/results/, or $OUT if that is set
    python bench/gpu/tree_attention.py --smoke      tiny shapes on any device, a check of this file: times mean nothing
    python bench/gpu/tree_attention.py --sweep      other tiles, warps and stages of our kernels: launch_configs.json
    python bench/gpu/tree_attention.py --predict    what we expect of an H100, as the tables of kernels/README.md

First errors against fp64: what is wrong is reported, and not timed. Then for each R the attention alone on ragged
lengths and a decoder layer of Qwen3-4B's shape, both forward and backward; then the attention on aligned lengths, and
FlexAttention, which compiles for every shape. No case begins after LIMIT_S. At the end the rates of this device go into
kernels/device_rates.json (and $OUT).

Shapes: a prompt of P tokens, G rollouts of R; below each of F rollouts I tokens of glue and K corrections of R.
`ragged` lengths have these means: lognormal, a fixed draw. They end inside tiles, as real ones do, and theirs are the
rates kept.
Peers get what a trainer without the tree kernel would run: FlexAttention on the same stream, or one causal row a
conversation, packed (varlen, no padding) or as dense batches of equal rows (cuDNN). `flash` and varlen are torch's
FlashAttention-2; a name that ends in _fa3 or _fa4 has that version activated in its place, and flex_flash is
FlexAttention on FlashAttention-4: where their packages are missing, a line says so.
`useful_tflops` counts the visible pairs of the tree for all of them, 4 D FLOPs a pair and query head forward, 10 D
backward; `own_tflops` counts the pairs an implementation itself had to compute. Each case has the time we predicted for
an H100 before any run.
"""

# ruff: noqa: E402, the interpreter is chosen before the imports

import importlib.util
import inspect
import json
import math
import os
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from random import Random

START = time.perf_counter()

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
import bootstrap  # noqa: F401
from cipo_kernels.rates import RATES_FILE, both_directions
from cipo_kernels.tree_attention import launch, tree_attention, tree_attention_reference
from cipo_kernels.tree_attention.layout import TreeLayout
from cipo_kernels.tree_attention.rectangles import read_varlen_work
from records import BACKENDS, LIMIT_S, OURS, ROWS, step_ratios, write
from sweep import save, sweep

# The interpreter has no bf16 products.
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float16
BLOCK = 128  # of the FlexAttention block mask
PACKAGES = {
    "fa3": "flash_attn_interface",
    "fa4": "flash_attn.cute",
    "flex_flash": "flash_attn.cute",
}  # by end of a name
SPREAD = 0.5  # sigma of ragged lengths
TILES = [  # to try for each kernel
    {"num_stages": 2}, {"num_stages": 4}, {"step": 32}, {"step": 32, "num_stages": 4}, {"num_warps": 4}, {"own": 64},
    {"own": 64, "num_warps": 4}, {"own": 64, "step": 32, "num_warps": 4},
]  # fmt: skip

# Assumed TFLOP/s (forward, backward) on an H100, over the pairs each computes, and of layers without attention.
# triton: from the offline artefacts (wgmma, no spills; 7 GEMMs backward where atomics would need 5). Others: d128
# causal 8k in bf16, read off MagiAttention's charts; varlen is FlashAttention-2. flash: as rows by the same version,
# and what its calls' results move besides.
PREDICTED = {"triton": (380, 230), "flex": (370, 217)}
PREDICTED |= {"varlen": (350, 302), "cudnn": (538, 426), "varlen_fa3": (655, 517)}
PREDICTED |= {"flash": PREDICTED["varlen"], "flash_fa3": PREDICTED["varlen_fa3"]}
PREDICTED_LINEAR = 600
PREDICTED_BANDWIDTH = 0.82 * 3.35e12  # bytes a second
PREDICTED_R, MOST_R = (1024, 2048, 4096, 8192), 32000
FLOPS_A_PAIR = (4, 10)  # times D, a query head

REAL = {
    "tree": {"P": 512, "G": 8, "F": 4, "K": 4, "I": 64},
    "R": (2048, 1024, 4096, 8192),  # the first one's rates are kept
    "check": {"P": 300, "G": 3, "R": 333, "F": 2, "K": 2, "I": 40},
    "hq": 32, "hkv": 8, "d": 128, "hidden": 2560, "mlp": 9728,
}  # fmt: skip
SMOKE = {
    "tree": {"P": 40, "G": 2, "F": 1, "K": 2, "I": 8}, "R": (64,),
    "check": {"P": 40, "G": 2, "R": 130, "F": 1, "K": 2, "I": 8},
    "hq": 2, "hkv": 1, "d": 16, "hidden": 24, "mlp": 40,
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
        rows = [root_path(self.tree, segment) for segment in sampled]
        self.rows = sorted(rows, key=len)  # token indices of each conversation

    def tokens(self, name):
        """Tokens that an implementation takes."""
        if name.startswith("flex"):
            return triton.cdiv(self.tree.num_tokens, 2 * BLOCK) * 2 * BLOCK
        return sum(map(len, self.rows)) if name in ROWS else self.tree.num_tokens

    def conversations(self, name):
        """Of each, its token indices in the implementation's stream."""
        if name not in ROWS:
            return self.rows
        return torch.arange(self.tokens(name)).split(list(map(len, self.rows)))

    def pairs(self, name):
        """Pairs that it computes."""
        if name in ROWS:
            return sum(len(row) * (len(row) + 1) // 2 for row in self.rows)
        return self.tree.visible_pairs()

    def positions(self, name):
        positions = self.tree.position_ids
        return (positions[torch.cat(self.rows)] if name in ROWS else positions).to(DEVICE)


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


def flex(job, flash=False):
    # FlashAttention-4's block of queries on sm_100 is two tiles of 128.
    q_block = 2 * BLOCK if flash and torch.cuda.get_device_capability()[0] == 10 else BLOCK
    mask = block_mask(job.tree, job.tokens("flex"), q_block)
    flex = partial(flex_attention, kernel_options={"BACKEND": "FLASH"}) if flash else flex_attention
    flex = flex if DEVICE == "cpu" else torch.compile(flex, dynamic=False)

    def run(q, k, v):
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return flex(q, k, v, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)

    return run


def block_mask(tree, tokens, q_block):
    """Full where every pair of a block is visible, partial where one may be, from the blocks' extremes."""
    end = F.pad(tree.subtree_end_of_token, (0, tokens - tree.num_tokens))  # nothing sees the padding
    min_end, max_end = end.view(-1, BLOCK).amin(1), end.view(-1, BLOCK).amax(1)
    q_first, k_first = torch.arange(0, tokens, q_block)[:, None], torch.arange(0, tokens, BLOCK)[None, :]
    full = (k_first + BLOCK - 1 <= q_first) & (q_first + q_block <= min_end)
    partial = (k_first < q_first + q_block) & (q_first < max_end) & ~full

    def ordered(blocks):
        indices = blocks.int().argsort(dim=1, descending=True, stable=True).int()
        return blocks.sum(1).int()[None, None].to(DEVICE), indices[None, None].to(DEVICE)

    end = end.to(DEVICE)
    return BlockMask.from_kv_blocks(
        *ordered(partial),
        *ordered(full),
        BLOCK_SIZE=(q_block, BLOCK),
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
    lengths = list(map(len, job.rows))
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
    """Of [batch, tokens, H, D]; on CPU in fp32 at least."""
    dtype = q.dtype
    if DEVICE == "cpu":
        backend = SDPBackend.MATH
        q, k, v = (x.to(torch.promote_types(dtype, torch.float32)) for x in (q, k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).to(dtype)


ATTENTIONS = {name: partial(ours, impl=name.partition("_")[0]) for name in OURS}
ATTENTIONS |= {"flex": flex, "flex_flash": partial(flex, flash=True)}
ATTENTIONS |= {name: cudnn if name == "cudnn" else varlen for name in ROWS}


def missing(name):
    """What an implementation needs and this machine has not, if anything."""
    package = next((package for end, package in PACKAGES.items() if name.endswith(end)), None)
    if package is None:
        return None
    if DEVICE == "cpu":
        return "needs a GPU"
    try:
        found = importlib.util.find_spec(package) is not None
    except ImportError:  # of what it is a part of
        found = False
    return None if found else f"needs the package {package}, which is not installed"


@contextmanager
def flash_attention(name):
    """torch's flash attention is of the version that `name` ends in."""
    version = name.rpartition("_")[2].upper()
    if version not in ("FA3", "FA4"):
        yield
        return
    torch.nn.attention.activate_flash_attention_impl(version)
    try:
        yield
    finally:
        torch.nn.attention.restore_flash_attention_impl()


# ---- correctness


def check(shape, name):
    """Errors against fp64, and those of FlashAttention-2 on rows, of each result as a whole and of its worst token.

    ok: at most 1.2 times FlashAttention-2's, and 2 times for the worst token, which may have bad luck. On CPU, where
    its rows are computed in fp32 and only rounded: at most the spacing of DTYPE, and 4 times that.
    """
    job = Job(**shape["check"])
    rows = job.conversations(name)
    T, padded = 1 + max(int(row[-1]) for row in rows), job.tokens(name)
    inputs, do = random_inputs(T, shape)
    # Tokens past T, which FlexAttention's blocks need, have no part in what comes before them.
    padded_inputs = [pad(x, padded) for x in inputs]
    with flash_attention(name):
        actual = gradients(ATTENTIONS[name](job), padded_inputs, pad(do, padded), has_backward(name))
    exact = gradients(partial(definition, job, name), [x.double() for x in inputs], do.double())
    baseline = gradients(partial(attend_rows, rows), [x.float() for x in inputs], do.float())
    result = {"tokens": T}
    for what, a, b, e in zip(("o", "dq", "dk", "dv"), actual, baseline, exact, strict=False):
        (error, worst), (flash_error, flash_worst) = errors(a[:T], e), errors(b.to(DTYPE), e)
        bar, worst_bar = 1.2 * flash_error, 2 * flash_worst
        if DEVICE == "cpu":
            bar, worst_bar = torch.finfo(DTYPE).eps, 4 * torch.finfo(DTYPE).eps
        result[what] = {"error": error, "worst_token": worst, "flash_rows_error": flash_error}
        result[what] |= {"flash_rows_worst_token": flash_worst, "ok": error <= bar and worst <= worst_bar}
    return result | {"ok": all(x["ok"] for x in result.values() if isinstance(x, dict))}


def errors(actual, exact):
    """Relative: of the whole, and of the token with the largest. Tokens whose exact result is next to nothing, as dq is
    where there is one key to see, are measured against the others'."""
    error, size = ((x.double()).flatten(1).norm(dim=1) for x in (actual - exact, exact))
    typical = size.square().mean().sqrt()
    return (error.norm() / size.norm()).item(), (error / size.clamp_min(0.01 * typical)).max().item()


def definition(job, name, q, k, v):
    """What the implementation is to compute."""
    if name in ROWS:
        return attend_rows(job.conversations(name), q, k, v, lambda *row: causal(*row, SDPBackend.MATH))
    return tree_attention_reference(q, k, v, job.layout)


def gradients(attention, inputs, do, backward=True):
    """o, and where asked for dq, dk and dv."""
    inputs = [x.detach().requires_grad_(backward) for x in inputs]
    o = attention(*inputs)
    return [o.detach(), *(torch.autograd.grad(o, inputs, do) if backward else ())]


def pad(x, tokens):
    return F.pad(x.detach(), (0, 0, 0, 0, 0, tokens - len(x)))


def has_backward(name):
    return DEVICE == "cuda" or name != "flex"  # which has none on CPU


def flash_row(*row):
    """FlashAttention-2 of one row, in DTYPE."""
    return causal(*(x.to(DTYPE) for x in row)).to(row[0].dtype)


def attend_rows(rows, q, k, v, attention=flash_row):
    """Attention of each row; a token's output is that of its first row. Gradients add up in q's dtype."""
    outputs = q.new_zeros(q.shape)
    done = torch.zeros(len(q), dtype=torch.bool)
    for row in rows:
        o = attention(*(x[None, row.to(DEVICE)] for x in (q, k, v)))[0]
        new = ~done[row]
        outputs = outputs.index_put((row[new].to(DEVICE),), o[new.to(DEVICE)])
        done[row] = True
    return outputs


# ---- attention alone


def time_attention(shape, name, R, ragged):
    job = Job(R=R, ragged=ragged, **shape["tree"])
    attention = ATTENTIONS[name](job)
    inputs, do = random_inputs(job.tokens(name), shape)
    constants = [x.detach() for x in inputs]
    with flash_attention(name):
        times = {"forward": milliseconds(lambda: attention(*constants))}
        if has_backward(name):
            o = attention(*inputs)
            times["backward"] = milliseconds(lambda: torch.autograd.grad(o, inputs, do, retain_graph=True))
    pairs, own_pairs, predicted = job.tree.visible_pairs(), job.pairs(name), predict(shape, job, name)
    result = {"tokens": job.tokens(name), "pairs": pairs, "own_pairs": own_pairs}
    for i, (direction, ms) in enumerate(times.items()):
        flops = FLOPS_A_PAIR[i] * shape["hq"] * shape["d"]
        result[direction] = {
            "ms": ms,
            "useful_tflops": pairs * flops / ms / 1e9,
            "own_tflops": own_pairs * flops / ms / 1e9,
            "predicted_h100_ms": predicted and predicted[i],
        }
    return result


def milliseconds(run, rep=500):
    """Median of about `rep` ms of runs."""
    if DEVICE == "cuda":
        return triton.testing.do_bench(run, warmup=50, rep=rep, return_mode="median")
    start = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - start)


# ---- a decoder layer


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


def time_layer(shape, name, R):
    """A step with trees (ours), with packed rows, or with trees and no attention ("linear")."""
    job = Job(R=R, **shape["tree"])
    tokens, d = job.tokens(name), shape["d"]
    torch.manual_seed(0)
    layer = Layer(*(shape[key] for key in ("hidden", "mlp", "hq", "hkv", "d")))
    attention = no_attention if name == "linear" else ATTENTIONS[name](job)
    frequency = 1e6 ** (-torch.arange(0, d, 2, device=DEVICE) / d)
    angle = (job.positions(name)[:, None] * frequency)[:, None]  # [T, 1, D / 2]
    cos, sin = angle.cos().to(DTYPE), angle.sin().to(DTYPE)
    x, dy = random(tokens, shape["hidden"]).requires_grad_(), random(tokens, shape["hidden"], seed=1)

    def step():
        y = layer(x, cos, sin, attention)
        return torch.autograd.grad(y, [x, *layer.parameters()], dy)

    with flash_attention(name):
        peak = peak_gib(step)
        ms = milliseconds(step, rep=3000)
    result = {"weights": layer_weights(shape), "tokens": tokens, "ms": ms, "peak_gib": peak}
    if name == "linear":
        result["linear_tflops"] = 6 * result["weights"] * tokens / ms / 1e9
    return result | {"predicted_h100_ms": predict_layer(shape, job, name)}


def layer_weights(shape):
    hidden, d = shape["hidden"], shape["d"]
    norms = 2 * hidden + 2 * d
    return hidden * d * (2 * shape["hq"] + 2 * shape["hkv"]) + 3 * hidden * shape["mlp"] + norms


def peak_gib(run):
    """Beyond what was there before: activations and gradients."""
    if DEVICE == "cpu":
        run()
        return None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


# ---- predictions for an H100


def predict(shape, job, name):
    """(forward, backward) in ms of the attention, where there is a rate to predict from."""
    if name not in PREDICTED:
        return None
    flops = [n * job.pairs(name) * shape["hq"] * shape["d"] for n in FLOPS_A_PAIR]
    moved = merge_bytes(shape, job) if name.startswith("flash") else (0, 0)
    return [
        f / rate / 1e9 + 1e3 * n / PREDICTED_BANDWIDTH for f, rate, n in zip(flops, PREDICTED[name], moved, strict=True)
    ]


def predict_layer(shape, job, name):
    """ms of a decoder layer, forward and backward; name: "linear" for one without attention."""
    attention = [0.0] if name == "linear" else predict(shape, job, name)
    return attention and 6 * layer_weights(shape) * job.tokens(name) / PREDICTED_LINEAR / 1e9 + sum(attention)


def merge_bytes(shape, job):
    """(forward, backward): what `flash` reads and writes besides its varlen calls."""
    calls, *_ = read_varlen_work(job.tree.varlen_work)
    T = job.tree.num_tokens
    if len(calls) == 1:
        return 0, 0
    q_row, kv_row, lse_row = 2 * shape["hq"] * shape["d"], 2 * shape["hkv"] * shape["d"], 4 * shape["hq"]
    n_q, n_k = (sum(int(cu[-1]) for cu in lengths) for lengths in zip(*((c.cu_q, c.cu_k) for c in calls), strict=True))
    # Queries and keys that are not one range are gathered: read and written.
    gathered_q = sum(2 * int(call.cu_q[-1]) for call in calls if not isinstance(call.query, slice))
    gathered_k = sum(2 * int(call.cu_k[-1]) for call in calls if not isinstance(call.key, slice))
    rows = 4 * T * (len(calls) - 1)  # where each token's are
    forward = gathered_q * q_row + 2 * gathered_k * kv_row  # q; k and v
    forward += (n_q + T) * (q_row + lse_row) + rows  # o and lse
    backward = 3 * gathered_q * q_row + 2 * (n_q - T) * lse_row + 2 * gathered_k * kv_row  # do, q and o; lse; k and v
    backward += (n_q + T) * q_row + 2 * (n_k + T) * kv_row + 3 * rows  # dq; dk and dv
    return forward, backward


def break_even(shape, trees, rows):
    """The longest answers, to 100 tokens, for which a layer's step with trees takes no longer than with rows; None
    where that holds up to MOST_R."""

    def trees_win(R):
        job = Job(R=R, **shape["tree"])
        return predict_layer(shape, job, trees) <= predict_layer(shape, job, rows)

    low, high = 0, MOST_R // 100
    if trees_win(100 * high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if trees_win(100 * middle) else (low, middle)
    return 100 * low


def predictions():
    """The lines of kernels/README.md: the attention, a layer's step, and where trees stop winning."""
    names = ("triton", "flash", "flash_fa3", "flex", "varlen", "cudnn", "varlen_fa3")
    lines = ["| R | " + " | ".join(f"`{name}`" for name in names) + " | `flash` moves, GB |"]
    lines.append("|---:|" + "---:|" * (len(names) + 1))
    jobs = {R: Job(R=R, **REAL["tree"]) for R in PREDICTED_R}
    for R, job in jobs.items():
        cells = ["{:.1f} + {:.1f}".format(*predict(REAL, job, name)) for name in names]
        moved = "{:.1f} + {:.1f}".format(*(n / 1e9 for n in merge_bytes(REAL, job)))
        lines.append(f"| {R} | " + " | ".join(cells) + f" | {moved} |")

    trees, rows = ("triton", "flash_fa3"), ("varlen", "cudnn", "varlen_fa3")
    lines += ["", "| R | tokens, trees | tokens, rows | " + " | ".join(f"`{name}`" for name in (*trees, *rows)) + " | "]
    lines[-1] += " | ".join(f"rows / `{name}`" for name in trees) + " |"
    lines.append("|---:|" + "---:|" * (2 + len(trees) + len(rows) + len(trees)))
    for R, job in jobs.items():
        ms = {name: predict_layer(REAL, job, name) for name in (*trees, *rows)}
        fastest = min(ms[name] for name in rows)
        cells = [f"{job.tokens('triton'):,}", f"{job.tokens('varlen'):,}", *(f"{x:.1f} ms" for x in ms.values())]
        lines.append(f"| {R} | " + " | ".join([*cells, *(f"{fastest / ms[name]:.2f}" for name in trees)]) + " |")

    lines += ["", "| longest answers for which trees win | " + " | ".join(f"`{name}`" for name in rows) + " |"]
    lines.append("|---|" + "---:|" * len(rows))
    for name in trees:
        longest = [break_even(REAL, name, other) for other in rows]
        cells = [f"above {MOST_R:,}" if n is None else f"{n:,}" for n in longest]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return lines


# ---- launch configurations


def sweep_cases(shape, smoke):
    """Each kernel's, for this head dim, on ragged lengths. dQ and dK/dV are timed within one backward pass."""
    job = Job(R=shape["R"][0], ragged=True, **shape["tree"])
    inputs, do = random_inputs(job.tokens("triton"), shape)
    q, k, v = (x.detach() for x in inputs)
    rest = job.layout.subtree_end_of_token, job.layout.attention_work, shape["d"] ** -0.5
    result = launch.attention_op(q, k, v, *rest)
    for kernel in launch.KERNELS:

        def run(kernel=kernel):
            if kernel == "forward":
                return [launch.attention_op(q, k, v, *rest)[0]]
            return launch.attention_backward_op(do, q, k, v, *result, *rest)

        name = launch.config_name(kernel, shape["d"])
        yield from sweep(name, TILES[-2:] if smoke else TILES, run, milliseconds, DEVICE)
        save(Path(__file__).name, DEVICE, os.environ.get("OUT"), smoke)


# ---- the run


def main():
    if "--predict" in sys.argv[1:]:
        print(*predictions(), sep="\n")
        return
    smoke = "--smoke" in sys.argv[1:]
    if DEVICE == "cpu" and not smoke:
        sys.exit("no GPU: --smoke runs tiny shapes")
    # Compiled FlexAttention would free what a second backward pass over the same graph needs.
    torch._functorch.config.donated_buffer = False
    shape, out = SMOKE if smoke else REAL, os.environ.get("OUT")
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
    versions = {"device": device, "torch": torch.__version__, "triton": triton.__version__, "date": time.strftime("%F")}
    sweeps = "--sweep" in sys.argv[1:]
    name = f"{device}-{versions['date']}-tree_attention{'_sweep' if sweeps else ''}.json".replace(" ", "-")
    results = [] if smoke and not out else [Path(out or ROOT / "bench" / "results") / name]
    rates = ([] if smoke else [RATES_FILE]) + ([Path(out) / RATES_FILE.name] if out else [])

    records = []
    for record in sweep_cases(shape, smoke) if sweeps else run_cases(shape):
        records.append(record | versions)
        print(json.dumps(records[-1]), flush=True)
        write(results, records)
    if sweeps:
        return
    entry = rates_entry(records, shape)
    if entry is not None:
        write(rates, json.loads(RATES_FILE.read_text(encoding="utf-8")) | {device: entry})
    records.append({"case": "summary", "rates": entry, "rows_over_trees": step_ratios(records)} | versions)
    print(json.dumps(records[-1]), flush=True)
    write(results, records)


def run_cases(shape):
    """What table.py and the rates need first; in each part rows before ours, so that a ratio is one to all rows."""
    flex = [name for name in ATTENTIONS if name.startswith("flex")]
    others = [name for name in (*ROWS, *OURS) if name in ATTENTIONS]
    cases = [("correctness", check, name, {}) for name in others]
    for R in shape["R"]:
        cases += [("attention", time_attention, name, {"R": R, "ragged": True}) for name in others]
        cases += [("layer", time_layer, name, {"R": R}) for name in ("linear", *others)]
    cases += [("attention", time_attention, name, {"R": R, "ragged": False}) for R in shape["R"] for name in others]
    cases += [("correctness", check, name, {}) for name in flex]
    lengths = [{"R": R, "ragged": ragged} for R in shape["R"] for ragged in (True, False)]
    cases += [("attention", time_attention, name, arguments) for arguments in lengths for name in flex]
    right = {"linear"}
    for case, function, name, arguments in cases:
        checks = case == "correctness"
        if not checks and name not in right:
            continue
        lacks = missing(name) if checks else None
        if lacks:
            result = {"skipped": lacks}
        elif time.perf_counter() - START > LIMIT_S:
            result = {"error": f"not run: {LIMIT_S} s were over"}
        else:
            result = run_case(function, shape, name, arguments)
        if checks and result.get("ok"):
            right.add(name)
        yield {"case": case, "implementation": name, **arguments, **result}


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


def rates_entry(records, shape):
    """What device_rates.json will say of this device: our back-ends that ran and are right, and the fastest rows, at
    the first R, ragged."""
    R, last = shape["R"][0], records[-1]
    ran = [r for r in records if "error" not in r]
    timed = {r["implementation"]: r for r in ran if r["case"] == "attention" and r["R"] == R and r["ragged"]}
    linear = next((r for r in ran if (r["case"], r["implementation"], r.get("R")) == ("layer", "linear", R)), None)
    attention = {name: rates_of(timed[name], "useful_tflops") for name in BACKENDS if name in timed}
    rows = [rates_of(timed[name], "own_tflops") for name in ROWS if name in timed]
    if not attention or not rows or linear is None:
        return None
    return {
        "linear": rounded(linear["linear_tflops"]),
        "attention": attention,
        "fastest": max(attention, key=lambda name: both_directions(**attention[name])),
        "rows": max(rows, key=lambda rates: both_directions(**rates)),
        "source": f"bench/gpu/tree_attention.py, {last['date']}, torch {last['torch']}, triton {last['triton']}",
    }


def rates_of(record, tflops):
    return {direction: rounded(record[direction][tflops]) for direction in ("forward", "backward")}


def rounded(x):
    return float(f"{x:.4g}")


if __name__ == "__main__":
    main()
