"""What CIPO itself may teach a policy that it should not: copying, breaking right answers, length for reward.

Pure functions over a step's groups and anchors. Training logs `own_metrics` and raises `own_alarms`; `python -m
cipo_fast.audit own` takes the same from a run's rollouts, all steps together, with intervals. Correction gap, verbatim
copies and flips are those of cipo/metrics.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

from cipo_fast.audit.intervals import Estimate, bootstrap, mean, wilson
from cipo_fast.cipo.metrics import Metrics, batch_metrics
from cipo_fast.records import Anchor, Group, Rollout

T = TypeVar("T")
Centred = tuple[float, float]  # (reward, length) less their means in the answer's group
CAUSES = {
    "length_reward": (
        "the verifier finds a right answer in anything long (a list of candidates, many boxes)",
        "answers are cut off: rollout.max_tokens is too small, short ones alone can be right",
        "the loss favours long or short answers (loss normalisation)",
    ),
    "copies": (
        "the follow-up turn does not ask to think again (correction.followup)",
        "most attempts shown are right (replay.rho_max), keeping them is what is rewarded",
        "correction.context=anchor with correction.loss=ce: copying is the cheapest target",
    ),
    "breaks_right": (
        "the follow-up turn reads as a reproach: every attempt is changed (correction.followup)",
        "too few right attempts are shown (replay.rho_min), or correction.lambda_risk is too low",
        "the verifier is not stable: judge the run anew (python -m cipo_fast.judge RUN)",
    ),
}  # fmt: skip


def centred(groups: Iterable[Sequence[Rollout]]) -> list[Centred]:
    """(reward, length in tokens) of complete answers less their group's means: what is left is not that hard problems
    have long answers. Groups without two rewards or two lengths tell nothing and are left out."""
    pairs: list[Centred] = []
    for group in groups:
        whole = [r for r in group if not r.truncated]
        rewards, lengths = [r.reward for r in whole], [float(len(r.token_ids)) for r in whole]
        if len(set(rewards)) > 1 and len(set(lengths)) > 1:
            r0, l0 = sum(rewards) / len(whole), sum(lengths) / len(whole)
            pairs += [(r - r0, n - l0) for r, n in zip(rewards, lengths, strict=True)]
    return pairs


def correlation(pairs: Sequence[Centred]) -> float | None:
    """Pearson's, of values that are centred already; None where one of them does not vary."""
    rr, nn = sum(r * r for r, _ in pairs), sum(n * n for _, n in pairs)
    return sum(r * n for r, n in pairs) / math.sqrt(rr * nn) if rr > 0 and nn > 0 else None


def own_metrics(groups: Sequence[Group], anchors: Sequence[Anchor]) -> Metrics:
    """What cipo/metrics.py does not have yet, for a step: `audit/reward_length_corr` of rollouts within their groups,
    and `audit/correction_length_corr` of corrections within their anchor's."""
    return {
        "audit/reward_length_corr": correlation(centred(group.rollouts for group in groups)),
        "audit/correction_length_corr": correlation(centred(anchor.corrections for anchor in anchors)),
    }


def own_alarms(metrics: Metrics, corr: float = 0.5, copies: float = 0.5, broken: float = 0.5) -> dict[str, bool]:
    """Which of `CAUSES` a step's metrics show: reward-length correlation above `corr` either way, more than a share
    `copies` of corrections that repeat their attempt, more than `broken` of the corrections of right attempts wrong."""
    correlations = [metrics.get(f"audit/{name}_length_corr") for name in ("reward", "correction")]
    return {
        "length_reward": any(value is not None and abs(value) > corr for value in correlations),
        "copies": (metrics.get("correction/verbatim_copy") or 0) > copies,
        "breaks_right": (metrics.get("correction/right_to_wrong") or 0) > broken,
    }


def own_table(steps: Iterable[tuple[list[Group], list[Anchor]]]) -> dict[str, Estimate]:
    """The diagnostics of all steps together. Shares have Wilson's interval, the gap and correlations a bootstrap's."""
    gaps: list[tuple[str, float]] = []  # (problem, value)
    lengths: list[tuple[str, Centred]] = []
    shares = {key: [0, 0] for key in ("wrong_to_right", "right_to_wrong", "verbatim_copy")}  # [so many, of so many]
    for groups, anchors in steps:
        for group in groups:
            lengths += [(group.problem.id, pair) for pair in centred([group.rollouts])]
        for anchor in anchors:
            alone = replace(anchor, group=0)
            found = batch_metrics([groups[anchor.group]], [alone], None)
            for key, share in shares.items():
                value = found[f"correction/{key}"]
                if value is not None:
                    share[0] += round(value * len(anchor.corrections))
                    share[1] += len(anchor.corrections)
            gap = found["correction/gap"]
            if gap is not None:
                gaps.append((anchor.rollout.problem.id, float(gap)))
    return {
        "correction gap (over a fresh retry)": clustered(gaps, mean),
        "wrong attempts corrected": wilson(*shares["wrong_to_right"]),
        "right attempts broken": wilson(*shares["right_to_wrong"]),
        "corrections that repeat the attempt": wilson(*shares["verbatim_copy"]),
        "correlation of reward and length": clustered(lengths, correlation),
    }


def clustered(pairs: Sequence[tuple[str, T]], statistic: Callable[[Sequence[T]], float | None]) -> Estimate:
    """`statistic` of values given with their problems."""
    return bootstrap([value for _, value in pairs], [problem for problem, _ in pairs], statistic)
