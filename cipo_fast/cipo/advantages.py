"""Rewards to advantages, group by group, in float64."""

from __future__ import annotations

from typing import Literal

import numpy as np

Array = np.ndarray


def group_advantages(rewards: Array, *, scale: bool, eps: float) -> Array:
    """(r - mean) / (std + eps) in each row of `rewards` [groups, G]; without std if not `scale` (Dr.GRPO).

    std is the sample standard deviation. A group without variance gets exactly 0.
    """
    return _standardise(rewards, rewards, scale, eps)


def shape_rewards(rewards: Array, anchor_right: Array, lambda_risk: float) -> Array:
    """r' = r - lambda_risk * 1[anchor right and r = 0]: breaking a right answer costs extra [paper].

    rewards [anchors, Gc] in {0, 1}; anchor_right [anchors] bool.
    """
    return rewards - lambda_risk * (anchor_right[:, None] & (rewards == 0))


def correction_advantages(
    rewards: Array,
    anchor_right: Array,
    *,
    lambda_risk: float,
    risk_norm: Literal["literal", "raw_std", "pooled"],
    scale: bool,
    eps: float,
) -> Array:
    """Advantages of corrections [anchors, Gc], with r' the shaped reward:

    literal  (r' - mean r') / (std r' + eps)  [f2f]. **lambda_risk has no effect here**: in a right-anchor group r' is
             affine in r, so the normalised advantages are the same for every lambda_risk. A control.
    raw_std  (r' - mean r') / (std r + eps)  [ours]: right-anchor groups weigh (1 + lambda_risk).
    pooled   (r' - b) / (std of r' over the batch + eps)  [ours], b = the batch's mean for right anchors and the group's
             for others: also punishes a right-anchor group that went all wrong.
    Without `scale` nothing is divided. Groups without variance get 0 in literal and raw_std.
    """
    if rewards.size == 0:
        return np.zeros_like(rewards)
    shaped = shape_rewards(rewards, anchor_right, lambda_risk)
    if risk_norm == "literal":
        return _standardise(shaped, shaped, scale, eps)
    if risk_norm == "raw_std":
        return _standardise(shaped, rewards, scale, eps)
    baseline = np.where(anchor_right, shaped.mean(), shaped.mean(axis=1))
    return (shaped - baseline[:, None]) / ((shaped.std(ddof=1) + eps) if scale else 1.0)


def no_variance(rewards: Array) -> Array:
    """[groups] bool: all rewards of the group are equal, so it teaches nothing."""
    return (rewards == rewards[:, :1]).all(axis=1)


def _standardise(values: Array, spread: Array, scale: bool, eps: float) -> Array:
    """(values - row mean) / (row std of `spread` + eps), exactly 0 where a row does not vary."""
    centred = values - values.mean(axis=1, keepdims=True)
    if scale:
        centred = centred / (spread.std(axis=1, ddof=1, keepdims=True) + eps)
    return np.where(no_variance(spread)[:, None], 0.0, centred)
