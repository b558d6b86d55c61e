"""The adaptive replay ratio: rho, the share of right anchors, follows how well right answers stay right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cipo_fast.config import ReplayConfig


@dataclass(frozen=True)
class ReplayState:
    """What the controller remembers between steps, and a checkpoint keeps."""

    rho: float
    retention: float | None = None  # smoothed; None before the first update
    steps_below: int = 0  # in a row with retention < tau


def update_replay(state: ReplayState, kept: Sequence[float], config: ReplayConfig) -> ReplayState:
    """One step of the controller. `kept` holds the raw rewards (never shaped) of corrections of right anchors.

    ret = EMA(mean kept, ema_decay);  f1 = tau - ret;  f2 = max(0, ret_prev - ret);  f3 = min(steps below tau, 3)
    rho <- clip(rho * (1 + w1 f1 + w2 f2 + w3 f3), rho_min, rho_max)
    Fewer than n_min corrections: hold. f2 and f3 are one-sided, so noise ratchets rho upward; hence the smoothing.
    [f2f with ema_decay=0 and n_min=1; smoothing ours]
    """
    if not config.adaptive or len(kept) < config.n_min:
        return state
    mean = sum(kept) / len(kept)
    previous = state.retention
    retention = mean if previous is None else config.ema_decay * previous + (1 - config.ema_decay) * mean
    steps_below = state.steps_below + 1 if retention < config.tau else 0
    f1 = config.tau - retention
    f2 = max(0.0, (retention if previous is None else previous) - retention)
    f3 = min(steps_below, 3)
    rho = state.rho * (1 + config.w1 * f1 + config.w2 * f2 + config.w3 * f3)
    return ReplayState(min(max(rho, config.rho_min), config.rho_max), retention, steps_below)
