"""Rewards to advantages, group by group, in float64. Groups may differ in length: an answer that nobody could judge is
in none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from cipo_fast.records import Rollout

Array = np.ndarray
Groups = Sequence[Array]  # rewards or advantages: an array [n] for each group; a matrix [groups, n] is one such, too


def rewards_of(answers: Sequence[Rollout]) -> Array:
    """[n] float64, each of them 0 or 1: no other reward gets into the algorithm. RuntimeError for any other."""
    for answer in answers:
        if answer.reward not in (0.0, 1.0):
            raise RuntimeError(f"an answer to {answer.problem.id} has reward {answer.reward!r}: only 0 and 1 exist")
    return np.array([answer.reward for answer in answers], dtype=np.float64)


def group_advantages(rewards: Groups, *, scale: bool, eps: float) -> list[Array]:
    """(r - mean) / (std + eps) in each group of `rewards`; without std if not `scale` (Dr.GRPO).

    std is the sample standard deviation. A group without variance, such as one of a single answer, gets exactly 0.
    """
    return [_standardise(group, group, scale, eps) for group in rewards]


def shape_rewards(rewards: Groups, anchor_right: Sequence[bool] | Array, lambda_risk: float) -> list[Array]:
    """r' = r - lambda_risk * 1[anchor right and r = 0]: breaking a right answer costs extra [paper].

    rewards in {0, 1}, a group for each anchor; anchor_right [anchors] bool.
    """
    return [group - lambda_risk * (right & (group == 0)) for group, right in zip(rewards, anchor_right, strict=True)]


def correction_advantages(
    rewards: Groups,
    anchor_right: Sequence[bool] | Array,
    *,
    lambda_risk: float,
    risk_norm: Literal["literal", "raw_std", "pooled"],
    scale: bool,
    eps: float,
) -> list[Array]:
    """Advantages of corrections, a group for each anchor, with r' the shaped reward:

    literal  (r' - mean r') / (std r' + eps)  [f2f]. **lambda_risk has no effect here**: in a right-anchor group r' is
             affine in r, so the normalised advantages are the same for every lambda_risk. A control.
    raw_std  (r' - mean r') / (std r + eps)  [ours]: right-anchor groups weigh (1 + lambda_risk).
    pooled   (r' - b) / (std of r' over the batch + eps)  [ours], b = the batch's mean for right anchors and the group's
             for others: also punishes a right-anchor group that went all wrong.
    Without `scale` nothing is divided. Groups without variance get 0 in literal and raw_std.
    """
    shaped = shape_rewards(rewards, anchor_right, lambda_risk)
    if risk_norm == "literal":
        return [_standardise(group, group, scale, eps) for group in shaped]
    if risk_norm == "raw_std":
        return [_standardise(group, raw, scale, eps) for group, raw in zip(shaped, rewards, strict=True)]
    batch = np.concatenate(shaped) if shaped else np.zeros(0)
    if len(batch) < 2:
        return [np.zeros_like(group) for group in shaped]
    mean, spread = batch.mean(), (batch.std(ddof=1) + eps) if scale else 1.0
    return [
        (group - (mean if right else group.mean())) / spread for group, right in zip(shaped, anchor_right, strict=True)
    ]


def no_variance(rewards: Groups) -> Array:
    """[groups] bool: all rewards of the group are equal, so it teaches nothing."""
    return np.array([bool((group == group[:1]).all()) for group in rewards], dtype=bool)


def _standardise(values: Array, spread: Array, scale: bool, eps: float) -> Array:
    """(values - mean) / (std of `spread` + eps), exactly 0 where `spread` does not vary."""
    if (spread == spread[:1]).all():
        return np.zeros_like(values)
    centred = values - values.mean()
    return centred / (spread.std(ddof=1) + eps) if scale else centred
