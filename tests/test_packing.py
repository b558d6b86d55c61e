"""Trees and packs: every target exactly once, ancestors exact, capacity kept."""

import dataclasses
from collections import Counter

import pytest
import torch
from cipo_kernels.tree_attention import TreeLayout, layout, tree_attention
from conversations import random_conversations
from hypothesis import given, settings
from hypothesis import strategies as st

from cipo_fast.errors import UserError
from cipo_fast.packing import CostModel, Node, Pack, build_trees, make_pack, pack_trees, row_tokens, split_tree
from cipo_fast.records import Conversation, Segment

COST = CostModel(per_token=6.0, per_pair=1.0, per_target=2.0)
seeds = st.integers(0, 10**6)


def context_of_targets(pack: Pack) -> dict[tuple[int, int], tuple[tuple[int, ...], int]]:
    """(conversation, number of the target in it) -> (all tokens that the target's prediction sees in order, target)."""
    mask = pack.layout.dense_mask()
    found = {}
    seen: Counter[int] = Counter()
    for query, target, c in zip(
        pack.pred_index.tolist(), pack.target_id.tolist(), pack.conversation.tolist(), strict=True
    ):
        key = id(pack.conversations[c])
        visible = mask[query].nonzero().squeeze(1)
        assert pack.layout.position_ids[visible].tolist() == list(range(len(visible)))
        assert (key, seen[key]) not in found
        found[key, seen[key]] = (tuple(pack.input_ids[visible].tolist()), target)
        seen[key] += 1
    return found


def expected(conversations: list[Conversation]) -> dict[tuple[int, int], tuple[tuple[int, ...], int]]:
    found = {}
    for c in conversations:
        tokens = [t for segment in c.segments for t in segment.token_ids]
        n = len(c.segments[-1].token_ids)
        for i in range(n):
            at = len(tokens) - n + i
            found[id(c), i] = (tuple(tokens[:at]), tokens[at])
    return found


@settings(max_examples=60, deadline=None)
@given(seed=seeds, capacity=st.integers(24, 120), ranks=st.integers(1, 4), packing=st.sampled_from(["tree", "rows"]))
def test_every_target_is_in_one_pack_with_its_exact_ancestors(
    seed: int, capacity: int, ranks: int, packing: str
) -> None:
    conversations = random_conversations(seed, max_len=4)
    trees = build_trees(conversations, packing)
    capacity = max(capacity, *(tree.longest_path for tree in trees))
    packs = pack_trees(trees, capacity, COST, ranks)
    assert len({len(mine) for mine in packs}) == 1  # equally many a rank
    found = {}
    for members in (members for mine in packs for members in mine):
        pack = make_pack(members)
        if members:
            assert len(pack.input_ids) == sum(tree.num_tokens for tree in members) <= capacity
        targets = context_of_targets(pack)
        assert not targets.keys() & found.keys()
        found |= targets
    assert found == expected(conversations)


@settings(max_examples=30, deadline=None)
@given(seed=seeds)
def test_each_target_carries_its_conversations_numbers(seed: int) -> None:
    conversations = random_conversations(seed)
    pack = make_pack(build_trees(conversations))
    assert pack.target_counts == pack.conversation.bincount(minlength=len(pack.conversations)).tolist()
    for n, c in enumerate(pack.conversation.tolist()):
        conversation = pack.conversations[c]
        first = pack.conversation.tolist().index(c)
        assert pack.advantage[n] == torch.tensor(conversation.advantage, dtype=torch.float32)
        assert pack.rl_weight[n] == torch.tensor(conversation.rl_weight, dtype=torch.float32)
        assert pack.ce_weight[n] == torch.tensor(conversation.ce_weight, dtype=torch.float32)
        assert pack.sampler_logp[n] == torch.tensor(conversation.sampler_logps[n - first], dtype=torch.float32)


@settings(max_examples=30, deadline=None)
@given(seed=seeds, order=st.randoms(use_true_random=False))
def test_permuting_siblings_changes_nothing_but_order(seed: int, order) -> None:
    conversations = random_conversations(seed)
    trees = build_trees(conversations)
    before = context_of_targets(make_pack(trees))

    def shuffle(node: Node) -> None:
        order.shuffle(node.children)
        for child in node.children:
            shuffle(child)

    for tree in trees:
        shuffle(tree)
    order.shuffle(trees)
    assert context_of_targets(make_pack(trees)) == before


@settings(max_examples=30, deadline=None)
@given(seed=seeds)
def test_shared_tokens_are_stored_once(seed: int) -> None:
    conversations = random_conversations(seed)
    segments = {id(s): len(s.token_ids) for c in conversations for s in c.segments}
    trees = build_trees(conversations)
    assert sum(tree.num_tokens for tree in trees) == sum(segments.values())
    rows = build_trees(conversations, "rows")
    assert sum(tree.num_tokens for tree in rows) == row_tokens(conversations)


def chain(*lengths: int) -> Conversation:
    return Conversation(tuple(Segment([0] * n) for n in lengths), None, "rollout", 0.0, 1.0, 0.0)


def test_a_rollout_keeps_its_corrections_where_they_fit() -> None:
    prompt = Segment([1] * 10)
    conversations = []
    for _ in range(3):
        attempt, glue = Segment([2] * 10), Segment([3] * 2)
        conversations.append(Conversation((prompt, attempt), None, "rollout", 0.0, 1.0, 0.0))
        conversations += [
            Conversation((prompt, attempt, glue, Segment([4] * 4)), None, "correction", 0.0, 1.0, 0.0) for _ in range(2)
        ]
    pieces = split_tree(build_trees(conversations)[0], 30)
    assert [piece.num_tokens for piece in pieces] == [30, 30, 30]  # prompt, one attempt, its glue, both corrections
    # Below that one attempt's corrections must part; the attempt is repeated, its targets are not.
    pieces = split_tree(build_trees(conversations)[0], 26)
    attempts = [piece.children[0] for piece in pieces]
    assert [a.conversation is not None for a in attempts] == [True, False] * 3


def test_a_conversation_longer_than_a_pack_is_refused() -> None:
    with pytest.raises(UserError, match=r"train.pack_tokens=9 cannot hold one conversation of 10 tokens"):
        pack_trees(build_trees([chain(4, 6)]), 9, COST)


def test_packs_are_balanced_by_cost() -> None:
    trees = build_trees([chain(2, n) for n in (60, 50, 40, 30, 20, 10)])
    packs = pack_trees(trees, 120, COST, ranks=2)
    loads = [sum(COST.of(tree) for members in mine for tree in members) for mine in packs]
    assert max(loads) / sum(loads) < 0.6


def test_costs_count_tokens_targets_and_visible_pairs() -> None:
    tree = build_trees([chain(3, 2, 4)])[0]
    pairs = int(make_pack([tree]).layout.visible_pairs())
    assert pairs == 9 * 10 // 2
    assert COST.of(tree) == 9 * 6.0 + pairs * 1.0 + 4 * 2.0


def test_a_rank_without_work_gets_a_pack_that_weighs_nothing() -> None:
    packs = pack_trees(build_trees([chain(2, 3)]), 16, COST, ranks=3)
    assert [len(mine) for mine in packs] == [1, 1, 1]
    empty = make_pack(next(mine[0] for mine in packs if not mine[0]))
    assert len(empty.input_ids) == 1
    assert len(empty.target_id) == 0


@pytest.mark.parametrize("impl", ["triton", "flash"])
def test_no_work_list_is_built_in_a_forward_pass(monkeypatch: pytest.MonkeyPatch, impl: str) -> None:
    trees = build_trees(random_conversations(0))
    pack, without = make_pack(trees, impl), make_pack(trees, "torch")
    monkeypatch.setattr(layout, "tree_work", None)
    monkeypatch.setattr(layout, "varlen_work", None)

    def forward_and_backward(tree: TreeLayout) -> None:
        x = torch.ones(len(pack.input_ids), 1, 16, requires_grad=True)
        tree_attention(x, x, x, tree, impl=impl).sum().backward()

    forward_and_backward(pack.layout)
    moved = pack.to(torch.device("meta")).layout
    assert (moved.attention_work if impl == "triton" else moved.varlen_work)[0].is_meta
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        forward_and_backward(without.layout)


def test_where_there_is_a_gpu_packs_are_pinned_lists_and_all(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(x.clone()) or pinned[-1])
    pack = make_pack(build_trees(random_conversations(0)), "triton")
    found = {id(x) for x in pinned}
    fields = [getattr(pack, field.name) for field in dataclasses.fields(pack)]
    assert all(id(x) in found for x in fields if isinstance(x, torch.Tensor))
    assert {id(pack.layout.position_ids), id(pack.layout.subtree_end_of_token)} <= found
    assert pack.layout.attention_work[0].untyped_storage().data_ptr() in {
        x.untyped_storage().data_ptr() for x in pinned
    }
