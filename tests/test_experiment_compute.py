"""What a run says that it computed, against counts by hand."""

from cipo_fast.packing import CostModel
from cipo_fast.records import Anchor, Group, Problem, Rollout
from cipo_fast.updates import sampling_work

FLOPS = CostModel(per_token=6.0, per_pair=14.0, per_target=600.0)


def rollout(prompt: list[int], n: int) -> Rollout:
    return Rollout(PROBLEM, prompt, list(range(n)), [0.0] * n, "text", 0.0, False, 0)


PROBLEM = Problem("p", ({"role": "user", "content": "?"},), "a", "test")


def test_a_shared_prefix_is_computed_once() -> None:
    """Two rollouts (2 and 3 tokens) of a prompt of 4; the first, and 1 token of follow-up, before corrections of 5 and
    6 tokens: 4 + 2 + 3 + 1 + 5 + 6 = 21 tokens, forward 2 FLOPs each; pairs by each token's depth, 4 FLOPs each; the
    head for 2 + 3 + 5 + 6 = 16 sampled tokens, 200 each."""
    prompt = [1, 2, 3, 4]
    group = Group(PROBLEM, prompt, [rollout(prompt, 2), rollout(prompt, 3)])
    anchor = Anchor(group.rollouts[0], 0, 0, prompt, [9])
    context = [*prompt, *group.rollouts[0].token_ids, 9]
    anchor.corrections = [rollout(context, 5), rollout(context, 6)]
    depths = [*range(1, 5), *range(5, 7), *range(5, 8), 7, *range(8, 13), *range(8, 14)]
    assert len(depths) == 21
    found = sampling_work([group], [anchor], FLOPS)
    assert found["tokens/sampled"] == 16
    assert found["flops/sample"] == 2 * 21 + 4 * sum(depths) + 200 * 16


def test_a_quoted_attempt_is_computed_again() -> None:
    """The correction prompt of 8 tokens is a tree of its own."""
    group = Group(PROBLEM, [1, 2], [rollout([1, 2], 2)])
    anchor = Anchor(group.rollouts[0], 0, 0, list(range(8)), None, [rollout(list(range(8)), 3)])
    found = sampling_work([group], [anchor], FLOPS)
    assert found["tokens/sampled"] == 5
    assert found["flops/sample"] == 2 * (4 + 11) + 4 * (sum(range(1, 5)) + sum(range(1, 12))) + 200 * 5
