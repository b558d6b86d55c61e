"""Alarms for a run that learns nothing, or learns from numbers that do not agree: named, with the likely causes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from cipo_fast.audit import own
from cipo_fast.cipo.metrics import Metrics
from cipo_fast.records import STREAMS, Anchor, Group, Rollout

NAMES = ("no_variance", "truncated", "no_anchors", "no_change", "mismatch", *own.CAUSES)

TOO_HARD = ("answers are longer than rollout.max_tokens", "the task is too hard for this model")
ALL_WRONG = {
    "exact": (
        "the verifier compares the whole answer, stripped, with the row's: look for a float, units, \\r, markup in it",
        "answers are longer than rollout.max_tokens",
        "the prompt or chat template does not ask for the bare answer",
        "the task is too hard for this model",
    ),
    "math": (
        "the prompt does not ask for the final answer in \\boxed{}, or the model does not give it there",
        "the rows' golds are of another form than is asked for (units, percent, choice letters: docs/verifiers.md)",
        *TOO_HARD,
    ),
    "code": (
        "the prompt does not ask for one complete program in a ``` block",
        "the tests ask for another function, or another input and output, than the prompt does",
        "sandbox.cpu_s or sandbox.memory_mib is too small for these tests",
        *TOO_HARD,
    ),
    "user": (
        "the function returns False for answers that it should accept: call it with the one shown here",
        "the prompt does not ask for what the function wants",
        *TOO_HARD,
    ),
}
ALL_RIGHT = ("the problems are too easy for this model", "the prompt gives the answer away")
NOTHING_VARIES = ("rollout.temperature is too low: a prompt's answers are alike", "problems are too easy or too hard")
CAUSES = own.CAUSES | {
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
            **own.own_alarms(metrics, broken=max(0.5, 1 - (metrics.get("rollout/accuracy") or 0))),
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
            causes = {0: all_wrong(rollouts), len(rollouts): ALL_RIGHT}.get(right, NOTHING_VARIES)
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
        if name in own.CAUSES:
            return own_finding(name, many, metrics), CAUSES[name]
        what = (
            f"the trainer's probability of {mismatch(metrics):.1%} of the sampled tokens is not within 10% of the "
            f"engine's (sync.alarm_outside={self.outside:g})"
        )
        return what, CAUSES[name]


def all_wrong(rollouts: Sequence[Rollout]) -> tuple[str, ...]:
    """Likely causes, by the verifier that judged most of them; what it found no answer in first."""
    verifier = Counter(r.problem.verifier for r in rollouts).most_common(1)[0][0]
    causes = ALL_WRONG[verifier if verifier in ALL_WRONG else "user"]
    verdicts = Counter(r.verdict for r in rollouts if not r.truncated)
    counted = [
        f"{verdicts[verdict]} of {len(rollouts)} answers {what} ({_why(rollouts, verdict)})"
        for verdict, what in (("unparsable", "cannot be read"), ("timeout", "ran out of time"))
        if verdicts[verdict]
    ]
    return (*counted, *causes)


def _why(rollouts: Sequence[Rollout], verdict: str) -> str:
    """What was said most of the answers with that verdict."""
    said = Counter(r.why for r in rollouts if r.verdict == verdict and not r.truncated)
    return f"mostly: {_short(said.most_common(1)[0][0])}"


def own_finding(name: str, many: str, metrics: Metrics) -> str:
    """What an alarm of audit/own.py saw."""
    if name == "copies":
        return f"{metrics['correction/verbatim_copy']:.0%} of corrections repeat their attempt {many}"
    if name == "breaks_right":
        return f"{metrics['correction/right_to_wrong']:.0%} of corrections of right attempts are wrong {many}"
    values = (metrics.get(f"audit/{stream}_length_corr") for stream in ("reward", "correction"))
    found = ", ".join("-" if value is None else f"{value:+.2f}" for value in values)
    return f"reward goes with length {many} (correlation within a prompt's answers and within an anchor's: {found})"


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
    if shown is None:
        return ""
    answer = shown.problem.row.get("answer")
    wanted = f"wanted {_short(str(answer))}, " if answer else ""
    said = f": {_short(shown.why)}" if shown.why else ""
    return f" ({wanted}got {_short(shown.text)}{said})"


def _short(text: str, limit: int = 60) -> str:
    """The text quoted, its end alone where it is long: an answer stands at the end."""
    return repr(text) if len(text) <= limit else f"...{text[-limit:]!r}"


def _sum(metrics: Metrics, *keys: str) -> float:
    return sum(metrics.get(key) or 0 for key in keys)
