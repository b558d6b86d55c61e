"""What is learned from a batch: its conversations, each with its advantage and per-token loss weights.

    L = RL(rollouts) + lambda_corr(step) * L_corr,      L_corr = RL(corrections) | CE | RL(corrections) + mu * CE
    RL(S) = 1/Z_S sum_{i in S} sum_t (clipped policy loss, kernels/lm_head/terms.py)
    CE = -1/(sum_j |y_j|) sum_j sum_t log pi(y_jt | context), j over verified corrections of wrong anchors

Z_S is the stream's own count over the global batch, never a micro-batch's. With hints L has one more term, and the
rollouts other advantages: cipo/nudge.py. The first `correction.start_steps` steps have another L: `_correction_start`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from cipo_fast.cipo.advantages import Array, correction_advantages, group_advantages, rewards_of
from cipo_fast.cipo.nudge import Hint, nudge_advantages, prompt_segments
from cipo_fast.config import Config, CorrectionConfig
from cipo_fast.records import Anchor, Conversation, Group, Rollout, Segment

Prompts = list[dict[Hint, tuple[Segment, ...]]]  # of each group


def conversations(groups: list[Group], anchors: list[Anchor], config: Config, step: int) -> list[Conversation]:
    """The sampled answers of the batch that teach something in `step` (from 1); the corrections of an anchor share its
    segments.

    An answer without a gradient (its group has one reward, and there is neither KL nor entropy bonus) is left out
    here, before anything is computed for it; where it has corrections it stays, as their context. The normalisers
    count all answers, so the loss gradient is the same."""
    everything = _all_conversations(groups, anchors, config, step)
    regularized = config.loss.beta > 0 or config.loss.entropy_coef > 0
    teaching = [c for c in everything if c.ce_weight or (c.rl_weight and (c.advantage or regularized))]
    return teaching or everything[:1]  # a step of an optimiser with momentum is a step, even on gradient 0


def left_out(groups: list[Group], anchors: list[Anchor], teaching: list[Conversation]) -> list[Conversation]:
    """The sampled answers that `teaching` does not hold after what they were sampled from, without weights: they are
    only measured. Cross-entropy alone leaves out most corrections, on the bare prompt all of them."""
    taught = {id(c.sampler_logps) for c in teaching}  # an answer's log-probs are a list of its own
    return [c for c in as_sampled(groups, anchors) if id(c.sampler_logps) not in taught]


def as_sampled(groups: list[Group], anchors: list[Anchor]) -> list[Conversation]:
    """Every sampled answer after what it was sampled from, without weights."""
    prompts = [prompt_segments(group) for group in groups]
    attempts = [[Segment(rollout.token_ids) for rollout in group.rollouts] for group in groups]
    answers: list[tuple[tuple[Segment, ...], Rollout, str]] = [
        (_sampled(rollout, prompts[g], attempts[g][i]), rollout, "rollout")
        for g, group in enumerate(groups)
        for i, rollout in enumerate(group.rollouts)
    ]
    for anchor in anchors:
        context = _context(anchor, prompts, attempts)
        answers += [((*context, Segment(r.token_ids)), r, "correction") for r in anchor.corrections]
    return [
        Conversation(segments, rollout.sampler_logps, stream, 0.0, 0.0, 0.0) for segments, rollout, stream in answers
    ]


def lambda_corr_at(step: int, c: CorrectionConfig) -> float:
    """lambda_corr * min(1, s / warmup_steps), s = step - start_steps the steps of RL so far; 0 before them [ours]."""
    rl_steps = max(0, step - c.start_steps)
    return c.lambda_corr * (1.0 if rl_steps >= max(1, c.warmup_steps) else rl_steps / max(1, c.warmup_steps))


def right_weight(anchors: list[Anchor], config: Config, step: int) -> float | None:
    """Share of right anchors in the loss weight of the corrections' RL term, before `replay.right_weight_max`; None
    where nothing weighs or there is no such term."""
    if config.correction.loss == "ce" or step <= config.correction.start_steps or not anchors:
        return None
    right, wrong = _loss_weights(anchors, _correction_advantages(anchors, config), config)
    return right / (right + wrong) if right + wrong > 0 else None


def _all_conversations(groups: list[Group], anchors: list[Anchor], config: Config, step: int) -> list[Conversation]:
    prompts = [prompt_segments(group) for group in groups]
    attempts = [[Segment(rollout.token_ids) for rollout in group.rollouts] for group in groups]
    rollouts = _rollout_stream(groups, prompts, attempts, config)
    contexts = [_context(anchor, prompts, attempts) for anchor in anchors]
    _check_identity(anchors, contexts)
    if step <= config.correction.start_steps:
        return [replace(c, rl_weight=0.0) for c in rollouts] + _correction_start(anchors, contexts, config.correction)
    if config.nudge.hints and config.nudge.distill:
        _add_distillation(rollouts, groups, prompts, attempts, config.nudge.distill)
    if config.correction.lambda_corr == 0 or not anchors:
        return rollouts
    weight = lambda_corr_at(step, config.correction)
    corrections: list[Conversation] = []
    if config.correction.loss in ("rl", "both"):
        corrections += _correction_stream(anchors, contexts, weight, config)
    if config.correction.loss in ("ce", "both"):
        _add_cross_entropy(corrections, anchors, contexts, prompts, weight, config)
    return rollouts + corrections


def _rollout_stream(
    groups: list[Group], prompts: Prompts, attempts: list[list[Segment]], config: Config
) -> list[Conversation]:
    advantages = _rollout_advantages(groups, config)
    weights = _rl_weights([r for group in groups for r in group.rollouts], config)
    return [
        Conversation(
            _sampled(rollout, prompts[g], attempts[g][i]),
            rollout.sampler_logps,
            "rollout",
            advantages[g][i],
            next(weights),
            0.0,
        )
        for g, group in enumerate(groups)
        for i, rollout in enumerate(group.rollouts)
    ]


def _rollout_advantages(groups: list[Group], config: Config) -> list[Array]:
    rewards = [rewards_of(group.rollouts) for group in groups]
    scale, eps = config.loss.scale_advantages, config.loss.advantage_eps
    if not config.nudge.hints:
        return group_advantages(rewards, scale=scale, eps=eps)
    return [
        nudge_advantages(r, [o.hint for o in group.rollouts], between=config.nudge.between, scale=scale, eps=eps)
        for r, group in zip(rewards, groups, strict=True)
    ]


def _add_distillation(
    rollouts: list[Conversation],
    groups: list[Group],
    prompts: Prompts,
    attempts: list[list[Segment]],
    distill: float,
) -> None:
    """L_d: give every rollout its ce_weight, distill * A / (|y| * R), on the bare prompt. A bare rollout is that
    conversation already, a hinted one gets another, whose attempt is the segment that corrections follow."""
    answers = [(g, i, rollout) for g, group in enumerate(groups) for i, rollout in enumerate(group.rollouts)]
    for n, (g, i, rollout) in enumerate(answers):
        weight = distill * float(rollouts[n].advantage) / (len(rollout.token_ids) * len(answers))
        if rollout.hint is None:
            rollouts[n].ce_weight += weight
        else:  # its log-probs were sampled with the hint, so they say nothing about the bare prompt
            segments = (*prompts[g][None], attempts[g][i])
            rollouts.append(Conversation(segments, None, "rollout", 0.0, 0.0, weight))


def _correction_stream(
    anchors: list[Anchor], contexts: list[tuple[Segment, ...]], lambda_corr: float, config: Config
) -> list[Conversation]:
    advantages = _bounded(anchors, _correction_advantages(anchors, config), config)
    weights = _rl_weights([r for anchor in anchors for r in anchor.corrections], config)
    return [
        Conversation(
            (*contexts[a], Segment(correction.token_ids)),
            correction.sampler_logps,
            "correction",
            advantages[a][j],
            lambda_corr * next(weights),
            0.0,
        )
        for a, anchor in enumerate(anchors)
        for j, correction in enumerate(anchor.corrections)
    ]


def _correction_advantages(anchors: list[Anchor], config: Config) -> list[Array]:
    return correction_advantages(
        [rewards_of(anchor.corrections) for anchor in anchors],
        [anchor.right for anchor in anchors],
        lambda_risk=config.correction.lambda_risk,
        risk_norm=config.correction.risk_norm,
        scale=config.loss.scale_advantages,
        eps=config.loss.advantage_eps,
    )


def _bounded(anchors: list[Anchor], advantages: list[Array], config: Config) -> list[Array]:
    """Right anchors' advantages times f, so that their share of the loss weight is at most m = right_weight_max [ours]:

        W = sum |A_j| w_j |y_j| over corrections;  f = min(1, m W_wrong / ((1 - m) W_right))

    The policy loss is homogeneous in A >= 0 and A <= 0 (clipped or not), so f scales its gradient; KL and entropy keep
    their weight. Z stays: a correction of a wrong attempt weighs the same whatever stands beside it, and right ones
    have nothing to learn where wrong ones have not. Renormalising would blow up the few that are left.
    """
    m = config.replay.right_weight_max
    right, wrong = _loss_weights(anchors, advantages, config)
    if right <= m * (right + wrong):
        return advantages
    f = m * wrong / ((1 - m) * right)
    return [f * group if anchor.right else group for anchor, group in zip(anchors, advantages, strict=True)]


def _loss_weights(anchors: list[Anchor], advantages: list[Array], config: Config) -> tuple[float, float]:
    """(W_right, W_wrong): the sums of |advantage| * weight * tokens over corrections of right and of wrong anchors."""
    weights = _rl_weights([r for anchor in anchors for r in anchor.corrections], config)
    sums = {True: 0.0, False: 0.0}
    for anchor, group in zip(anchors, advantages, strict=True):
        for advantage, correction in zip(group.tolist(), anchor.corrections, strict=True):
            sums[anchor.right] += abs(advantage) * next(weights) * len(correction.token_ids)
    return sums[True], sums[False]


def _correction_start(
    anchors: list[Anchor], contexts: list[tuple[Segment, ...]], c: CorrectionConfig
) -> list[Conversation]:
    """The supervised correction start [ours]: rejection sampling from the policy's own corrections,

        L = -(1/2) mean log pi(y_jt | correction prompt) over corrected answers, -(1/2) mean ... over kept ones

    both verified, at most max_ce_per_anchor an anchor. There are many more kept answers than corrected ones, and most
    are copies: both kinds weigh the same. Where a kind is missing, corrected answers have all of the weight, and kept
    ones teach nothing: alone they would teach to copy."""
    chosen = {
        right: [
            (a, anchor.corrections[j])
            for a, anchor in enumerate(anchors)
            if anchor.right == right
            for j in _verified(anchor, c.max_ce_per_anchor)
        ]
        for right in (False, True)
    }
    kinds = [chosen[right] for right in (False, True) if chosen[right] and chosen[False]]
    return [
        Conversation(
            (*contexts[a], Segment(correction.token_ids)),
            correction.sampler_logps,
            "correction",
            0.0,
            0.0,
            1.0 / (len(kinds) * sum(len(r.token_ids) for _, r in kind)),
        )
        for kind in kinds
        for a, correction in kind
    ]


def _add_cross_entropy(
    corrections: list[Conversation],
    anchors: list[Anchor],
    contexts: list[tuple[Segment, ...]],
    prompts: Prompts,
    lambda_corr: float,
    config: Config,
) -> None:
    """Give verified corrections of wrong anchors their ce_weight: on the RL conversation where there is one with the
    same context, else on a conversation of its own."""
    c = config.correction
    chosen = [(a, j) for a, anchor in enumerate(anchors) for j in verified_corrections(anchor, c.max_ce_per_anchor)]
    total = sum(len(anchors[a].corrections[j].token_ids) for a, j in chosen)
    index = {
        (a, j): n
        for n, (a, j) in enumerate((a, j) for a in range(len(anchors)) for j in range(len(anchors[a].corrections)))
    }
    for a, j in chosen:
        weight = lambda_corr * (c.mu if c.loss == "both" else 1.0) / total
        if c.loss == "both" and c.context == "anchor":
            corrections[index[a, j]].ce_weight = weight
            continue
        correction = anchors[a].corrections[j]
        context = contexts[a] if c.context == "anchor" else prompts[anchors[a].group][None]
        segments = (*context, Segment(correction.token_ids))
        # Its log-probs were sampled after the anchor, so they say nothing about a bare prompt.
        logps = correction.sampler_logps if c.context == "anchor" else None
        corrections.append(Conversation(segments, logps, "correction", 0.0, 0.0, weight))


def verified_corrections(anchor: Anchor, at_most: int) -> list[int]:
    """Indices of the first `at_most` corrections that turned a wrong attempt into a right answer."""
    return [] if anchor.right else _verified(anchor, at_most)


def _verified(anchor: Anchor, at_most: int) -> list[int]:
    return [j for j, r in enumerate(anchor.corrections) if r.reward > 0 and not r.truncated][:at_most]


def _sampled(rollout: Rollout, prompts: dict[Hint, tuple[Segment, ...]], attempt: Segment) -> tuple[Segment, ...]:
    """What a rollout was sampled from, and its tokens there. `attempt` are its tokens after the bare prompt, where
    corrections follow; after a hint they are a segment of their own, because there they are other activations."""
    return (*prompts[rollout.hint], attempt if rollout.hint is None else Segment(rollout.token_ids))


def _context(anchor: Anchor, prompts: Prompts, attempts: list[list[Segment]]) -> tuple[Segment, ...]:
    if anchor.glue_ids is None:
        return (Segment(anchor.prompt_ids),)
    return (*prompts[anchor.group][None], attempts[anchor.group][anchor.index], Segment(anchor.glue_ids))


def _check_identity(anchors: list[Anchor], contexts: list[tuple[Segment, ...]]) -> None:
    """What is learned from is, token for token, what the engine sampled from."""
    for anchor, context in zip(anchors, contexts, strict=True):
        tokens = [token for segment in context for token in segment.token_ids]
        if any(correction.prompt_ids != tokens for correction in anchor.corrections):
            raise RuntimeError(
                f"a correction of {anchor.rollout.problem.id} was sampled from another prompt than is learned"
            )


def _rl_weights(stream: list[Rollout], config: Config) -> Iterator[float]:
    """1/Z: each token weighs the same (tokens), or each sequence (sequences)."""
    if config.loss.normalize == "tokens":
        total = sum(len(r.token_ids) for r in stream)
        return iter([1.0 / total] * len(stream))
    return iter([1.0 / (len(stream) * len(r.token_ids)) for r in stream])
