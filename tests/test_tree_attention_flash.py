"""Tree attention by rectangles against its definition; on CPU, through torch's CPU flash kernel."""

import pytest
import torch
import torch.utils.checkpoint
from cipo_kernels.tree_attention import flash, tree_attention, tree_attention_reference
from cipo_kernels.tree_attention.flash import tree_attention_flash
from cipo_kernels.tree_attention.layout import TreeLayout
from cipo_kernels.tree_attention.rectangles import read_varlen_work
from test_tree_attention import STREAMS, assert_same, cipo_tree, forest, qkv, root_path, with_gradients

STREAMS = STREAMS | {
    "no descendants": ([5, 1, 40], [-1, -1, -1]),
    "chain under a branch": ([7, 3, 4, 5, 6, 2], [-1, 0, 1, 2, 0, 4]),
    "branch under a chain": ([7, 3, 4, 5, 6, 2], [-1, 0, 1, 1, -1, 4]),
    "cipo": cipo_tree(50, 60, 7, 30, n_rollouts=3, n_corrections=3),
}


@pytest.fixture(params=STREAMS.values(), ids=STREAMS.keys())
def stream(request):
    return request.param


def most_branch_points(parents):
    """Segments with several children above a segment: the depth of the tree once its chains are merged."""
    branches = {p for p in parents if p >= 0 and parents.count(p) > 1}
    return max(len(branches & set(root_path(parents, s)[:-1])) for s in range(len(parents)))


def calls_of(tree):
    return read_varlen_work(tree.varlen_work).calls


def rectangles(call, num_tokens):
    """The query and the key tokens of every rectangle of a call."""
    token = torch.arange(num_tokens)
    queries = token[call.query].split(call.cu_q.diff().tolist())
    keys = token[call.key].split(call.cu_k.diff().tolist())
    return list(zip(queries, keys, strict=True))


# ---- work lists


def test_rectangles_hold_every_visible_pair_once(stream):
    tree = TreeLayout.from_parents(*stream)
    met = torch.zeros(tree.num_tokens, tree.num_tokens, dtype=torch.int64)
    for call in calls_of(tree):
        for q, k in rectangles(call, tree.num_tokens):
            met[q[:, None], k] += (q[:, None] >= k) if call.causal else 1
        assert call.max_q == max(len(q) for q, _ in rectangles(call, tree.num_tokens))
        assert call.max_k == max(len(k) for _, k in rectangles(call, tree.num_tokens))
    assert torch.equal(met, tree.dense_mask().long())


def test_within_a_call_no_token_occurs_twice(stream):
    for call in calls_of(TreeLayout.from_parents(*stream)):
        for index in (call.query, call.key):
            assert isinstance(index, slice) or len(index.unique()) == len(index)


def test_calls_number_merged_depth_plus_one(stream, monkeypatch):
    lengths, parents = stream
    counts = {"forward": 0, "backward": 0}

    def counted(name, function):
        def call(*args):
            counts[name] += 1
            return function(*args)

        monkeypatch.setattr(flash, f"_varlen_{name}", call)

    counted("forward", flash._varlen_forward)
    counted("backward", flash._varlen_backward)
    tree = TreeLayout.from_parents(lengths, parents)
    with_gradients(tree_attention_flash, *qkv(tree.num_tokens), tree)
    expected = most_branch_points(parents) + 1
    assert counts == {"forward": expected, "backward": expected}


@pytest.mark.parametrize(
    ("name", "n_calls"),
    [("one segment", 1), ("no descendants", 1), ("chain", 1), ("depth 2", 2), ("depth 4", 4), ("cipo", 3)],
)
def test_calls_of_known_streams(name, n_calls):
    assert len(calls_of(TreeLayout.from_parents(*STREAMS[name]))) == n_calls


def test_rows_say_where_each_token_is(stream):
    tree = TreeLayout.from_parents(*stream)
    work = read_varlen_work(tree.varlen_work)
    token = torch.arange(tree.num_tokens)
    assert work.n_query_rows.tolist() == [len(token[call.query]) for call in work.calls]
    for name, rows in (("query", work.query_row), ("key", work.key_row)):
        for call, row in zip(work.calls[1:], rows, strict=True):
            tokens = token[getattr(call, name)]
            assert torch.equal(row[tokens], torch.arange(len(tokens), dtype=torch.int32))
            assert (row >= 0).sum() == len(tokens)


def test_one_range_of_tokens_is_read_in_place():
    _, below_root, below_branch = calls_of(TreeLayout.from_parents([20, 9, 9, 4, 5, 6, 9], [-1, 0, 0, 2, 3, 3, 0]))
    assert (below_root.query, below_root.key) == (slice(20, 62), slice(0, 20))
    assert (below_branch.query, below_branch.key) == (slice(42, 53), slice(29, 42))  # 9 and 4 are a chain
    _, of_two_trees = calls_of(TreeLayout.from_parents([5, 3, 3, 5, 3, 3], [-1, 0, 0, -1, 3, 3]))
    assert not isinstance(of_two_trees.query, slice)
    assert not isinstance(of_two_trees.key, slice)


def test_work_lists_are_built_once_a_layout():
    tree = TreeLayout.from_parents(*STREAMS["depth 3"])
    assert tree.varlen_work is tree.varlen_work


# ---- attention


def test_equals_reference_on_every_stream(stream):
    tree = TreeLayout.from_parents(*stream)
    inputs = qkv(tree.num_tokens)
    expected = with_gradients(tree_attention_reference, *inputs, tree)
    assert_same(with_gradients(tree_attention_flash, *inputs, tree), expected, rtol=1e-12)


@pytest.mark.parametrize("head_dim", [16, 64])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (7, 1), (8, 1)], ids=lambda heads: f"groups {heads[0] // heads[1]}")
def test_equals_reference_for_heads(heads, head_dim):
    tree = TreeLayout.from_parents(*forest(6, [3, 2, 4]))
    inputs = qkv(tree.num_tokens, heads, head_dim)
    expected = with_gradients(tree_attention_reference, *inputs, tree, scale=0.3)
    assert_same(with_gradients(tree_attention_flash, *inputs, tree, scale=0.3), expected, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_stays_near_fp64(dtype):
    tree = TreeLayout.from_parents(*STREAMS["cipo"])
    inputs = [x.detach().to(dtype).requires_grad_() for x in qkv(tree.num_tokens, head_dim=32)]
    exact = with_gradients(tree_attention_reference, *[x.detach().double().requires_grad_() for x in inputs], tree)
    actual = with_gradients(tree_attention_flash, *inputs, tree)
    assert all(x.dtype == dtype for x in actual)
    # probabilities, ds, and each call's outputs and gradients are rounded
    assert_same([x.double() for x in actual], exact, rtol=4 * torch.finfo(dtype).eps)


def test_scores_far_apart_do_not_overflow():
    tree = TreeLayout.from_parents(*STREAMS["cipo"])
    q, k, v = qkv(tree.num_tokens)
    inputs = [(30 * q).detach().requires_grad_(), (30 * k).detach().requires_grad_(), v]
    expected = with_gradients(tree_attention_reference, *inputs, tree)
    actual = with_gradients(tree_attention_flash, *inputs, tree)
    assert all(x.isfinite().all() for x in actual)
    assert_same(actual, expected)  # 1e-10: scores of 10^4 are rounded by 10^-12


@pytest.mark.parametrize("name", ["depth 4", "hundreds of tiny segments", "embedded", "branch under a chain"])
@pytest.mark.parametrize("sibling", ["another", "nan"])
def test_changing_a_branch_leaves_the_others_bitwise(name, sibling):
    tree = TreeLayout.from_parents(*STREAMS[name])
    inputs = qkv(tree.num_tokens, dtype=torch.float32)
    before = with_gradients(tree_attention_flash, *inputs, tree)
    leaf = int(torch.nonzero(tree.end == tree.subtree_end)[1])  # not the last of the stream
    start, end = int(tree.start[leaf]), int(tree.end[leaf])
    with torch.no_grad():
        for x in inputs:
            x[start:end] = float("nan") if sibling == "nan" else x[start:end] * -30 + 5
    o, dq, _, _ = with_gradients(tree_attention_flash, *inputs, tree)
    others = torch.ones(tree.num_tokens, dtype=torch.bool)
    others[start:end] = False
    assert not torch.equal(o[~others], before[0][~others])
    assert torch.equal(o[others], before[0][others])
    assert torch.equal(dq[others], before[1][others])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="one thread of a CPU cannot but repeat itself")
def test_gradients_of_two_runs_are_bitwise_equal():
    tree = TreeLayout.from_parents(*STREAMS["cipo"])
    inputs = [x.detach().cuda().requires_grad_() for x in qkv(tree.num_tokens, head_dim=128, dtype=torch.bfloat16)]
    torch.use_deterministic_algorithms(True)  # or FlashAttention-2 adds up dq with atomics
    try:
        first, second = (with_gradients(tree_attention_flash, *inputs, tree.to("cuda")) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_strided_inputs_and_gradient():
    tree = TreeLayout.from_parents(*STREAMS["depth 3"])
    T = tree.num_tokens
    packed = torch.randn(T, 8, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    inputs = [x.requires_grad_() for x in packed.split([4, 2, 2], 1)]  # q, k and v of one projection
    do = torch.ones((), dtype=torch.float64).expand(T, 4, 16)  # of o.sum()
    expected = torch.autograd.grad(tree_attention_reference(*inputs, tree), inputs, do)
    actual = torch.autograd.grad(tree_attention_flash(*inputs, tree), inputs, do)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


def test_create_graph_is_refused():
    tree = TreeLayout.from_parents([2, 4], [-1, 0])
    inputs = qkv(6)
    o = tree_attention_flash(*inputs, tree)
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        torch.autograd.grad(o.sum(), inputs, create_graph=True)


# ---- the operator


@pytest.fixture
def small():
    """tree, then q, k, v that require grad."""
    tree = TreeLayout.from_parents(*forest(6, [3, 2]))
    return tree, *qkv(tree.num_tokens, dtype=torch.float32)


def assert_equal(actual, expected):
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_opcheck(small):
    tree, q, k, v = small
    work = tree.varlen_work, 0.25
    torch.library.opcheck(flash.attention_op, (q, k, v, *work))
    q, k, v = (x.detach() for x in (q, k, v))
    o, lse = flash.attention_op(q, k, v, *work)
    torch.library.opcheck(flash.attention_backward_op, (torch.ones_like(o), q, k, v, o, lse, *work))


def test_fullgraph_compile(small):
    def layer(q, k, v, tree):
        return tree_attention(q * 2, k, v, tree, impl="flash").square()

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for tree in (small[0], TreeLayout.from_parents(*forest(7, [2, 3]))):  # another number of calls, too
        tree.prepare("flash")
        q, k, v = qkv(tree.num_tokens, dtype=torch.float32)
        expected = torch.autograd.grad(layer(q, k, v, tree).sum(), (q, k, v))
        assert_equal(torch.autograd.grad(compiled(q, k, v, tree).sum(), (q, k, v)), expected)


@pytest.mark.parametrize("save_output", [False, True])
def test_checkpointing(monkeypatch, small, save_output):
    """A policy that saves the operator's output runs it once; plain checkpointing runs it again."""
    tree, *inputs = small
    calls = []
    forward = flash._varlen_forward
    monkeypatch.setattr(flash, "_varlen_forward", lambda *args: (calls.append(1), forward(*args))[1])

    def layer(q, k, v):
        return tree_attention_flash(q * 2, k, v, tree).square()

    def contexts():
        return torch.utils.checkpoint.create_selective_checkpoint_contexts(
            [torch.ops.cipo_kernels.tree_attention_flash.default] if save_output else []
        )

    expected = torch.autograd.grad(layer(*inputs).sum(), inputs)
    calls.clear()
    o = torch.utils.checkpoint.checkpoint(layer, *inputs, use_reentrant=False, context_fn=contexts)
    assert_equal(torch.autograd.grad(o.sum(), inputs), expected)
    assert len(calls) == len(calls_of(tree)) * (1 if save_output else 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_stays_near_fp64(stream):
    tree = TreeLayout.from_parents(*stream)
    inputs = [x.detach().bfloat16().requires_grad_() for x in qkv(tree.num_tokens, head_dim=128)]
    exact = with_gradients(tree_attention_reference, *[x.detach().double().requires_grad_() for x in inputs], tree)
    on_cuda = [x.detach().cuda().requires_grad_() for x in inputs]
    actual = with_gradients(tree_attention_flash, *on_cuda, tree.to("cuda"))
    assert_same([x.cpu().double() for x in actual], exact, rtol=4 * torch.finfo(torch.bfloat16).eps)
