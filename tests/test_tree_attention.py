"""Tree layouts against brute force over parents; tree attention against its definition and against plain rows."""

import math
import random

import pytest
import torch
import torch.nn.functional as F
from cipo_kernels.tree_attention import tree_attention, tree_attention_reference, tree_attention_torch
from cipo_kernels.tree_attention.layout import MAX_BLOCK_PAIRS, TreeLayout


def random_tree(rng, depth, max_length, max_children, parent=-1, first=0):
    """Lengths and parents of one tree of this depth, in preorder, its root being segment `first`."""
    lengths, parents = [rng.randint(1, max_length)], [parent]
    if depth > 1:
        for _ in range(rng.randint(1, max_children)):
            below = random_tree(rng, depth - 1, max_length, max_children, first, first + len(lengths))
            lengths, parents = lengths + below[0], parents + below[1]
    return lengths, parents


def forest(seed, depths, max_length=9, max_children=4):
    rng = random.Random(seed)
    lengths, parents = [], []
    for depth in depths:
        tree = random_tree(rng, depth, max_length, max_children, first=len(lengths))
        lengths, parents = lengths + tree[0], parents + tree[1]
    return lengths, parents


def cipo_tree(prompt, rollout, glue, correction, n_rollouts, n_corrections):
    """A prompt, its rollouts, and glue with corrections below the last of them."""
    lengths = [prompt] + [rollout] * n_rollouts + [glue] + [correction] * n_corrections
    parents = [-1] + [0] * n_rollouts + [n_rollouts] + [n_rollouts + 1] * n_corrections
    return lengths, parents


def ragged_cipo_trees(prompt, answer, glue, n_trees, n_rollouts=8, n_corrections=4):
    """Trees with lognormal lengths of these means and a spread of half of them; every second rollout is corrected."""
    rng = random.Random(0)
    lengths, parents = [], []

    def add(mean, parent):
        lengths.append(max(1, round(rng.lognormvariate(math.log(mean) - 0.125, 0.5))))
        parents.append(parent)
        return len(lengths) - 1

    for _ in range(n_trees):
        root = add(prompt, -1)
        for i in range(n_rollouts):
            rollout = add(answer, root)
            if i % 2 == 0:
                below = add(glue, rollout)
                for _ in range(n_corrections):
                    add(answer, below)
    return lengths, parents


STREAMS = {
    "one segment": ([40], [-1]),
    "one token": ([1], [-1]),
    "length-1 segments": ([1] * 40, [-1, 0, 1, 2, 2, 0, 0] + [6] * 20 + [-1, 27, 27] + [-1] * 10),
    "chain": ([3] * 30, list(range(-1, 29))),
    "depth 1": forest(1, [1] * 5),
    "depth 2": forest(2, [2] * 3),
    "depth 3": forest(3, [3, 1, 3]),
    "depth 4": forest(4, [4, 2]),
    "hundreds of tiny segments": forest(5, [2, 3, 2, 1, 4] * 4, max_length=3, max_children=6),
    "huge prompt": ([900] + [2] * 20, [-1] + [0] * 20),
    "embedded": cipo_tree(20, 9, 9, 9, 8, 8),
}


@pytest.fixture(params=STREAMS.values(), ids=STREAMS.keys())
def stream(request):
    return request.param


def segment_of_token(lengths):
    return [s for s, length in enumerate(lengths) for _ in range(length)]


def root_path(parents, segment):
    """The segment and its ancestors, root first."""
    path = []
    while segment >= 0:
        path.insert(0, segment)
        segment = parents[segment]
    return path


def qkv(num_tokens, heads=(4, 2), head_dim=16, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(num_tokens, h, head_dim, dtype=dtype, generator=generator).requires_grad_()
        for h in (heads[0], heads[1], heads[1])
    )


def with_gradients(attention, q, k, v, tree, **kwargs):
    """o, dq, dk, dv for a fixed random do of small integers, exact in every dtype."""
    o = attention(q, k, v, tree, **kwargs)
    do = torch.randint(-3, 4, o.shape, generator=torch.Generator().manual_seed(9)).to(o)
    return (o, *torch.autograd.grad(o, (q, k, v), do))


def assert_same(actual, expected, rtol=1e-10):
    """Within rtol of the largest element, or of 1, the inputs' scale: a sum's rounding error follows its terms."""
    for name, a, e in zip(("o", "dq", "dk", "dv"), actual, expected, strict=True):
        error, largest = (a - e).abs().max().item(), max(1.0, e.abs().max().item())
        assert error <= rtol * largest, f"{name}: error {error:.2e}, largest element {largest:.2e}"


# ---- layout


def test_mask_positions_and_pairs_by_walking_parents(stream):
    lengths, parents = stream
    tree = TreeLayout.from_parents(lengths, parents)
    segment = segment_of_token(lengths)
    paths = [set(root_path(parents, s)) for s in range(len(lengths))]
    mask = torch.tensor(
        [[k <= q and s_k in paths[s_q] for k, s_k in enumerate(segment)] for q, s_q in enumerate(segment)]
    )
    assert tree.num_tokens == sum(lengths)
    assert torch.equal(tree.dense_mask(), mask)
    assert torch.equal(tree.position_ids, mask.sum(1) - 1)
    assert tree.visible_pairs() == mask.sum().item()


def test_segment_arrays():
    tree = TreeLayout.from_parents(torch.tensor([3, 2, 1, 4, 5]), torch.tensor([-1, 0, 1, 0, -1]))
    assert tree.start.tolist() == [0, 3, 5, 6, 10]
    assert tree.end.tolist() == [3, 5, 6, 10, 15]
    assert tree.subtree_end.tolist() == [10, 6, 6, 10, 15]
    assert tree.parent.tolist() == [-1, 0, 1, 0, -1]
    assert tree.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 0, 1, 2, 3, 4]
    assert tree.subtree_end_of_token.tolist() == [10] * 3 + [6] * 3 + [10] * 4 + [15] * 5


@pytest.mark.parametrize(
    ("lengths", "parents", "message"),
    [
        ([], [], "0 lengths and 0 parents"),
        ([1, 2], [-1], "2 lengths and 1 parents"),
        ([1, 0], [-1, 0], "segment 1: length 0"),
        ([1, 1], [-1, 1], "segment 1: parent 1 is not an earlier segment"),
        ([1, 1], [1, -1], "segment 0: parent 1 is not an earlier segment"),
        ([1, 1], [-1, -2], "segment 1: parent -2 is not an earlier segment"),
        ([1] * 4, [-1, 0, 0, 1], "segment 3: its parent 1 was already closed"),
        ([1] * 3, [-1, -1, 0], "segment 2: its parent 0 was already closed"),
    ],
)
def test_refused_layouts(lengths, parents, message):
    with pytest.raises(ValueError, match=message):
        TreeLayout.from_parents(lengths, parents)


def test_query_blocks_hold_every_query_once_and_every_visible_key(stream):
    tree = TreeLayout.from_parents(*stream)
    queries = torch.cat([block.query.flatten() for block in tree.query_blocks])
    assert torch.equal(queries[tree.block_slot_of_token], torch.arange(tree.num_tokens))
    seen_T = torch.empty(tree.num_tokens, dtype=torch.int64)
    for block in tree.query_blocks:
        assert block.mask().any(2).all()  # padded queries too: no softmax over nothing
        seen_T[block.query] = block.mask().sum(2)
    assert torch.equal(seen_T, tree.position_ids + 1)


def test_finished_branches_are_not_computed():
    tree = TreeLayout.from_parents(*cipo_tree(512, 1024, 64, 1024, n_rollouts=8, n_corrections=4))
    computed = sum(block.mask().numel() for block in tree.query_blocks)
    assert computed < 1.5 * tree.visible_pairs()
    assert computed < 0.2 * tree.num_tokens**2
    assert all(block.mask().numel() <= MAX_BLOCK_PAIRS for block in tree.query_blocks)


# ---- attention


def test_torch_equals_reference_on_every_stream(stream):
    tree = TreeLayout.from_parents(*stream)
    q, k, v = qkv(tree.num_tokens)
    expected = with_gradients(tree_attention_reference, q, k, v, tree)
    assert_same(with_gradients(tree_attention_torch, q, k, v, tree), expected)


@pytest.mark.parametrize("head_dim", [16, 32, 64, 128])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (8, 1)], ids=["groups 1", "groups 2", "groups 8"])
def test_torch_equals_reference_for_heads(heads, head_dim):
    tree = TreeLayout.from_parents(*forest(6, [3, 2, 4]))
    q, k, v = qkv(tree.num_tokens, heads, head_dim)
    expected = with_gradients(tree_attention_reference, q, k, v, tree, scale=0.3)
    assert_same(with_gradients(tree_attention_torch, q, k, v, tree, scale=0.3), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_stays_near_fp64(dtype):
    tree = TreeLayout.from_parents(*forest(7, [3, 2, 4]))
    inputs = [x.detach().to(dtype).requires_grad_() for x in qkv(tree.num_tokens, head_dim=32)]
    exact = with_gradients(tree_attention_reference, *[x.detach().double().requires_grad_() for x in inputs], tree)
    for attention in (tree_attention_reference, tree_attention_torch):
        actual = with_gradients(attention, *inputs, tree)
        assert all(x.dtype == dtype for x in actual)
        # Probabilities, outputs and the sum over query heads are each rounded; sums over the stream grow by one fp32
        # rounding a summand, in an order that is the machine's, and those add up as a random walk does.
        rounding = 4 * torch.finfo(dtype).eps + tree.num_tokens**0.5 * torch.finfo(torch.float32).eps
        assert_same([x.double() for x in actual], exact, rtol=rounding)


@pytest.mark.parametrize("attention", [tree_attention_reference, tree_attention_torch])
def test_equals_each_root_path_as_a_causal_row(attention):
    lengths, parents = forest(8, [4, 3, 1, 2])
    tree = TreeLayout.from_parents(lengths, parents)
    q, k, v = (x.detach() for x in qkv(tree.num_tokens))
    o = attention(q, k, v, tree)
    starts = [sum(lengths[:s]) for s in range(len(lengths))]
    for leaf in set(range(len(lengths))) - set(parents):
        row = [t for s in root_path(parents, leaf) for t in range(starts[s], starts[s] + lengths[s])]
        q_row, k_row, v_row = (x[row].transpose(0, 1)[None] for x in (q, k, v))
        o_row = F.scaled_dot_product_attention(q_row, k_row, v_row, is_causal=True, enable_gqa=True)
        torch.testing.assert_close(o[row], o_row[0].transpose(0, 1), rtol=1e-10, atol=1e-12)


def test_one_segment_is_causal_attention():
    tree = TreeLayout.from_parents([300], [-1])

    def causal(q, k, v, tree):
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)

    inputs = qkv(300)
    expected = with_gradients(causal, *inputs, tree)
    assert_same(with_gradients(tree_attention_reference, *inputs, tree), expected)
    assert_same(with_gradients(tree_attention_torch, *inputs, tree), expected)


def test_recomputed_blocks_of_a_long_tree_equal_reference():
    lengths, parents = [2000, 700, 60, 500, 500, 340], [-1, 0, 1, 2, 2, 0]
    tree = TreeLayout.from_parents(lengths, parents)
    inputs = qkv(tree.num_tokens, heads=(2, 1))
    expected = with_gradients(tree_attention_reference, *inputs, tree)
    assert_same(with_gradients(tree_attention_torch, *inputs, tree), expected)


def test_long_tree_saves_less_than_a_square():
    T = 4096
    tree = TreeLayout.from_parents([T], [-1])
    saved = {}

    def pack(x):
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        o = tree_attention_torch(*qkv(T, heads=(1, 1), dtype=torch.float32), tree)
    assert o.isfinite().all()
    assert sum(saved.values()) < T * T  # bytes: a quarter of one fp32 [T, T], half the bound being key masks


@pytest.mark.parametrize("attention", [tree_attention_reference, tree_attention_torch])
@pytest.mark.parametrize("stream_name", ["depth 4", "hundreds of tiny segments", "embedded", "huge prompt"])
def test_perturbing_a_branch_leaves_the_others_bitwise(attention, stream_name):
    lengths, parents = STREAMS[stream_name]
    tree = TreeLayout.from_parents(lengths, parents)
    q, k, v = (x.detach() for x in qkv(tree.num_tokens, dtype=torch.float32))
    o = attention(q, k, v, tree)
    for segment in random.Random(0).sample(range(1, len(lengths)), 6):
        start, end, subtree_end = (int(x[segment]) for x in (tree.start, tree.end, tree.subtree_end))
        perturbed = [x.clone() for x in (q, k, v)]
        for x in perturbed:
            x[start:end] = x[start:end] * -30 + 5
        changed = (attention(*perturbed, tree) != o).any(2).any(1)
        assert changed[start:subtree_end].all()
        assert not changed[:start].any()
        assert not changed[subtree_end:].any()


@pytest.mark.parametrize("name", ["reference", "torch"])
def test_environment_chooses_the_implementation(monkeypatch, name):
    monkeypatch.setenv("CIPO_KERNELS", name)
    chosen = {"reference": tree_attention_reference, "torch": tree_attention_torch}[name]
    tree = TreeLayout.from_parents(*STREAMS["embedded"])
    inputs = qkv(tree.num_tokens, dtype=torch.float32)
    assert torch.equal(tree_attention(*inputs, tree), chosen(*inputs, tree))
    assert not torch.equal(tree_attention_reference(*inputs, tree), tree_attention_torch(*inputs, tree))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((5, 4, 8), (5, 2, 8), (5, 2, 8)), "the layout has 6 tokens, q has 5"),
        (((6, 4, 8), (6, 3, 8), (6, 3, 8)), "Hq a multiple of Hkv"),
        (((6, 4, 8), (6, 2, 8), (6, 4, 8)), r"expected \[T, Hq, D\]"),
        (((6, 4, 8), (6, 2, 4), (6, 2, 4)), r"expected \[T, Hq, D\]"),
    ],
)
def test_refused_shapes(shapes, message):
    tree = TreeLayout.from_parents([2, 4], [-1, 0])
    with pytest.raises(ValueError, match=message):
        tree_attention(*[torch.zeros(shape) for shape in shapes], tree)


def test_refused_device():
    tree = TreeLayout.from_parents([2, 4], [-1, 0])
    q, k, v = (x.detach().to("meta") for x in qkv(6))
    with pytest.raises(ValueError, match=r"move it with tree\.to"):
        tree_attention(q, k, v, tree)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_equals_cpu():
    tree = TreeLayout.from_parents(*forest(6, [3, 2, 4]))
    inputs = qkv(tree.num_tokens)
    expected = with_gradients(tree_attention_reference, *inputs, tree)
    on_cuda = [x.detach().cuda().requires_grad_() for x in inputs]
    actual = with_gradients(tree_attention, *on_cuda, tree.to("cuda"))
    assert_same([x.cpu() for x in actual], expected)
