"""What is learned from a batch: its conversations, each with its advantage and per-token loss weights.

    L = RL(rollouts) + lambda_corr * L_corr,      L_corr = RL(corrections) | CE | RL(corrections) + mu * CE
    RL(S) = 1/Z_S sum_{i in S} sum_t (clipped policy loss, kernels/fused_linear_cipo_loss.py)
    CE = -1/(sum_j |y_j|) sum_j sum_t log pi(y_jt | context), j over verified corrections of wrong anchors

Z_S is the stream's own count over the global batch, never a micro-batch's.
"""

from __future__ import annotations

from collections.abc import Iterator

from cipo_fast.cipo.advantages import correction_advantages, group_advantages, rewards_of
from cipo_fast.config import Config
from cipo_fast.records import Anchor, Conversation, Group, Rollout, Segment


def conversations(groups: list[Group], anchors: list[Anchor], config: Config) -> list[Conversation]:
    """The sampled answers of the batch that teach something; the corrections of an anchor share its segments.

    An answer without a gradient (its group has one reward, and there is neither KL nor entropy bonus) is left out
    here, before anything is computed for it; where it has corrections it stays, as their context. The normalisers
    count all answers, so the loss gradient is the same."""
    everything = _all_conversations(groups, anchors, config)
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
    prompts = [Segment(group.prompt_ids) for group in groups]
    attempts = [[Segment(rollout.token_ids) for rollout in group.rollouts] for group in groups]
    answers: list[tuple[tuple[Segment, ...], Rollout, str]] = [
        ((prompts[g], attempts[g][i]), rollout, "rollout")
        for g, group in enumerate(groups)
        for i, rollout in enumerate(group.rollouts)
    ]
    for anchor in anchors:
        context = _context(anchor, prompts, attempts)
        answers += [((*context, Segment(r.token_ids)), r, "correction") for r in anchor.corrections]
    return [
        Conversation(segments, rollout.sampler_logps, stream, 0.0, 0.0, 0.0) for segments, rollout, stream in answers
    ]


def _all_conversations(groups: list[Group], anchors: list[Anchor], config: Config) -> list[Conversation]:
    prompts = [Segment(group.prompt_ids) for group in groups]
    attempts = [[Segment(rollout.token_ids) for rollout in group.rollouts] for group in groups]
    rollouts = _rollout_stream(groups, prompts, attempts, config)
    if config.correction.lambda_corr == 0 or not anchors:
        return rollouts
    contexts = [_context(anchor, prompts, attempts) for anchor in anchors]
    _check_identity(anchors, contexts)
    corrections: list[Conversation] = []
    if config.correction.loss in ("rl", "both"):
        corrections += _correction_stream(anchors, contexts, config)
    if config.correction.loss in ("ce", "both"):
        _add_cross_entropy(corrections, anchors, contexts, prompts, config)
    return rollouts + corrections


def _rollout_stream(
    groups: list[Group], prompts: list[Segment], attempts: list[list[Segment]], config: Config
) -> list[Conversation]:
    rewards = [rewards_of(group.rollouts) for group in groups]
    advantages = group_advantages(rewards, scale=config.loss.scale_advantages, eps=config.loss.advantage_eps)
    weights = _rl_weights([r for group in groups for r in group.rollouts], config)
    return [
        Conversation(
            (prompts[g], attempts[g][i]), rollout.sampler_logps, "rollout", advantages[g][i], next(weights), 0.0
        )
        for g, group in enumerate(groups)
        for i, rollout in enumerate(group.rollouts)
    ]


def _correction_stream(
    anchors: list[Anchor], contexts: list[tuple[Segment, ...]], config: Config
) -> list[Conversation]:
    c = config.correction
    advantages = correction_advantages(
        [rewards_of(anchor.corrections) for anchor in anchors],
        [anchor.right for anchor in anchors],
        lambda_risk=c.lambda_risk,
        risk_norm=c.risk_norm,
        scale=config.loss.scale_advantages,
        eps=config.loss.advantage_eps,
    )
    weights = _rl_weights([r for anchor in anchors for r in anchor.corrections], config)
    return [
        Conversation(
            (*contexts[a], Segment(correction.token_ids)),
            correction.sampler_logps,
            "correction",
            advantages[a][j],
            c.lambda_corr * next(weights),
            0.0,
        )
        for a, anchor in enumerate(anchors)
        for j, correction in enumerate(anchor.corrections)
    ]


def _add_cross_entropy(
    corrections: list[Conversation],
    anchors: list[Anchor],
    contexts: list[tuple[Segment, ...]],
    prompts: list[Segment],
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
        weight = c.lambda_corr * (c.mu if c.loss == "both" else 1.0) / total
        if c.loss == "both" and c.context == "anchor":
            corrections[index[a, j]].ce_weight = weight
            continue
        correction = anchors[a].corrections[j]
        context = contexts[a] if c.context == "anchor" else (prompts[anchors[a].group],)
        segments = (*context, Segment(correction.token_ids))
        # Its log-probs were sampled after the anchor, so they say nothing about a bare prompt.
        logps = correction.sampler_logps if c.context == "anchor" else None
        corrections.append(Conversation(segments, logps, "correction", 0.0, 0.0, weight))


def verified_corrections(anchor: Anchor, at_most: int) -> list[int]:
    """Indices of the first `at_most` corrections that turned a wrong attempt into a right answer."""
    if anchor.right:
        return []
    return [j for j, r in enumerate(anchor.corrections) if r.reward > 0 and not r.truncated][:at_most]


def _context(anchor: Anchor, prompts: list[Segment], attempts: list[list[Segment]]) -> tuple[Segment, ...]:
    if anchor.glue_ids is None:
        return (Segment(anchor.prompt_ids),)
    return (prompts[anchor.group], attempts[anchor.group][anchor.index], Segment(anchor.glue_ids))


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
