"""The Triton tree attention: its work lists by counting pairs, its results against the definition in fp64.

On CUDA where there is one, otherwise under Triton's interpreter, there with the bf16 of a GPU: left to itself it would
multiply bit patterns. fp32 has a configuration of its own on CUDA; what trains there is bf16.
"""

import os

import pytest
import torch
import torch.utils.checkpoint
from cipo_kernels.tree_attention import tree_attention, worklist
from cipo_kernels.tree_attention.layout import TreeLayout
from cipo_kernels.tree_attention.worklist import OWN_TILE, TILE, Item, TreeWork, tree_work
from test_tree_attention import STREAMS, cipo_tree, forest, qkv, ragged_cipo_trees
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read where the kernels are defined: before this import
triton_ops = pytest.importorskip("cipo_kernels.tree_attention.launch")
import triton  # noqa: E402
import triton.language as tl  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # rows of a tile past its last token: 0 / 0, not stored
    pytest.mark.usefixtures("bfloat16_of_a_gpu"),
]
either_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])

STREAMS = STREAMS | {
    "cipo": cipo_tree(150, 200, 64, 140, n_rollouts=2, n_corrections=2),
    "T % tile = 0": ([256, 128, 128], [-1, 0, 1]),
    "T % tile = 1": ([129, 128, 256], [-1, 0, 0]),
    "T % tile = tile - 1": ([127, 128, 256], [-1, 0, 0]),
    "first children after long ones": ([200, 150, 40, 170, 130, 9, 140], [-1, 0, 1, 1, 0, 4, 5]),
    "ragged": ragged_cipo_trees(60, 90, 12, n_trees=2, n_rollouts=3, n_corrections=2),
    "short after long": ([300, 2, 3, 200, 1], [-1, 0, 1, 0, -1]),
}


def attention_inputs(tree, heads=(2, 1), head_dim=64, dtype=torch.float32):
    """q, k, v and do."""
    q, k, v = (x.detach() for x in qkv(tree.num_tokens, heads, head_dim))
    do = torch.randn(q.shape, dtype=q.dtype, generator=torch.Generator().manual_seed(1))
    return [x.to(DEVICE, dtype) for x in (q, k, v, do)]


def run(tree, q, k, v, do, scale=None):
    """o, lse, dq, dk, dv of the kernels."""
    tree = tree.to(DEVICE)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    layout = tree.subtree_end_of_token, tree.attention_work
    o, lse = triton_ops.attention_op(q, k, v, *layout, scale)
    return o, lse, *triton_ops.attention_backward_op(do, q, k, v, o, lse, *layout, scale)


def exact(tree, q, k, v, do, scale=None):
    """o, lse, dq, dk, dv by autograd over the dense mask, in fp64."""
    q, k, v = (x.cpu().double().requires_grad_() for x in (q, k, v))
    scale = q.shape[2] ** -0.5 if scale is None else scale
    group = q.shape[1] // k.shape[1]
    k_THD, v_THD = (x.repeat_interleave(group, 1) for x in (k, v))
    s_HTT = (scale * torch.einsum("qhd,khd->hqk", q, k_THD)).masked_fill(~tree.dense_mask(), float("-inf"))
    o = torch.einsum("hqk,khd->qhd", s_HTT.softmax(-1), v_THD)
    grads = torch.autograd.grad(o, (q, k, v), do.cpu().double())
    return o.detach(), s_HTT.detach().logsumexp(-1), *grads


def ideal(tree, q, k, v, do, scale=None):
    """o, lse, dq, dk, dv in fp64, but for what has to be of the inputs' dtype: the results, and p and ds, which are
    operands of the second GEMMs. No computation in that dtype is expected to be nearer to `exact`."""
    dtype, scale = q.dtype, q.shape[2] ** -0.5 if scale is None else scale
    group = q.shape[1] // k.shape[1]
    q, k, v, do = (x.cpu().double() for x in (q, k, v, do))
    k_THD, v_THD = (x.repeat_interleave(group, 1) for x in (k, v))

    def rounded(x):
        return x.to(dtype).double()

    def of_key_heads(x):
        return x.unflatten(1, (-1, group)).sum(2)

    s = (scale * torch.einsum("qhd,khd->hqk", q, k_THD)).masked_fill(~tree.dense_mask(), float("-inf"))
    p = (s - s.amax(-1, keepdim=True)).exp()
    o = rounded(torch.einsum("hqk,khd->qhd", rounded(p), v_THD) / p.sum(-1).T[..., None])
    p = s.softmax(-1)
    ds = p * (torch.einsum("qhd,khd->hqk", do, v_THD) - (do * o).sum(-1).T[..., None])
    dq = scale * torch.einsum("hqk,khd->qhd", rounded(ds), k_THD)
    dk = scale * of_key_heads(torch.einsum("hqk,qhd->khd", rounded(ds), q))
    dv = of_key_heads(torch.einsum("hqk,qhd->khd", rounded(p), do))
    return o, s.logsumexp(-1), *map(rounded, (dq, dk, dv))


def assert_right(tree, inputs, scale=None):
    """fp32: near `exact`. Else: as good as `ideal`.

    Sums in fp32 move single roundings only: interpreted, errors as a whole are within 1% of `ideal`'s, and the worst
    token's within 25%. The bars of 10% and 50% are for a GPU, which adds up in another order. They notice a step of one
    program: `test_the_bars_notice_a_lost_step`.
    """
    actual, expected = run(tree, *inputs, scale=scale), exact(tree, *inputs, scale=scale)
    if inputs[0].dtype == torch.float32:
        assert_close(actual, expected, FP32)
    else:
        assert_as_good(actual, ideal(tree, *inputs, scale=scale), expected)


def assert_as_good(actual, ideal, expected):
    for name, a, i, e in zip(("o", "lse", "dq", "dk", "dv"), actual, ideal, expected, strict=True):
        if name == "lse":  # fp32 whatever the inputs
            assert (a.cpu() - e).abs().max() <= FP32 * max(1.0, e.abs().max().item())
            continue
        error, ideal_error, size = (x.flatten(1).norm(dim=1) for x in (a.cpu().double() - e, i - e, e))
        # A token may have next to no gradient, as dq of one that sees a single key: it is measured against the others'.
        size = size.clamp_min(max(0.01 * size.square().mean().sqrt().item(), FP32))
        whole, ideal_whole = error.norm() / size.norm(), ideal_error.norm() / size.norm()
        assert whole <= 1.1 * ideal_whole + FP32, f"{name}: error {whole:.2e}, ideally {ideal_whole:.2e}"
        worst, ideal_worst = (error / size).max(), (ideal_error / size).max()
        assert worst <= 1.5 * ideal_worst + FP32, f"{name}: worst token {worst:.2e}, ideally {ideal_worst:.2e}"


def assert_close(actual, expected, rtol):
    """Within rtol of the largest element, or of 1, the inputs' scale."""
    for name, a, e in zip(("o", "lse", "dq", "dk", "dv"), actual, expected, strict=True):
        error, largest = (a.cpu().double() - e).abs().max().item(), max(1.0, e.abs().max().item())
        assert error <= rtol * largest, f"{name}: error {error:.2e}, largest element {largest:.2e}"


def assert_equal(actual, expected):
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


FP32 = 1e-5  # sums of up to 1000 products of fp32 rounding 6e-8, and exp2 of scores up to 10


# ---- work lists


def all_keys(work):
    """The items of `by_key` and of `by_few_keys`."""
    return work.by_key._replace(item=torch.cat((work.by_key.item, work.by_few_keys)))


def pairs_met(work, tree, mask):
    """How often each pair (own token, streamed token) is met; what a mask hides is not."""
    met = torch.zeros(tree.num_tokens, tree.num_tokens, dtype=torch.int32)
    for first, stop, full_first, full_stop, masked_first, masked_stop, _ in work.item.tolist():
        assert stop - first <= OWN_TILE
        for x in work.full[full_first:full_stop].tolist():
            met[first:stop, x : x + TILE] += 1
        for x, x_stop in work.masked[masked_first:masked_stop].tolist():
            assert x_stop - x <= TILE
            met[first:stop, x:x_stop] += mask[first:stop, x:x_stop]
    return met


@pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS.keys())
def test_every_visible_pair_is_met_once(stream):
    tree = TreeLayout.from_parents(*stream)
    work = tree_work(tree.start, tree.end, tree.subtree_end, tree.parent)
    mask = tree.dense_mask()
    assert torch.equal(pairs_met(work.by_query, tree, mask), mask.int())
    assert torch.equal(pairs_met(all_keys(work), tree, mask.T), mask.T.int())
    own_first = work.by_query.item[:, Item.FIRST, None] + torch.arange(0, OWN_TILE, TILE)
    for row, (_, stop, *_, masked_stop, _) in zip(own_first.tolist(), work.by_query.item.tolist(), strict=True):
        row = [first for first in row if first < stop]  # the tile itself comes last, from its first token on
        assert work.by_query.masked[masked_stop - len(row) : masked_stop, 0].tolist() == row
    assert (work.by_key.item[:, Item.STOP] - work.by_key.item[:, Item.FIRST] > TILE).all()
    assert (work.by_few_keys[:, Item.STOP] - work.by_few_keys[:, Item.FIRST] <= TILE).all()


def tiles(side):
    """First and past the last token of each tile; one that is split has several items."""
    return sorted(set(map(tuple, side.item[:, :2].tolist())))


def test_segments_share_tiles_with_their_parent_where_that_is_free_and_short_ones_with_neighbours():
    tree = TreeLayout.from_parents([300, 2, 3, 200, 1], [-1, 0, 1, 0, -1])
    work = tree_work(tree.start, tree.end, tree.subtree_end, tree.parent)
    after_300 = [(305, 433), (433, 505), (505, 506)]
    # Queries: a first child sees what its parent sees. Keys: segment 1 is not an only child, 0 is also seen by 3.
    assert tiles(work.by_query) == [(0, 128), (128, 256), (256, 305), *after_300]
    assert tiles(all_keys(work)) == [(0, 128), (128, 256), (256, 300), (300, 305), *after_300]

    tree = TreeLayout.from_parents([300, 200, 150], [-1, 0, 1])  # only children: as one segment
    work = tree_work(tree.start, tree.end, tree.subtree_end, tree.parent)
    expected = [(i, min(i + OWN_TILE, 650)) for i in range(0, 650, OWN_TILE)]
    assert tiles(work.by_query) == tiles(all_keys(work)) == expected


def steps(tiles, config):
    """[n] steps of each item through its full tiles, and through its masked ones."""
    return tiles.n_full() * (TILE // config.step), tiles.n_masked() * (TILE // config.step)


def slots_by_query(work, config, group):
    """Score slots that forward or dQ computes a query head, and those of them with a mask."""
    n = work.item[:, Item.STOP] - work.item[:, Item.FIRST]
    full, masked = steps(work, config)
    slots, with_mask = 0, 0
    for row in range(0, OWN_TILE * group, config.own):  # a program's first, of the rows of a tile and key head
        wanted = row < n * group
        last = n.clamp(max=(row + config.own - 1) // group + 1)  # the number of queries up to that of its last row
        unseen = -(-n // TILE) * (TILE // config.step) - -(-last // config.step)
        slots += config.own * config.step * int((full + masked - unseen)[wanted].sum())
        with_mask += config.own * config.step * int((masked - unseen)[wanted].sum())
    return slots / group, with_mask / group


def slots_by_key(work, config):
    """Score slots that dK/dV computes a query head, and those of them with a mask."""
    slots, with_mask = 0, 0
    few_keys = work.by_key._replace(item=work.by_few_keys)
    for tiles, cfg, tile in ((work.by_key, config, OWN_TILE), (few_keys, triton_ops.few_keys(config), TILE)):
        own_first = tiles.item[:, Item.FIRST, None] + torch.arange(0, tile, cfg.own)
        rows = cfg.own * (own_first < tiles.item[:, Item.STOP, None]).sum(1)  # a part without keys does nothing
        full, masked = steps(tiles, cfg)
        slots += int((rows * (full + masked)).sum()) * cfg.step
        with_mask += int((rows * masked).sum()) * cfg.step
    return slots, with_mask


USED_CONFIGS = sorted(
    {
        (kernel, config)
        for configs in (triton_ops.CONFIGS, triton_ops.TMA_CONFIGS)
        for kernel, (small, large) in configs.items()
        for config in (small, large)
    }
)


# Mean answer -> slots computed a visible pair, and the share of them with a mask, at most.
RAGGED = {1024: (1.08, 0.1), 300: (1.2, 0.19)}
RAGGED_ALONE = {1024: (1.13, 0.11), 300: (1.34, 0.2)}  # by query, no other head having the same keys


@pytest.mark.parametrize("group", range(1, 9))
@pytest.mark.parametrize("answer", RAGGED)
def test_masks_are_few_by_query(answer, group):
    tree = TreeLayout.from_parents(*ragged_cipo_trees(512, answer, 64, n_trees=8))
    work = tree_work(tree.start, tree.end, tree.subtree_end, tree.parent).by_query
    most_slots, most_masked = (RAGGED if group > 1 else RAGGED_ALONE)[answer]
    for kernel, config in USED_CONFIGS:
        if kernel != "dkdv":
            slots, masked = slots_by_query(work, config, group)
            assert slots < most_slots * tree.visible_pairs()
            assert masked < most_masked * slots


@pytest.mark.parametrize("answer", RAGGED)
def test_masks_are_few_by_key(answer):
    tree = TreeLayout.from_parents(*ragged_cipo_trees(512, answer, 64, n_trees=8))
    work = tree_work(tree.start, tree.end, tree.subtree_end, tree.parent)
    most_slots, most_masked = RAGGED[answer]
    for kernel, config in USED_CONFIGS:
        if kernel == "dkdv":
            slots, masked = slots_by_key(work, config)
            assert slots < most_slots * tree.visible_pairs()
            assert masked < most_masked * slots


def test_masks_are_few_where_segments_fill_their_tiles():
    tree = TreeLayout.from_parents(*cipo_tree(512, 1024, 64, 1024, n_rollouts=8, n_corrections=4))
    work = tree_work(tree.start, tree.end, tree.subtree_end, tree.parent)
    for kernel, config in USED_CONFIGS:
        by_key = kernel == "dkdv"
        slots, masked = slots_by_key(work, config) if by_key else slots_by_query(work.by_query, config, 4)
        assert slots < (1.05 if by_key else 1.03) * tree.visible_pairs()
        assert masked < 0.1 * slots


def test_work_is_longest_first_and_its_largest_share_bounded():
    tree = TreeLayout.from_parents(*cipo_tree(512, 512, 64, 512, n_rollouts=8, n_corrections=4))
    work = tree_work(tree.start, tree.end, tree.subtree_end, tree.parent)
    for side in (work.by_query, work.by_key, work.by_key._replace(item=work.by_few_keys)):
        assert (worklist._cost(side).diff() <= 0).all()
    cost = worklist._cost(all_keys(work))
    largest = max(cost.sum() * worklist.MAX_SHARE, worklist.MIN_SPLIT)
    assert cost.max() <= largest + 2  # full and masked tiles are cut apart
    n = work.partial[:, 2]
    assert n.sum() == len(n) > 0
    assert sorted(slot for slot in all_keys(work).item[:, Item.SLOT].tolist() if slot >= 0) == list(range(len(n)))


class Elements(TorchDispatchMode):
    """Counts the elements of all that torch computes."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.count += sum(x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor))
        return result


@pytest.mark.parametrize("answer", [4, 40, 400])
def test_building_the_lists_takes_time_linear_in_segments(answer):
    counts = []
    for n_trees in (16, 64):
        tree = TreeLayout.from_parents(*ragged_cipo_trees(40, answer, 9, n_trees))
        with Elements() as elements:
            lists = tree.attention_work
        counts.append((elements.count, sum(x.numel() for x in lists)))
    for few, many in zip(*counts, strict=True):
        assert many < 4.2 * few  # of four times the segments


def test_lists_are_views_of_one_tensor_that_moves_in_one_copy():
    tree = TreeLayout.from_parents(*STREAMS["ragged"]).prepare("triton")
    expected = tree_work(tree.start, tree.end, tree.subtree_end, tree.parent).tensors()
    assert_equal(tree.attention_work, expected)
    storages = {x.untyped_storage().data_ptr() for x in tree.attention_work if len(x)}
    assert len(storages) == 1
    assert all(x.dtype == torch.int32 and x.data_ptr() % 16 == 0 for x in tree.attention_work)
    copies = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            copies.append(func) if func is torch.ops.aten._to_copy.default else None
            return func(*args, **(kwargs or {}))

    with Copies():
        moved = tree.to("meta")
    assert len(copies) == 3  # position_ids and subtree_end_of_token, too
    assert [(x.shape, x.device.type) for x in moved.attention_work] == [(x.shape, "meta") for x in expected]
    assert [x.shape for x in tree.to("meta").to("meta").varlen_work] == [x.shape for x in tree.varlen_work]


# ---- kernels


@either_dtype
@pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS.keys())
def test_equals_fp64_on_every_stream(stream, dtype):
    tree = TreeLayout.from_parents(*stream)
    assert_right(tree, attention_inputs(tree, dtype=dtype))


@pytest.mark.parametrize("head_dim", [16, 32, 64, 96, 128])
@pytest.mark.parametrize("heads", [(2, 2), (4, 1), (6, 2)], ids=["groups 1", "groups 4", "groups 3"])
def test_equals_fp64_for_heads(heads, head_dim):
    tree = TreeLayout.from_parents([150, 4, 30, 129], [-1, 0, 1, 0])
    assert_right(tree, attention_inputs(tree, heads, head_dim), scale=0.2)


@either_dtype
@pytest.mark.parametrize("heads", [(4, 2), (6, 2), (10, 2), (12, 2), (14, 2), (16, 2), (40, 1)], ids=str)
def test_programs_that_begin_and_end_within_a_query_equal_fp64(heads, dtype):
    """Their rows are queries of all heads of a key head, 128 or, in fp32 on a GPU, 32 of them: not all heads of one."""
    tree = TreeLayout.from_parents([70, 131, 5, 1, 33, 64, 17], [-1, 0, 1, 1, 0, 4, -1])
    assert_right(tree, attention_inputs(tree, heads, 24, dtype))


@pytest.mark.parametrize("head_dim", [16, 128])  # 64 and 96 in test_low_precision_stays_near_fp64
@pytest.mark.parametrize("heads", [(1, 1), (2, 1), (7, 1)], ids=["groups 1", "groups 2", "groups 7"])
def test_bf16_is_as_good_as_ideal_for_heads(heads, head_dim):
    tree = TreeLayout.from_parents([150, 4, 30, 129], [-1, 0, 1, 0])
    assert_right(tree, attention_inputs(tree, heads, head_dim, torch.bfloat16), scale=0.2)


@pytest.mark.parametrize("side", ["by query", "by key"])
@pytest.mark.parametrize("streamed", ["full", "masked"])
def test_the_bars_notice_a_lost_step(side, streamed):
    """One program of many leaves out its last tile."""
    tree = TreeLayout.from_parents([300, 2, 3, 200, 1], [-1, 0, 1, 0, -1]).to(DEVICE)
    inputs = attention_inputs(tree, head_dim=16, dtype=torch.bfloat16)
    work = TreeWork.of(tree.attention_work)
    work = work.by_query if side == "by query" else work.by_key
    n, stop = (work.n_full(), Item.FULL_STOP) if streamed == "full" else (work.n_masked(), Item.MASKED_STOP)
    work.item[int(torch.nonzero(n > 1)[-1]), stop] -= 1
    with pytest.raises(AssertionError, match="^dk: " if side == "by key" else "^o: "):
        assert_right(tree, inputs)


@pytest.mark.skipif(DEVICE != "cpu", reason="of the interpreter")
def test_interpreted_bf16_is_a_gpus():
    a, b = (torch.randn(32, 32, generator=torch.Generator().manual_seed(i)) for i in range(2))
    a[0, :3] = torch.tensor([float("nan"), float("inf"), 3.395e38])  # the last is above the largest bf16
    rounded, product = torch.empty(32, 32, dtype=torch.bfloat16), torch.empty(32, 32)
    round_and_multiply[(1,)](a, b, rounded, product)
    torch.testing.assert_close(rounded, a.bfloat16(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(product, a.bfloat16().float() @ b.bfloat16().float(), equal_nan=True)


@triton.jit
def round_and_multiply(a, b, rounded, product):
    i = tl.arange(0, 32)[:, None] * 32 + tl.arange(0, 32)[None, :]
    a_tile, b_tile = tl.load(a + i).to(tl.bfloat16), tl.load(b + i).to(tl.bfloat16)
    tl.store(rounded + i, a_tile)
    tl.store(product + i, tl.dot(a_tile, b_tile))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_low_precision_stays_near_fp64(dtype, head_dim):
    tree = TreeLayout.from_parents(*STREAMS["short after long"])
    inputs = attention_inputs(tree, head_dim=head_dim, dtype=dtype)
    actual = run(tree, *inputs)
    assert [x.dtype for x in actual] == [dtype, torch.float32, dtype, dtype, dtype]
    expected = exact(tree, *inputs)
    assert_close(actual, expected, 2 * torch.finfo(dtype).eps)  # p, ds and the results are rounded
    assert_as_good(actual, ideal(tree, *inputs), expected)


@pytest.mark.skipif(DEVICE != "cpu", reason="of the interpreter's tiles")
@pytest.mark.parametrize("config", [(128, 64, 8, 3, False), (64, 32, 4, 3, False), (32, 32, 8, 1, False)])
@pytest.mark.parametrize("heads", [(2, 1), (3, 1)], ids=["groups 2", "groups 3"])
def test_every_tile_shape_agrees(monkeypatch, heads, config):
    tree = TreeLayout.from_parents(*STREAMS["short after long"])
    inputs = attention_inputs(tree, heads, head_dim=32)
    expected = run(tree, *inputs)
    monkeypatch.setattr(triton_ops, "INTERPRETER_CONFIG", triton_ops.Config(*config))
    actual = run(tree, *inputs)
    if config[:2] == (128, 64):  # only the loads differ
        assert_equal(actual, expected)
    assert_close(actual, [x.cpu().double() for x in expected], FP32)


def test_split_and_unsplit_keys_agree(monkeypatch):
    stream = [400, 50, 200], [-1, 0, 0]
    unsplit, split = TreeLayout.from_parents(*stream), TreeLayout.from_parents(*stream)
    monkeypatch.setattr(worklist, "MIN_SPLIT", 10**6)
    assert len(unsplit.attention_work[-1]) == 0
    monkeypatch.setattr(worklist, "MIN_SPLIT", 4)
    assert len(split.attention_work[-1]) > 4
    inputs = attention_inputs(split, heads=(2, 1))
    expected = run(unsplit, *inputs)
    actual = run(split, *inputs)
    assert_equal(actual[:3], expected[:3])  # the queries are not split
    assert_close(actual, [x.cpu().double() for x in expected], FP32)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="an interpreter runs programs one after another")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_two_runs_are_bitwise_equal(monkeypatch, dtype):
    monkeypatch.setattr(worklist, "MIN_SPLIT", 4)
    tree = TreeLayout.from_parents([400, 50, 200], [-1, 0, 0])
    assert len(tree.attention_work[-1]) > 4  # partial results, too
    inputs = attention_inputs(tree, (8, 2), 128, dtype)
    assert_equal(run(tree, *inputs), run(tree, *inputs))


@either_dtype
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("stream_name", "where"),
    [("cipo", "qkv"), ("embedded", "qkv"), ("embedded", "v"), ("short after long", "qkv")],
)
def test_nan_in_a_segment_stays_visible(stream_name, where, value, dtype):
    """Nobody who sees it gets a number for it. Others of its tiles may get a nan, too: a run drops the whole update."""
    lengths, parents = STREAMS[stream_name]
    tree = TreeLayout.from_parents(lengths, parents)
    inputs = attention_inputs(tree, head_dim=32, dtype=dtype)
    segment = len(lengths) // 2
    bad = slice(int(tree.start[segment]), int(tree.end[segment]))
    for name, x in zip("qkv", inputs, strict=False):
        if name in where:
            x[bad] = value
    inputs[3][bad] = value  # as the output's gradient would be
    o, _, dq, dk, dv = run(tree, *inputs)

    sees = tree.dense_mask()[:, bad].any(1).to(DEVICE)  # tokens whose o depends on the bad ones
    assert not sees.all()
    assert not o[sees].isfinite().any()
    assert not dq[sees].isfinite().any()
    assert not dk[bad].isfinite().any()
    assert not dv[bad].isfinite().any()


def test_any_strides():
    tree = TreeLayout.from_parents(*STREAMS["depth 4"])
    inputs = attention_inputs(tree, heads=(4, 2), head_dim=16)
    inputs[3] = inputs[3][:1, :1, :1].expand_as(inputs[3])
    expected = run(tree, *[x.clone(memory_format=torch.contiguous_format) for x in inputs])
    heads_first = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs[:3]]
    assert_equal(run(tree, *heads_first, inputs[3]), expected)
    unaligned = [torch.cat((x[..., :1], x), 2)[..., 1:] for x in inputs[:3]]
    assert_equal(run(tree, *unaligned, inputs[3]), expected)


# ---- the operator


@pytest.fixture
def small():
    """tree, then q, k, v that require grad."""
    tree = TreeLayout.from_parents(*forest(6, [3, 2])).to(DEVICE)
    return tree, *(x.requires_grad_() for x in attention_inputs(tree, (4, 2), 16)[:3])


def test_opcheck(small):
    tree, q, k, v = small
    layout = tree.subtree_end_of_token, tree.attention_work, 0.25
    torch.library.opcheck(triton_ops.attention_op, (q, k, v, *layout))
    q, k, v = (x.detach() for x in (q, k, v))
    o, lse = triton_ops.attention_op(q, k, v, *layout)
    torch.library.opcheck(triton_ops.attention_backward_op, (torch.ones_like(o), q, k, v, o, lse, *layout))


def test_dispatch_runs_the_kernels(monkeypatch, small):
    monkeypatch.setenv("CIPO_KERNELS", "triton")
    tree, q, k, v = small
    o = tree_attention(q, k, v, tree)
    do = torch.ones_like(o)
    actual = (o, *torch.autograd.grad(o, (q, k, v), do))
    o, _lse, *grads = run(tree, *(x.detach() for x in (q, k, v)), do)
    assert_equal(actual, (o, *grads))


def test_fullgraph_compile(monkeypatch, small):
    monkeypatch.setenv("CIPO_KERNELS", "triton")
    tree = small[0]

    def layer(q, k, v, tree):
        return tree_attention(q * 2, k, v, tree).square()

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for layout in (tree, TreeLayout.from_parents(*forest(7, [2, 3])).to(DEVICE)):
        layout.prepare()
        q, k, v = (x.requires_grad_() for x in attention_inputs(layout, (4, 2), 16)[:3])
        expected = torch.autograd.grad(layer(q, k, v, layout).sum(), (q, k, v))
        assert_equal(torch.autograd.grad(compiled(q, k, v, layout).sum(), (q, k, v)), expected)


@pytest.mark.parametrize("save_output", [False, True])
def test_checkpointing(monkeypatch, small, save_output):
    """A policy that saves the operator's output runs it once; plain checkpointing runs it again."""
    tree, *inputs = small
    calls = []
    launch = triton_ops._launch
    monkeypatch.setattr(
        triton_ops, "_launch", lambda name, *args, **kw: (calls.append(name), launch(name, *args, **kw))
    )

    def layer(q, k, v):
        return triton_ops.tree_attention_triton(q * 2, k, v, tree).square()

    def contexts():
        return torch.utils.checkpoint.create_selective_checkpoint_contexts(
            [torch.ops.cipo_kernels.tree_attention.default] if save_output else []
        )

    expected = torch.autograd.grad(layer(*inputs).sum(), inputs)
    calls.clear()
    o = torch.utils.checkpoint.checkpoint(layer, *inputs, use_reentrant=False, context_fn=contexts)
    assert_equal(torch.autograd.grad(o.sum(), inputs), expected)
    assert calls == ["forward"] * (1 if save_output else 2) + ["dq", "dkdv"]


def test_second_derivatives_are_refused(small):
    tree, *inputs = small
    o = triton_ops.tree_attention_triton(*inputs, tree)
    with pytest.raises(RuntimeError, match="tree_attention can be differentiated once"):
        torch.autograd.grad(o.sum(), inputs, create_graph=True)


@pytest.mark.parametrize(
    ("head_dim", "dtypes", "scale", "message"),
    [
        (12, ["float32"] * 3, None, "head_dim 12: the Triton kernels take multiples of 8 up to 128"),
        (136, ["float32"] * 3, None, "head_dim 136"),
        (16, ["float32", "float16", "float32"], None, "k torch.float16"),
        (16, ["float64"] * 3, None, "expected one of float32, bfloat16 and float16"),
        (16, ["float32"] * 3, 0.0, "scale 0.0: the Triton kernels take positive ones"),
    ],
)
def test_refused(head_dim, dtypes, scale, message):
    tree = TreeLayout.from_parents([3], [-1]).to(DEVICE)
    q, k, v = (torch.zeros(3, 1, head_dim, dtype=getattr(torch, dtype), device=DEVICE) for dtype in dtypes)
    with pytest.raises(ValueError, match=message):
        triton_ops.tree_attention_triton(q, k, v, tree, scale=scale)


def test_interpreter_refuses_bf16():
    x = torch.zeros(3, 1, 16, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="bfloat16 on CPU"):
        triton_ops.tree_attention_triton(x, x, x, TreeLayout.from_parents([3], [-1]))
