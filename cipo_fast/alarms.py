"""Alarms for a run that learns nothing, or learns from numbers that do not agree: named, with the likely causes."""

from __future__ import annotations

from collections.abc import Sequence

from cipo_fast.cipo.metrics import Metrics
from cipo_fast.records import Anchor, Group, Rollout

STREAMS = ("rollout", "correction")
NAMES = ("no_variance", "truncated", "no_anchors", "no_change", "mismatch")

ALL_WRONG = (
    "the verifier compares the whole answer, stripped, with the row's: look for a float, units, \\r or markup in it",
    "answers are longer than rollout.max_tokens",
    "the prompt or chat template does not ask for the bare answer",
    "the task is too hard for this model",
)
ALL_RIGHT = ("the problems are too easy for this model", "the prompt gives the answer away")
NOTHING_VARIES = ("rollout.temperature is too low: a prompt's answers are alike", "problems are too easy or too hard")
CAUSES = {
    "truncated": (
        "the token that ends an answer is not among the model's end ids",
        "rollout.max_tokens is too small",
        "the model repeats itself",
    ),
    "no_anchors": (
        "correction prompts are longer than correction.max_prompt_tokens (anchors/dropped)",
        "every attempt is truncated: raise rollout.max_tokens",
        "no attempt is of the kind wanted (replay.rho0, correction.preference)",
    ),
    "no_change": (
        "no answer has an advantage (alarm/no_variance)",
        "optim.lr or its schedule is at 0",
        "optim.lr is below what model.dtype can hold",
    ),
    "mismatch": (
        "the engine runs in another precision (rollout.vllm.fp32_head, quantised KV cache)",
        "rollout.top_p is below 1",
        "the engine's weights are old or wrong (sync.probe_every=1 shows it)",
    ),
}


class Alarms:
    """Fed with each step; an alarm is on from its `after`th step in a row (mismatch: from its first) and is said when
    it begins, and again every `after` steps. A resumed run counts anew.

    `outside`: the share of tokens whose ratio of trainer's to engine's probability lies outside [0.9, 1.1] above which
    mismatch is on."""

    def __init__(self, after: int, outside: float):
        self.after = after
        self.outside = outside
        self.steps = dict.fromkeys(NAMES, 0)  # in a row

    def step(self, metrics: Metrics, groups: Sequence[Group], anchors: Sequence[Anchor]) -> tuple[Metrics, list[str]]:
        """(`alarm/<name>`: 1 while it is on, else 0; the lines to say) after a step with those metrics and answers."""
        seen = {
            "no_variance": nothing_varies(metrics),
            "truncated": metrics.get("rollout/truncated") == 1,
            "no_anchors": _sum(metrics, "anchors/right_wanted", "anchors/wrong_wanted") > 0
            and _sum(metrics, "anchors/right", "anchors/wrong") == 0,
            "no_change": nothing_changed(metrics),
            "mismatch": mismatch(metrics) > self.outside,
        }
        flags: Metrics = {}
        lines = []
        for name, bad in seen.items():
            steps = self.steps[name] = self.steps[name] + 1 if bad else 0
            needed = 1 if name == "mismatch" else self.after
            flags[f"alarm/{name}"] = int(steps >= needed)
            if steps >= needed and (steps - needed) % self.after == 0:
                what, causes = self._explain(name, steps, metrics, groups, anchors)
                listed = ", ".join(f"({i}) {cause}" for i, cause in enumerate(causes, 1))
                lines.append(f"alarm, step {metrics['step']}: {name}: {what}. Likely causes, in order: {listed}")
        return flags, lines

    def _explain(
        self, name: str, steps: int, metrics: Metrics, groups: Sequence[Group], anchors: Sequence[Anchor]
    ) -> tuple[str, Sequence[str]]:
        rollouts = [r for group in groups for r in group.rollouts]
        truncated = sum(r.truncated for r in rollouts)
        many = f"for {steps} steps" if steps > 1 else "in this step"
        if name == "no_variance":
            right = sum(r.reward > 0 for r in rollouts)
            causes = {0: ALL_WRONG, len(rollouts): ALL_RIGHT}.get(right, NOTHING_VARIES)
            if right == 0 and 2 * truncated > len(rollouts):
                causes = (f"answers do not end: {truncated} of {len(rollouts)} are truncated", *causes)
            found = f"{right} of {len(rollouts)} answers are right{_sample(rollouts)}"
            return f"every prompt's rewards are equal {many}, {found}", causes
        if name == "truncated":
            return f"all {len(rollouts)} answers are cut off at rollout.max_tokens {many}", CAUSES[name]
        if name == "no_anchors":
            wanted = _sum(metrics, "anchors/right_wanted", "anchors/wrong_wanted")
            return f"0 of {wanted:.0f} anchors found {many}, nothing is corrected", CAUSES[name]
        if name == "no_change":
            return f"the updates change nothing {many}, grad norm {metrics.get('grad/norm')}", CAUSES[name]
        what = (
            f"the trainer's probability of {mismatch(metrics):.1%} of the sampled tokens is not within 10% of the "
            f"engine's (sync.alarm_outside={self.outside:g})"
        )
        return what, CAUSES[name]


def nothing_varies(metrics: Metrics) -> bool:
    """No group, of rollouts or of corrections, has two rewards: no answer has an advantage."""
    return metrics["rollout/no_variance"] == 1 and metrics.get("correction/no_variance") in (None, 1)


def nothing_changed(metrics: Metrics) -> bool:
    """By what the sync saw change, where it looked; else by the gradient."""
    changed = metrics.get("sync/changed")
    return changed == 0 if changed is not None else metrics.get("grad/norm") == 0


def mismatch(metrics: Metrics) -> float:
    """Share of tokens outside, the worse of both streams; of all sampled tokens where they were measured."""
    found = [metrics.get(f"{stream}/{kind}mismatch_outside") for stream in STREAMS for kind in ("", "all_")]
    return max((value for value in found if value is not None), default=0.0)


def _sample(rollouts: Sequence[Rollout]) -> str:
    """One wrong answer beside the wanted one: mostly that is all a reader needs."""
    wrong = [r for r in rollouts if not r.reward]
    shown = next((r for r in wrong if not r.truncated), wrong[0] if wrong else None)
    return "" if shown is None else f" (wanted {_short(shown.problem.answer)}, got {_short(shown.text)})"


def _short(text: str, limit: int = 60) -> str:
    """The text quoted, its end alone where it is long: an answer stands at the end."""
    return repr(text) if len(text) <= limit else f"...{text[-limit:]!r}"


def _sum(metrics: Metrics, *keys: str) -> float:
    return sum(metrics.get(key) or 0 for key in keys)
