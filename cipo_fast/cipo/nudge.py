"""NudgeRL [arXiv 2605.15726]: some rollouts see a strategy hint after the problem, all of them teach the bare prompt.

    N rollouts a prompt, K = N / M a hint; of each hint's K, Binomial(K, dropout) see the bare prompt instead
    m_c = mean reward of the rollouts with hint c,  m = mean reward of the prompt's N
    a = (r - m_c) + between * (m_c - m)  with a hint,   a = r - m  without
    A = (a - mean a) / (population std a + eps)  over the prompt's N
    L = RL(rollouts, each after the prompt it was sampled from) + distill * L_d
    L_d = -1/R sum_i A_i 1/|y_i| sum_t log pi(y_it | bare prompt)      over the batch's R rollouts; A signed, no ratio

What the work leaves open [ours]: a problem with fewer than M hints is sampled bare, with the same advantages; a prompt
whose rewards are equal teaches nothing; with loss.scale_advantages=false nothing is divided, as elsewhere. Together
with corrections: an anchor's problem is shown bare whatever its attempt was sampled from, and pass rates, so tiers too,
are those of all N. The correction gap compares with the prompt's bare rollouts alone: cipo/metrics.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cipo_fast.cipo.advantages import Array
from cipo_fast.config import NudgeConfig
from cipo_fast.records import Group, Segment

Hint = int | None  # its place in the problem's `hints`; None: the bare prompt


def draw_hints(hints: Sequence[int], n: int, config: NudgeConfig, rng: np.random.Generator) -> list[Hint]:
    """What each of a problem's `n` rollouts sees, those of one prompt together, the bare ones first. `hints` are those
    that can be shown, `n` a multiple of M."""
    if len(hints) < config.hints:
        return [None] * n
    chosen = hints[: config.hints]
    if config.choose == "random":
        chosen = sorted(rng.choice(hints, config.hints, replace=False).tolist())
    k = n // config.hints
    bare = rng.binomial(k, config.dropout, size=config.hints).tolist()
    hinted: list[Hint] = [hint for hint, dropped in zip(chosen, bare, strict=True) for _ in range(k - dropped)]
    return [None] * sum(bare) + hinted


def nudge_advantages(rewards: Array, hints: Sequence[Hint], *, between: float, scale: bool, eps: float) -> Array:
    """A [n] float64 of one prompt's rollouts, from their rewards [n] and what each has seen."""
    if (rewards == rewards[:1]).all():
        return np.zeros_like(rewards)
    mean = rewards.mean()
    a = rewards - mean
    for hint in {hint for hint in hints if hint is not None}:
        members = np.array([other == hint for other in hints])
        of_hint = rewards[members].mean()
        a[members] = (rewards[members] - of_hint) + between * (of_hint - mean)
    centred = a - a.mean()
    return centred / (a.std() + eps) if scale else centred


def prompt_segments(group: Group) -> dict[Hint, tuple[Segment, ...]]:
    """The prompts of a group by hint, None the bare one. The tokens that all of them begin with (the template's, the
    problem's) are one segment, so that hinted and bare rollouts are one tree; the rest of each is its own, one token at
    least. Without hints the prompt is one segment."""
    prompts: dict[Hint, list[int]] = {None: group.prompt_ids}
    prompts |= {rollout.hint: rollout.prompt_ids for rollout in group.rollouts if rollout.hint is not None}
    if len(prompts) == 1:
        return {None: (Segment(group.prompt_ids),)}
    shortest = min(map(len, prompts.values()))
    shared = 0
    while shared < shortest - 1 and len({ids[shared] for ids in prompts.values()}) == 1:
        shared += 1
    common = (Segment(group.prompt_ids[:shared]),) if shared else ()
    return {hint: (*common, Segment(ids[shared:])) for hint, ids in prompts.items()}
