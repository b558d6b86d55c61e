"""How good a policy is on held-out problems, alone and as its own corrector.

On its own: `python -m cipo_fast.evaluate [configs/x.yaml] [key.path=value ...]` evaluates `model.path`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cipo_fast.cipo.metrics import batch_metrics
from cipo_fast.cipo.prompts import CorrectionPrompts
from cipo_fast.config import Config
from cipo_fast.records import Anchor, Group
from cipo_fast.rollout import Sampling
from cipo_fast.sampling import Prompt, Sampler

Evaluation = dict[str, float | None]


def evaluate(sampler: Sampler, prompts: Sequence[Prompt], correct: CorrectionPrompts, config: Config) -> Evaluation:
    """greedy, t1 and pass_at_k accuracy; wrong_to_right and right_to_wrong rates of corrections of one T=1 attempt a
    problem; correction_gap, the former minus the accuracy of fresh retries (the problem's other samples)."""
    k = config.eval.samples
    greedy = sampler.groups(prompts, 1, Sampling(0.0, 1.0, config.eval.max_tokens), 0, "eval-greedy")
    sampling = Sampling(1.0, 1.0, config.eval.max_tokens)
    groups = sampler.groups(prompts, k, sampling, 0, "eval")
    anchors = first_attempts(groups, correct)
    sampler.correct(anchors, min(k, 4), sampling, 0, "eval-correct")
    sampler.take_times()
    metrics = batch_metrics(groups, anchors, None)
    return {
        "greedy": float(np.mean([g.rollouts[0].reward for g in greedy])),
        "t1": metrics["rollout/accuracy"],
        f"pass_at_{k}": float(np.mean([any(r.reward for r in g.rollouts) for g in groups])),
        "wrong_to_right": metrics["correction/wrong_to_right"],
        "right_to_wrong": metrics["correction/right_to_wrong"],
        "correction_gap": metrics["correction/gap"],
    }


def first_attempts(groups: list[Group], correct: CorrectionPrompts) -> list[Anchor]:
    """The first rollout of every group as an anchor, where it is complete and its correction prompt fits."""
    anchors = []
    for g, group in enumerate(groups):
        rollout = group.rollouts[0]
        prompt = None if rollout.truncated else correct(rollout)
        if prompt is not None:
            anchors.append(Anchor(rollout, g, 0, *prompt))
    return anchors
