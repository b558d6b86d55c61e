"""What the audit samples from a model: answers for the gaming diagnostic, and the shuffled-attempt control."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from cipo_fast.audit.gaming import Submitted
from cipo_fast.audit.intervals import Estimate, mean, wilson
from cipo_fast.audit.own import clustered, own_table
from cipo_fast.cipo.prompts import CorrectionPrompts
from cipo_fast.config import Config
from cipo_fast.distributed import prepared_group
from cipo_fast.evaluation.model import sampler_of
from cipo_fast.records import Anchor, Group
from cipo_fast.rollout import Sampling
from cipo_fast.sampling import Prompt, Sampler

CORRECTIONS = 4  # an anchor


@contextmanager
def sampler_for(config: Config) -> Iterator[tuple[Sampler, list[Prompt], Config]]:
    """A sampler with the weights of `model.path`, the held-out prompts, and the settings as they fit the model."""
    with prepared_group(lambda: config) as (mesh, _), sampler_of(config, mesh.device_type) as found:
        yield found


def sampled_answers(config: Config) -> list[Submitted]:
    """eval.samples answers at T=1 to every held-out problem."""
    with sampler_for(config) as (sampler, prompts, c):
        groups = sampler.groups(prompts, c.eval.samples, Sampling(1.0, 1.0, c.eval.max_tokens), 0, "audit")
    return [
        Submitted(group.problem.row, rollout.text, f"{group.problem.where or group.problem.id} answer {i}")
        for group in groups
        for i, rollout in enumerate(group.rollouts)
        if not rollout.truncated
    ]


def own_of_a_model(config: Config) -> dict[str, Estimate]:
    """`own_table` of answers at T=1 to held-out problems, one attempt of each corrected; and the control: corrections
    that were shown another problem's attempt instead, one as right or as wrong as theirs."""
    with sampler_for(config) as (sampler, prompts, c):
        sampling, n = Sampling(1.0, 1.0, c.eval.max_tokens), min(CORRECTIONS, c.eval.samples)
        correct = CorrectionPrompts(sampler.chat, c.correction)
        groups = sampler.groups(prompts, c.eval.samples, sampling, 0, "audit")
        groups = [group for group in groups if group.rollouts]
        anchors = first_attempts(groups, correct)
        sampler.correct(anchors, n, sampling, 0, "audit-correct")
        others = shuffled(anchors, correct)
        sampler.correct(others, n, sampling, 0, "audit-shuffled")
    return own_table([(groups, [a for a in anchors if a.corrections])]) | control(anchors, others)


def first_attempts(groups: Sequence[Group], correct: CorrectionPrompts) -> list[Anchor]:
    """The first rollout of every group as an anchor, where it is complete and its correction prompt fits."""
    anchors = []
    for g, group in enumerate(groups):
        rollout = group.rollouts[0]
        prompt = None if rollout.truncated else correct(rollout)
        if prompt is not None:
            anchors.append(Anchor(rollout, g, 0, *prompt))
    return anchors


def shuffled(anchors: Sequence[Anchor], correct: CorrectionPrompts) -> list[Anchor]:
    """Every anchor with the attempt of another problem, of the same kind: the next one's. Those whose prompt would be
    too long, and a kind with a single anchor, are left out."""
    found = []
    for right in (True, False):
        kind = [anchor for anchor in anchors if anchor.right == right]
        for own, other in zip(kind, kind[1:] + kind[:1], strict=True):
            if own.rollout.problem.id == other.rollout.problem.id:
                continue
            attempt = replace(
                own.rollout,
                token_ids=other.rollout.token_ids,
                sampler_logps=other.rollout.sampler_logps,
                text=other.rollout.text,
            )
            prompt = correct(attempt)
            if prompt is not None:
                found.append(Anchor(attempt, own.group, own.index, *prompt))
    return found


def control(anchors: Sequence[Anchor], others: Sequence[Anchor]) -> dict[str, Estimate]:
    """Rewards of corrections of one's own attempt less those of another problem's, over the problems that have both.
    About 0: the attempt is not read, any text in its place does the same."""
    found = {}
    for right in (True, False):
        own = {a.rollout.problem.id: rewards(a) for a in anchors if a.right == right and a.corrections}
        other = {a.rollout.problem.id: rewards(a) for a in others if a.right == right and a.corrections}
        both = [name for name in own if name in other]
        kind = "right" if right else "wrong"
        values = [value for name in both for value in other[name]]
        found[f"shuffled control: {kind} attempts of other problems"] = wilson(round(sum(values)), len(values))
        pairs = [(name, (mean(own[name]) or 0.0) - (mean(other[name]) or 0.0)) for name in both]
        found[f"own {kind} attempt less another problem's"] = clustered(pairs, mean)
    return found


def rewards(anchor: Anchor) -> list[float]:
    return [r.reward for r in anchor.corrections]
