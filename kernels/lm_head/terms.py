"""The loss of a target, given its log-prob and its entropy H, with q = exp(logp - old_logp):

    loss = sum_n rl_weight[n] * (-is[n] * min(q A, clip(q, 1 - eps_low, 1 + eps_high) A)
                                 + beta * k3(ref_logp, logp) - entropy_coef * H) - ce_weight[n] * logp
    is[n] = min(exp(old_logp - sampler_logp), is_cap), a constant

The term of the policy, min(...), is that of PPO. Two others, with clip(q) between the same bounds:

    dual_clip=c, for A < 0:  max(min(q A, clip(q) A), c A)
    clip="cispo":            clip(q) A logp, clip(q) a constant; no token is dropped, d/d logp = clip(q) A

CISPO's value is what its authors differentiate, and means nothing by itself: logp is in it, where PPO has q.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Terms(NamedTuple):
    """Constants of each target, [N]. What the options do not use is there, too: zeros."""

    old_logp: Tensor
    advantage: Tensor
    rl_weight: Tensor
    ce_weight: Tensor
    ref_logp: Tensor
    sampler_logp: Tensor


class Options(NamedTuple):
    eps_low: float
    eps_high: float
    dual_clip: float | None
    beta: float  # 0: ref_logp is not used
    entropy_coef: float
    is_cap: float | None  # None: sampler_logp is not used
    on_policy: bool  # old_logp is logp itself, and not used
    cispo: bool
    sequence: bool  # q is that of the row

    def to_floats(self) -> list[float]:
        """As an operator of torch takes them: nan is None."""
        return [math.nan if value is None else float(value) for value in self]

    @classmethod
    def from_floats(cls, values: Sequence[float]) -> "Options":
        given: list[Any] = [None if math.isnan(value) else value for value in values]
        return cls(*given)


class TargetOutputs(NamedTuple):
    """Of each target, all [N]."""

    loss: Tensor
    logp: Tensor
    entropy: Tensor
    ratio: Tensor
    clipped: Tensor  # bool


def stack_terms(n: int, dtype: torch.dtype, device: torch.device, **given: Tensor | None) -> Tensor:
    """[6, N], in the order of Terms. Raises ValueError for other shapes than [N]."""
    for name, value in given.items():
        if value is not None and value.shape != (n,):
            raise ValueError(f"{name} is {list(value.shape)}: expected [N] = [{n}], one value per target")
    zero = torch.zeros(n, dtype=dtype, device=device)
    rows = [zero if (value := given[name]) is None else value.to(dtype) for name in Terms._fields]
    return torch.stack(rows).detach()


def k3(r: Tensor, p: Tensor) -> Tensor:
    """exp(r - p) - (r - p) - 1: unbiased, non-negative estimate of KL(p || r) from samples of p (Schulman 2020)."""
    return torch.expm1(r - p) - (r - p)


def target_loss(
    logp: Tensor, entropy: Tensor, terms: Terms, options: Options, row_lengths: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, q, clipped), each [n], in differentiable torch: the formula of this file's docstring.

    For the ratio of a sequence (GSPO, arXiv 2507.18071), logp - old_logp is first averaged over the targets of a row
    that have rl_weight != 0; row_lengths [rows] int64: a row's targets follow those of the row before. A weight of 0
    cuts its terms off at their inputs: an inf or nan there reaches neither loss nor gradient.
    """
    rl = terms.rl_weight != 0
    p, old = torch.where(rl, logp, 0.0), _old_logp(logp, terms, options)
    log_q = p - old
    if options.sequence:
        assert row_lengths is not None
        log_q = _row_mean(log_q, rl, row_lengths)
    q, a = log_q.exp(), torch.where(rl, terms.advantage, 0.0)
    policy, clipped = _policy_term(q, a, p, options)
    if options.is_cap is not None:
        policy = policy * _importance(old, terms, options.is_cap)
    loss = -policy
    if options.beta != 0:
        loss = loss + options.beta * k3(torch.where(rl, terms.ref_logp, 0.0), p)
    if options.entropy_coef != 0:
        loss = loss - options.entropy_coef * torch.where(rl, entropy, 0.0)
    loss = terms.rl_weight * loss - terms.ce_weight * torch.where(terms.ce_weight != 0, logp, 0.0)
    return loss, q.detach(), clipped


def target_loss_gradient(
    logp: Tensor, q: Tensor, clipped: Tensor, terms: Terms, options: Options, row_lengths: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """d sum(target_loss) / d logp and / d entropy, [n]; None without an entropy bonus. q, clipped: target_loss's.

    d/d logp = rl_weight * (-is * q A [not clipped] + beta * (1 - exp(ref_logp - logp))) - ce_weight, the first term
    averaged over the row for a sequence's q: q is exp of a row mean, and that mean is its own adjoint. CISPO's is
    -is * clip(q) A, clipped or not.
    """
    rl = terms.rl_weight != 0
    if options.cispo:
        q, clipped = q.clamp(1 - options.eps_low, 1 + options.eps_high), torch.zeros_like(clipped)
    g = -terms.rl_weight * torch.where(rl & ~clipped, q * terms.advantage, 0.0)
    if options.is_cap is not None:
        g = g * _importance(_old_logp(logp, terms, options), terms, options.is_cap)
    if options.sequence:
        assert row_lengths is not None
        g = _row_mean(g, rl, row_lengths)
    if options.beta != 0:
        d = torch.where(rl, terms.ref_logp - logp, 0.0)
        g = g - options.beta * terms.rl_weight * torch.expm1(d)
    g_entropy = -options.entropy_coef * terms.rl_weight if options.entropy_coef != 0 else None
    return g - terms.ce_weight, g_entropy


def tokens_of_on_policy_rows(terms: Terms, options: Options, row_lengths: Tensor) -> tuple[Tensor, Options]:
    """Stacked terms, and options, of tokens whose loss and gradient are those of these rows, where every q is 1: known
    beforehand when old_logp is logp itself and there is no importance weight, which is a function of logp.

    Of a row of m targets that count the loss is -sum_n w_n A_n q, and q = exp(mean of logp - old_logp): d/d logp_n is
    -mean(w A) for each of them. A token's is -w_n A'_n, so A'_n = mean(w A) / w_n; and sum_n w_n A'_n = sum_n w_n A_n.
    """
    rl = terms.rl_weight != 0
    mean = _row_mean(terms.rl_weight * terms.advantage, rl, row_lengths)
    advantage = torch.where(rl, mean / terms.rl_weight, 0.0)
    return torch.stack(terms._replace(advantage=advantage)), options._replace(sequence=False)


def _old_logp(logp: Tensor, terms: Terms, options: Options) -> Tensor:
    return torch.where(terms.rl_weight != 0, logp.detach() if options.on_policy else terms.old_logp, 0.0)


def _policy_term(q: Tensor, a: Tensor, p: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """(term, clipped)"""
    held = q.clamp(1 - options.eps_low, 1 + options.eps_high)
    if options.cispo:
        return held.detach() * a * p, held != q
    policy, clipped = torch.minimum(q * a, held * a), held * a < q * a
    if options.dual_clip is not None:
        below = (a < 0) & (policy < options.dual_clip * a)
        policy, clipped = torch.where(below, options.dual_clip * a, policy), clipped | below
    return policy, clipped


def _importance(old_logp: Tensor, terms: Terms, is_cap: float) -> Tensor:
    sampler_logp = torch.where(terms.rl_weight != 0, terms.sampler_logp, 0.0)
    return (old_logp - sampler_logp).exp().clamp(max=is_cap)


def _row_mean(value: Tensor, mask: Tensor, row_lengths: Tensor) -> Tensor:
    """Mean of value [n] over the masked targets of its row, as [n]. A row is added up in one order: no atomics."""
    if value.numel() == 0:
        return value
    total, count = (
        torch.segment_reduce(x, "sum", lengths=row_lengths, unsafe=True)  # unsafe: it does not look at the lengths
        for x in (torch.where(mask, value, 0.0), mask.to(value.dtype))
    )
    mean = torch.repeat_interleave(total / count.clamp(min=1), row_lengths, output_size=len(value))
    return torch.where(mask, mean, 0.0)
