"""What a step tells about its rollouts and corrections. None where there was nothing to count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from cipo_fast.cipo.advantages import no_variance, rewards_of
from cipo_fast.cipo.anchors import AnchorCounts
from cipo_fast.records import Anchor, Group, Rollout
from cipo_fast.verify import Verdict

Metrics = dict[str, float | int | None]
VERDICTS: tuple[str, ...] = get_args(Verdict)


def batch_metrics(groups: list[Group], anchors: list[Anchor], counts: AnchorCounts | None) -> Metrics:
    rollouts = [r for group in groups for r in group.rollouts]
    metrics: Metrics = {
        "rollout/accuracy": _mean([r.reward for r in rollouts]),
        "rollout/no_variance": _no_variance([group.rollouts for group in groups]),
        **_shape("rollout", rollouts),
    }
    corrections = [r for anchor in anchors for r in anchor.corrections]
    right = [r.reward for anchor in anchors if anchor.right for r in anchor.corrections]
    wrong = [r.reward for anchor in anchors if not anchor.right for r in anchor.corrections]
    retention, wrong_to_right = _mean(right), _mean(wrong)
    metrics |= {
        "correction/wrong_to_right": wrong_to_right,
        "correction/right_to_wrong": None if retention is None else 1 - retention,
        "correction/retention": retention,
        "correction/gap": correction_gap(groups, anchors),
        "correction/no_variance": _no_variance([anchor.corrections for anchor in anchors]),
        "correction/verbatim_copy": _mean(
            [float(r.text.strip() == anchor.rollout.text.strip()) for anchor in anchors for r in anchor.corrections]
        ),
        **_shape("correction", corrections),
    }
    if counts is not None:
        metrics |= {
            "anchors/right_wanted": counts.right_wanted,
            "anchors/right": counts.right,
            "anchors/wrong_wanted": counts.wrong_wanted,
            "anchors/wrong": counts.wrong,
            "anchors/dropped": counts.dropped,
        }
    return metrics


def verdict_metrics(groups: list[Group], anchors: list[Anchor], failed: int, sources: Sequence[str]) -> Metrics:
    """Shares of the judged answers by verdict, corrections among them; how many could not be judged; the accuracy of
    rollouts by source, where there are several sources."""
    rollouts = [r for group in groups for r in group.rollouts]
    metrics: Metrics = {**verdict_shares([*rollouts, *(r for anchor in anchors for r in anchor.corrections)])}
    metrics["verify/failed"] = failed
    for source in sources if len(sources) > 1 else ():
        metrics[f"source/{source}/accuracy"] = _mean([r.reward for r in rollouts if r.problem.source == source])
    return metrics


def verdict_shares(answers: Sequence[Rollout]) -> Metrics:
    return {f"verify/{verdict}": _mean([float(r.verdict == verdict) for r in answers]) for verdict in VERDICTS}


def nudge_metrics(groups: Sequence[Group]) -> Metrics:
    """Share of the rollouts that saw a hint, and the accuracy of those and of the others: does a hint help?"""
    rollouts = [r for group in groups for r in group.rollouts]
    return {
        "nudge/hinted": _mean([float(r.hint is not None) for r in rollouts]),
        "nudge/hinted_accuracy": _mean([r.reward for r in rollouts if r.hint is not None]),
        "nudge/bare_accuracy": _mean([r.reward for r in rollouts if r.hint is None]),
    }


def correction_gap(groups: list[Group], anchors: list[Anchor]) -> float | None:
    """Does showing a wrong attempt help more than trying afresh? Wrong-to-right rate minus the pass rate of the other
    rollouts (leave one out) of the same anchors' prompts, of those that saw no hint: a correction sees none [ours]."""
    gaps = []
    for anchor in anchors:
        rollouts = groups[anchor.group].rollouts
        others = [r.reward for i, r in enumerate(rollouts) if i != anchor.index and r.hint is None]
        if not anchor.right and anchor.corrections and others:
            fresh = sum(others) / len(others)
            gaps.append(sum(r.reward for r in anchor.corrections) / len(anchor.corrections) - fresh)
    return _mean(gaps)


def _shape(stream: str, rollouts: list[Rollout]) -> Metrics:
    return {
        f"{stream}/length": _mean([len(r.token_ids) for r in rollouts]),
        f"{stream}/truncated": _mean([float(r.truncated) for r in rollouts]),
    }


def _no_variance(groups: list[list[Rollout]]) -> float | None:
    return float(no_variance([rewards_of(group) for group in groups]).mean()) if groups else None


def _mean(values: list[float] | list[int]) -> float | None:
    return sum(values) / len(values) if values else None
