"""Merging the varlen calls' results: the eager formulas, and the kernels on CUDA or interpreted, against fp64."""

import os

import pytest
import torch
from cipo_kernels.tree_attention import flash, tree_attention_reference
from cipo_kernels.tree_attention.flash import tree_attention_flash
from cipo_kernels.tree_attention.layout import TreeLayout
from cipo_kernels.tree_attention.merge import add, merge
from cipo_kernels.tree_attention.rectangles import read_varlen_work
from test_tree_attention import STREAMS, cipo_tree, forest, qkv, with_gradients

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read where the kernels are defined: before this import
merge_ops = pytest.importorskip("cipo_kernels.tree_attention.merge_kernels")

# The last block's rows past the last token end in 0 / 0; they are not stored.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

FP32 = torch.finfo(torch.float32).eps


def parts_of(n_parts, T, heads, head_dim, dtype, seed=0):
    """o, lse, row and n_rows: every part but the first covers some tokens, in any order, the last a single one."""
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randperm(T, generator=generator)[: max(1, T // (i + 1))] for i in range(1, n_parts)]
    tokens[-1] = tokens[-1][:1] if n_parts > 2 else tokens[-1]
    row = torch.full((n_parts - 1, T), -1, dtype=torch.int32)
    for row_i, tokens_i in zip(row, tokens, strict=True):
        row_i[tokens_i] = torch.arange(len(tokens_i), dtype=torch.int32)
    sizes = [T, *map(len, tokens)]
    o = [torch.randn(n, heads, head_dim, generator=generator).to(dtype) for n in sizes]
    lse = [10 * torch.randn(heads, n, generator=generator) for n in sizes]
    return o, lse, row, torch.tensor(sizes, dtype=torch.int32)


def exact_merge(o, lse, row):
    """o and lse, token by token, in fp64."""
    T, heads, head_dim = o[0].shape
    o_merged, lse_merged = torch.empty(T, heads, head_dim).double(), torch.empty(heads, T).double()
    for t in range(T):
        at = [(0, t)] + [(i + 1, int(r)) for i, r in enumerate(row[:, t]) if r >= 0]
        lse_t = torch.stack([lse[i][:, r] for i, r in at]).double()  # [parts of the token, heads]
        o_t = torch.stack([o[i][r] for i, r in at]).double()
        lse_merged[:, t] = lse_t.logsumexp(0)
        o_merged[t] = ((lse_t - lse_merged[:, t]).exp()[..., None] * o_t).sum(0)
    return o_merged, lse_merged


def exact_sum(parts, row):
    total = parts[0].double()
    for part, row_i in zip(parts[1:], row, strict=True):
        total[row_i >= 0] += part.double()[row_i[row_i >= 0]]
    return total


def assert_rounded_once(actual, exact, scale):
    """Half a unit in the last place, and what fp32 sums of numbers of size `scale` may be off by before."""
    assert actual.is_contiguous()
    error = (actual.cpu().double() - exact).abs()
    bound = torch.finfo(actual.dtype).eps / 2 * exact.abs() + 8 * FP32 * scale
    assert (error <= bound).all(), f"error {error.max():.2e}"


def on_device(o, *rest):
    o, *rest = ([x.to(DEVICE) for x in y] if isinstance(y, list) else y.to(DEVICE) for y in (o, *rest))
    return o, *rest


SHAPES = [(2, 1, 1, 16), (2, 130, 2, 128), (3, 17, 7, 40), (4, 33, 3, 8), (7, 50, 4, 64)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("n_parts", "T", "heads", "head_dim"), SHAPES)
def test_kernels_equal_fp64_rounded_once(n_parts, T, heads, head_dim, dtype, bfloat16_of_a_gpu):
    o, lse, row, n_rows = parts_of(n_parts, T, heads, head_dim, dtype)
    exact_o, exact_lse = exact_merge(o, lse, row)
    exact_dx = exact_sum(o, row)
    o, lse, row, n_rows = on_device(o, lse, row, n_rows)
    o_merged, lse_merged = merge_ops.merge_triton(o, lse, row, n_rows)
    dx = merge_ops.add_triton(o, row)
    assert (o_merged.dtype, lse_merged.dtype, dx.dtype) == (dtype, torch.float32, dtype)
    largest = max(x.abs().max().item() for x in o)
    # exp's error grows with its argument: lse of up to 50 are 3e-6 apart in fp32
    largest_lse = max(x.abs().max().item() for x in lse)
    assert_rounded_once(o_merged, exact_o, largest * (1 + largest_lse))
    assert_rounded_once(lse_merged, exact_lse, largest_lse)
    assert_rounded_once(dx, exact_dx, n_parts * largest)


@pytest.mark.parametrize(("n_parts", "T", "heads", "head_dim"), SHAPES)
def test_eager_equals_fp64(n_parts, T, heads, head_dim):
    o, lse, row, n_rows = parts_of(n_parts, T, heads, head_dim, torch.float64)
    lse = [x.double() for x in lse]
    for actual, exact in zip(merge(o, lse, row, n_rows), exact_merge(o, lse, row), strict=True):
        torch.testing.assert_close(actual, exact, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(add(o, row), exact_sum(o, row), rtol=1e-13, atol=1e-13)


def test_far_apart_parts():
    """Weights that underflow, and scores of size 1e4."""
    o, lse, row, n_rows = parts_of(4, 40, 2, 16, torch.float32)
    lse = [x + offset for x, offset in zip(lse, (-1e4, -100.0, 1e4, 0.0), strict=True)]
    exact_o, exact_lse = exact_merge(o, lse, row)
    actual_o, actual_lse = merge_ops.merge_triton(*on_device(o, lse, row, n_rows))
    assert_rounded_once(actual_lse, exact_lse, 1e4)
    assert_rounded_once(actual_o, exact_o, 1e3)  # lse are up to 1e-3 apart in fp32, where parts are near each other


def test_nan_stays_where_it_is():
    o, lse, row, n_rows = parts_of(3, 40, 2, 16, torch.float32)
    expected_o, expected_lse = merge_ops.merge_triton(*on_device(o, lse, row, n_rows))
    token = int(torch.nonzero(row[0] >= 0)[3])
    o[1][row[0, token]] = float("nan")
    lse[1][:, row[0, token]] = float("nan")
    actual_o, actual_lse = merge_ops.merge_triton(*on_device(o, lse, row, n_rows))
    others = torch.arange(40) != token
    assert actual_o[token].isnan().all()
    assert actual_lse[:, token].isnan().all()
    assert torch.equal(actual_o[others], expected_o[others])
    assert torch.equal(actual_lse[:, others], expected_lse[:, others])


def test_strided_parts():
    o, lse, row, n_rows = on_device(*parts_of(3, 40, 2, 16, torch.float32))
    heads_first = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in o]
    tokens_first = [x.T.contiguous().T for x in lse]
    actual = merge_ops.merge_triton(heads_first, tokens_first, row, n_rows)
    expected = merge_ops.merge_triton(o, lse, row, n_rows)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    assert torch.equal(merge_ops.add_triton(heads_first, row), merge_ops.add_triton(o, row))


# ---- within the back-end


STREAMS = STREAMS | {"cipo": cipo_tree(50, 60, 7, 30, n_rollouts=3, n_corrections=3), "deep": forest(11, [7, 5], 4, 2)}


@pytest.mark.skipif(DEVICE != "cpu", reason="the back-end's own path there")
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (7, 1)], ids=["groups 1", "groups 2", "groups 7"])
@pytest.mark.parametrize("name", ["one segment", "depth 4", "deep", "hundreds of tiny segments", "cipo"])
def test_flash_by_the_kernels_equals_reference(name, heads, monkeypatch):
    tree = TreeLayout.from_parents(*STREAMS[name])
    inputs = [x.detach().float().requires_grad_() for x in qkv(tree.num_tokens, heads, head_dim=24)]
    exact = with_gradients(tree_attention_reference, *[x.detach().double().requires_grad_() for x in inputs], tree)
    calls = []

    def kernel(function):
        return lambda *args: (calls.append(1), function(*args))[1]

    if len(read_varlen_work(tree.varlen_work).calls) > 1:
        monkeypatch.setattr(flash, "merge", kernel(merge_ops.merge_triton))
        monkeypatch.setattr(flash, "add", kernel(merge_ops.add_triton))
    actual = with_gradients(tree_attention_flash, *inputs, tree)
    for a, e in zip(actual, exact, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=1e-5)
    assert len(calls) == (0 if name == "one segment" else 4)  # o; dq, dk, dv


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="an interpreter runs programs one after another")
def test_two_runs_are_bitwise_equal():
    parts = on_device(*parts_of(4, 3000, 8, 128, torch.bfloat16))
    first, second = (merge_ops.merge_triton(*parts) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    first, second = (merge_ops.add_triton(parts[0], parts[2]) for _ in range(2))
    assert torch.equal(first, second)
