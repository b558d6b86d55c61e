"""The adaptive replay ratio: rho, the share of right anchors, follows how well right answers stay right.

docs/algorithm.md says why there are two rules, with a plot.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from cipo_fast.cipo.advantages import rewards_of
from cipo_fast.config import ReplayConfig
from cipo_fast.records import Anchor, Group


@dataclass(frozen=True)
class ReplayState:
    """What the controller remembers between steps, and a checkpoint keeps; older ones have no `attainable`."""

    rho: float
    retention: float | None = None  # smoothed; None before the first update
    steps_below: int = 0  # in a row with retention < tau; rule=literal alone counts them
    attainable: float | None = None  # smoothed: what a fresh retry of right anchors' problems attains


def update_replay(
    state: ReplayState, kept: Sequence[float], retried: float | None, config: ReplayConfig
) -> ReplayState:
    """One step of the controller. `kept` holds the raw rewards (never shaped) of corrections of right anchors,
    `retried` is `retry_rate` of the same anchors.

    ret = EMA(mean kept, ema_decay);  a = EMA(retried, ema_decay)

    literal     f1 = tau - ret;  f2 = max(0, ret_prev - ret);  f3 = min(steps below tau, 3)
                rho <- clip(rho * (1 + w1 f1 + w2 f2 + w3 f3), rho_min, rho_max)
                [f2f with ema_decay=0 and n_min=1; smoothing ours]. f2 and f3 are one-sided: noise ratchets rho upward,
                smoothed or not.
    attainable  rho <- clip(rho * exp(w1 (target - ret)), rho_min, rho_max),  target = a + tau_beyond (1 - a)
                [ours]. Errors that cancel leave rho exactly where it was. target - ret has the sign of tau_beyond less
                (ret - a) / (1 - a), retention corrected for chance as Cohen's kappa is, and no division by 1 - a.

    Fewer than n_min corrections, or nothing to compare them with: hold.
    """
    if not config.adaptive or len(kept) < config.n_min:
        return state
    retention = _smoothed(state.retention, sum(kept) / len(kept), config.ema_decay)
    attainable = state.attainable if retried is None else _smoothed(state.attainable, retried, config.ema_decay)
    new = replace(state, retention=retention, attainable=attainable)
    if config.rule == "attainable":
        target = retention_target(new, config)
        factor = 1.0 if target is None else math.exp(config.w1 * (target - retention))
    else:
        new = replace(new, steps_below=state.steps_below + 1 if retention < config.tau else 0)
        f1 = config.tau - retention
        f2 = max(0.0, (retention if state.retention is None else state.retention) - retention)
        f3 = min(new.steps_below, 3)
        factor = 1 + config.w1 * f1 + config.w2 * f2 + config.w3 * f3
    return replace(new, rho=min(max(state.rho * factor, config.rho_min), config.rho_max))


def retention_target(state: ReplayState, config: ReplayConfig) -> float | None:
    """The retention that the rule aims at; None as long as rule=attainable has measured nothing."""
    if config.rule == "literal":
        return config.tau
    return None if state.attainable is None else state.attainable + config.tau_beyond * (1 - state.attainable)


def retry_rate(groups: Sequence[Group], anchors: Sequence[Anchor]) -> float | None:
    """How often a fresh try at the right anchors' problems is right, at the same temperature: the mean over right
    anchors of E[p | k of n right], with p ~ Beta(M m, M (1 - m)) over the batch's problems [ours: empirical Bayes].

        m = mean k/n;  m2 = mean k(k-1) / (n(n-1)), which estimate E[p], E[p^2];  M = (m - m2) / (m2 - m^2)
        E[p | k of n right] = (M m + k) / (M + n);  m where problems do not differ, M = oo, and where all are
                              certain, M = 0, but this one has no try without a hint, n = 0

    Not the pass rate of an anchor's other rollouts: a prompt is chosen by its k, so k - 1 of n - 1 is no fresh sample
    (tests/test_replay.py: up to .13 off, this within .02). None without right anchors, or where no group has two
    rollouts.
    """
    tries = [rewards_of([r for r in group.rollouts if r.hint is None]) for group in groups]  # as corrections: no hint
    counts = [(float(rewards.sum()), len(rewards)) for rewards in tries]
    several = [(k, n) for k, n in counts if n > 1]
    chosen = [counts[anchor.group] for anchor in anchors if anchor.right and anchor.corrections]
    if not several or not chosen:
        return None
    m = sum(k / n for k, n in several) / len(several)
    m2 = sum(k * (k - 1) / (n * (n - 1)) for k, n in several) / len(several)
    if m2 - m * m <= 1e-9:
        return m
    strength = (m - m2) / (m2 - m * m)
    return sum((strength * m + k) / (strength + n) if strength + n else m for k, n in chosen) / len(chosen)


def _smoothed(previous: float | None, value: float, decay: float) -> float:
    return value if previous is None else decay * previous + (1 - decay) * value
