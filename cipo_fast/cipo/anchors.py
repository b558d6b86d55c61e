"""Which rollouts become anchors: right and wrong ones by rho, from prompts of medium pass rate first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from cipo_fast.cipo.advantages import rewards_of
from cipo_fast.config import CorrectionConfig
from cipo_fast.records import Anchor, Group, Rollout

# A rollout -> its correction prompt as (prompt_ids, glue_ids), or None where that does not fit.
PromptOf = Callable[[Rollout], tuple[list[int], list[int] | None] | None]


@dataclass(frozen=True)
class AnchorCounts:
    right_wanted: int
    wrong_wanted: int
    right: int
    wrong: int
    dropped: int  # correction prompt too long


def select_anchors(
    groups: list[Group],
    n_anchors: int,
    rho: float,
    config: CorrectionConfig,
    prompt_of: PromptOf,
    rng: np.random.Generator,
) -> tuple[list[Anchor], AnchorCounts]:
    """Choose `n_anchors` anchors, round(rho * n) of them right; a shortage on one side is filled from the other.

    The choice by rho and tiers is [f2f], the rest [ours]: within a tier every prompt gives one anchor before any gives
    a second, none gives more than `max_anchors_per_prompt`; truncated, empty and duplicate attempts are passed over.
    """
    pool = _Pool(groups, config, prompt_of, rng)
    right_wanted = round(rho * n_anchors)
    anchors = pool.take(right_wanted, right=True)
    anchors += pool.take(n_anchors - len(anchors), right=False)
    anchors += pool.take(n_anchors - len(anchors), right=True)
    anchors.sort(key=lambda anchor: (anchor.group, anchor.index))
    n_right = sum(anchor.right for anchor in anchors)
    counts = AnchorCounts(right_wanted, n_anchors - right_wanted, n_right, len(anchors) - n_right, pool.dropped)
    return anchors, counts


class _Pool:
    """The eligible rollouts of a batch, given out in the order of preference."""

    def __init__(self, groups: list[Group], config: CorrectionConfig, prompt_of: PromptOf, rng: np.random.Generator):
        self.groups = groups
        self.prompt_of = prompt_of
        self.cap = config.max_anchors_per_prompt
        self.taken = [0] * len(groups)
        self.dropped = 0
        pass_rates = [float(rewards_of(group.rollouts).mean()) for group in groups]
        self.tiers = order_prompts(pass_rates, config, rng)
        self.eligible = {
            right: [
                [i for i in rng.permutation(_eligible(group)).tolist() if (group.rollouts[i].reward > 0) == right]
                for group in groups
            ]
            for right in (True, False)
        }

    def take(self, count: int, right: bool) -> list[Anchor]:
        anchors: list[Anchor] = []
        for g in self._round_robin():
            if len(anchors) >= count:
                break
            anchor = self._next_of(g, right)
            if anchor is not None:
                anchors.append(anchor)
        return anchors

    def _round_robin(self) -> Iterator[int]:
        """Prompts tier by tier; within a tier those that have given fewer anchors first."""
        for tier in self.tiers:
            for given in range(self.cap):
                yield from (g for g in tier if self.taken[g] <= given)

    def _next_of(self, g: int, right: bool) -> Anchor | None:
        queue = self.eligible[right][g]
        while queue and self.taken[g] < self.cap:
            index = queue.pop()
            rollout = self.groups[g].rollouts[index]
            # What is shown back is the problem as it is asked, without the hint of one attempt [ours].
            prompt = self.prompt_of(replace(rollout, prompt_ids=self.groups[g].prompt_ids))
            if prompt is None:
                self.dropped += 1
                continue
            self.taken[g] += 1
            return Anchor(rollout, g, index, *prompt)
        return None


def order_prompts(pass_rates: list[float], config: CorrectionConfig, rng: np.random.Generator) -> list[list[int]]:
    """Prompt indices as tiers, the preferred first; random within a tier."""
    p = np.asarray(pass_rates, dtype=np.float64)
    if config.preference == "soft":  # [ours] weighted order without replacement: exponential races
        weight = (p * (1 - p) + 0.01) ** config.kappa
        return [np.argsort(rng.exponential(size=len(p)) / weight).tolist()]
    order = rng.permutation(len(p)).tolist()
    if config.preference == "uniform":
        return [order]
    medium = [i for i in order if config.tier_low <= p[i] <= config.tier_high]  # [f2f]
    return [medium, [i for i in order if i not in set(medium)]]


def _eligible(group: Group) -> list[int]:
    """Indices of rollouts that may be shown: complete, not empty, the first of equal ones."""
    seen: set[tuple[int, ...]] = set()
    indices = []
    for i, rollout in enumerate(group.rollouts):
        key = tuple(rollout.token_ids)
        if not rollout.truncated and rollout.text.strip() and key not in seen:
            seen.add(key)
            indices.append(i)
    return indices
