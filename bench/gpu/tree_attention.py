"""Tree attention on a GPU against what else could train CIPO's trees; one JSON line a case. torch and triton alone.

`python bench/gpu/tree_attention.py > bench/results/tree_attention_<device>.jsonl`, under 6 minutes; `--dry` runs tiny
shapes on any device, with Triton's interpreter where there is no GPU, and times nothing.

Shapes: a prompt of P tokens, G rollouts of R; below each of F rollouts I tokens of glue and K corrections of R.
Peers get what a trainer without the tree kernel would run: FlexAttention on the same stream, or one causal row a
conversation, packed (varlen, no padding) or as dense batches of equal rows (cuDNN). `useful_tflops` counts the visible
pairs of the tree for all of them, 4 D FLOPs a pair and query head forward, 10 D backward; `own_tflops` counts
the pairs an implementation itself had to compute.
"""

# ruff: noqa: E402, the interpreter is chosen before the imports

import argparse
import importlib.util
import inspect
import json
import os
import sys
from pathlib import Path

DRY = "--dry" in sys.argv
if DRY:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton kernels are defined

import torch
import torch.nn.functional as F
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

if importlib.util.find_spec("cipo_kernels") is None:  # not installed: the folder kernels/ is this package
    init = Path(__file__).parents[2] / "kernels" / "__init__.py"
    spec = importlib.util.spec_from_file_location("cipo_kernels", init, submodule_search_locations=[str(init.parent)])
    sys.modules["cipo_kernels"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["cipo_kernels"])
from cipo_kernels.tree_attention import tree_attention_reference
from cipo_kernels.tree_attention_triton import tree_attention_triton
from cipo_kernels.tree_layout import TreeLayout

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK = 128  # of the FlexAttention block mask

# Predicted TFLOP/s (forward, backward) on an H100, over the pairs each computes. tree: written before any run, from
# the offline artefacts (wgmma, no spills; 7 GEMMs backward where atomics would need 5). Others: d128 causal 8k in
# bf16, read off MagiAttention's charts; varlen is FlashAttention-2.
PREDICTED = {"tree": (380, 230), "flex": (370, 217), "varlen": (350, 302), "cudnn": (538, 426)}


def cipo_tree(P, G, R, F, K, I):  # noqa: E741
    """Lengths and parents in preorder."""
    lengths, parents = [P], [-1]
    for rollout in range(G):
        anchor = len(lengths)
        lengths, parents = [*lengths, R], [*parents, 0]
        if rollout < F:
            glue = len(lengths)
            lengths, parents = [*lengths, I, *[R] * K], [*parents, anchor, *[glue] * K]
    return lengths, parents


def rows_of(tree):
    """Token indices of each conversation, root to leaf."""
    parents = tree.parent.tolist()
    rows = []
    for leaf in sorted(set(range(len(parents))) - set(parents)):
        row, segment = [], leaf
        while segment >= 0:
            row.insert(0, torch.arange(int(tree.start[segment]), int(tree.end[segment])))
            segment = parents[segment]
        rows.append(torch.cat(row))
    return rows


def random_inputs(tokens, shape, seed=0):
    """q, k, v that require grad, and do."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float16
    heads = (shape["hq"], shape["hkv"], shape["hkv"], shape["hq"])
    q, k, v, do = (torch.randn(tokens, h, shape["d"], device=DEVICE, generator=generator, dtype=dtype) for h in heads)
    return [x.requires_grad_() for x in (q, k, v)], do


# ---- implementations: a function of q, k, v [tokens, H, D] that returns o, and how many tokens it takes


def tree_case(tree, rows):
    layout = tree.to(DEVICE)
    _ = layout.attention_work
    return lambda q, k, v: tree_attention_triton(q, k, v, layout), tree.num_tokens


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


def flex_case(tree, rows):
    tokens = triton.cdiv(tree.num_tokens, BLOCK) * BLOCK
    mask = block_mask(tree, tokens)
    flex = flex_attention if DEVICE == "cpu" else torch.compile(flex_attention, dynamic=False)

    def run(q, k, v):
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return flex(q, k, v, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)

    return run, tokens


def varlen_case(tree, rows):
    from torch.nn.attention.varlen import varlen_attn

    ends = torch.tensor([0, *map(len, rows)]).cumsum(0).int().to(DEVICE)
    longest = max(map(len, rows))
    options = {"window_size": (-1, 0), "enable_gqa": True, "is_causal": True}
    known = inspect.signature(varlen_attn).parameters
    if "window_size" in known:
        del options["is_causal"]
    options = {name: value for name, value in options.items() if name in known}
    return lambda q, k, v: varlen_attn(q, k, v, ends, ends, longest, longest, **options), sum(map(len, rows))


def cudnn_case(tree, rows):
    """Rows of one length form a batch."""
    lengths = list(map(len, rows))
    order = sorted(set(lengths))
    sizes = [length * lengths.count(length) for length in order]

    def run(q, k, v):
        outputs = []
        for length, *batch in zip(order, *(x.split(sizes) for x in (q, k, v)), strict=True):
            q_b, k_b, v_b = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in batch)
            with sdpa_kernel(SDPBackend.MATH if DEVICE == "cpu" else SDPBackend.CUDNN_ATTENTION):
                o = F.scaled_dot_product_attention(q_b, k_b, v_b, is_causal=True, enable_gqa=True)
            outputs.append(o.transpose(1, 2).flatten(0, 1))
        return torch.cat(outputs)

    return run, sum(lengths)


IMPLEMENTATIONS = {"tree": tree_case, "flex": flex_case, "varlen": varlen_case, "cudnn": cudnn_case}


# ---- correctness


def check(shape):
    """Errors against fp64 of the tree kernels and of flash attention on rows; ok: at most 1.2 times the latter.

    On CPU the rows are computed in fp32, a baseline that only rounds its results: ok says nothing there.
    """
    tree = TreeLayout.from_parents(*cipo_tree(**shape["check"]))
    (q, k, v), do = random_inputs(tree.num_tokens, shape)
    layout = tree.to(DEVICE)
    exact = gradients(lambda *x: tree_attention_reference(*x, layout), [x.double() for x in (q, k, v)], do.double())
    actual = gradients(lambda *x: tree_attention_triton(*x, layout), (q, k, v), do)
    flash = gradients(lambda *x: attend_rows(*x, rows_of(tree), do.dtype), [x.float() for x in (q, k, v)], do.float())
    result = {"case": "correctness", "tokens": tree.num_tokens}
    for name, a, f, e in zip(("o", "dq", "dk", "dv"), actual, flash, exact, strict=True):
        error, flash_error = (((x.double() - e).norm() / e.norm()).item() for x in (a, f))
        result[name] = {"error": error, "flash_rows_error": flash_error, "ok": error <= 1.2 * flash_error}
    result["ok"] = all(result[name]["ok"] for name in ("o", "dq", "dk", "dv"))
    return result


def gradients(attention, inputs, do):
    inputs = [x.detach().requires_grad_() for x in inputs]
    o = attention(*inputs)
    return [o.detach(), *torch.autograd.grad(o, inputs, do)]


def attend_rows(q, k, v, rows, dtype):
    """Flash attention of each row in dtype; a token's output is that of its first row. Gradients add up in fp32."""
    outputs = q.new_empty(q.shape)
    done = torch.zeros(len(q), dtype=torch.bool)
    for row in rows:
        q_r, k_r, v_r = (x[row.to(DEVICE)].to(dtype).transpose(0, 1)[None] for x in (q, k, v))
        with sdpa_kernel(SDPBackend.MATH if DEVICE == "cpu" else SDPBackend.FLASH_ATTENTION):
            o = F.scaled_dot_product_attention(q_r, k_r, v_r, is_causal=True, enable_gqa=True)[0].transpose(0, 1)
        new = ~done[row]
        outputs = outputs.index_put((row[new].to(DEVICE),), o[new.to(DEVICE)].to(q.dtype))
        done[row] = True
    return outputs


# ---- time


def time_case(name, tree, rows, shape):
    """Milliseconds (forward, backward): medians."""
    attention, tokens = IMPLEMENTATIONS[name](tree, rows)
    inputs, do = random_inputs(tokens, shape)
    constants = [x.detach() for x in inputs]

    def forward():
        attention(*constants)

    def backward():
        torch.autograd.grad(o, inputs, do, retain_graph=True)

    if DRY:
        forward()
        return None, None
    o = attention(*inputs)
    return tuple(triton.testing.do_bench(f, warmup=50, rep=300, return_mode="median") for f in (forward, backward))


def report(name, R, tree, rows, shape):
    flops = [shape["hq"] * shape["d"] * per_pair for per_pair in (4, 10)]  # a visible pair
    pairs = tree.visible_pairs()
    own_pairs = pairs if name in ("tree", "flex") else sum(len(row) * (len(row) + 1) // 2 for row in rows)
    result = {"case": "time", "implementation": name, "R": R, "tokens": tree.num_tokens, "pairs": pairs}
    try:
        times = time_case(name, tree, rows, shape)
    except Exception as error:  # a peer that this machine or version lacks
        if name == "tree":
            raise
        return result | {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    for direction, ms, flop, rate in zip(("forward", "backward"), times, flops, PREDICTED[name], strict=True):
        prediction = {"h100_ms": round(own_pairs * flop / rate / 1e9, 3), "h100_own_tflops": rate}
        measured = (
            {"ms": ms}
            if ms is None
            else {
                "ms": round(ms, 3),
                "useful_tflops": round(pairs * flop / ms / 1e9, 1),
                "own_tflops": round(own_pairs * flop / ms / 1e9, 1),
            }
        )
        result[direction] = measured | {"prediction": prediction}
    return result


REAL = {
    "hq": 32, "hkv": 8, "d": 128,
    "tree": {"P": 512, "G": 8, "F": 4, "K": 4, "I": 64}, "R": (1024, 2048, 4096),
    "check": {"P": 300, "G": 3, "R": 333, "F": 2, "K": 2, "I": 40},
}  # fmt: skip
TINY = {
    "hq": 2, "hkv": 1, "d": 16,
    "tree": {"P": 40, "G": 2, "F": 1, "K": 2, "I": 8}, "R": (64,),
    "check": {"P": 40, "G": 2, "R": 130, "F": 1, "K": 2, "I": 8},
}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="tiny shapes, no timing")
    shape = TINY if parser.parse_args().dry else REAL
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
    versions = {"device": device, "torch": torch.__version__, "triton": triton.__version__}
    checked = check(shape)
    print(json.dumps(checked | versions), flush=True)
    if DEVICE == "cuda" and not checked["ok"]:
        sys.exit("the tree kernels are wrong: nothing was timed")
    for R in shape["R"]:
        tree = TreeLayout.from_parents(*cipo_tree(R=R, **shape["tree"]))
        rows = rows_of(tree)
        for name in IMPLEMENTATIONS:
            print(json.dumps(report(name, R, tree, rows, shape) | versions), flush=True)
            if DEVICE == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
