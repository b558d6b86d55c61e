"""LM head, log-probs, clipped RL loss, KL, entropy and correction cross-entropy in one pass, gradients included.

With logp, H as in fused_linear_logprob.py and q = exp(logp - old_logp):

    loss = sum_n rl_weight[n] * (-is[n] * min(q A, clip(q, 1 - eps_low, 1 + eps_high) A)
                                 + beta * k3(ref_logp, logp) - entropy_coef * H) - ce_weight[n] * logp
    is[n] = min(exp(old_logp - sampler_logp), is_cap), a constant

The chunked implementation takes the gradients of hidden, weight and bias in the forward pass. A chunk of n targets
is one GEMM to the logits, `target_loss` and its derivative on [n] vectors, d(logits) in place of the logits, and
two GEMMs: 6NHV FLOPs, nothing recomputed, no [N, V] tensor.
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .dispatch import implementation
from .fused_linear_logprob import (
    ChunkedHead,
    check_inputs,
    chunk_ranges,
    compute_dtype,
    fused_linear_logprob_reference,
    refuse_create_graph,
    resolve_chunk_targets,
)

PER_TARGET = ("old_logp", "advantage", "rl_weight", "ce_weight", "ref_logp", "sampler_logp", "row_id")


class LossOutput(NamedTuple):
    """A NamedTuple because FSDP2 finds the tensors of an output through pytree. Only `loss` is differentiable."""

    loss: Tensor  # []
    logp: Tensor  # [N]
    entropy: Tensor  # [N]
    ratio: Tensor  # [N] q; 1 where rl_weight is 0
    clipped: Tensor  # [N] bool: the clipped branch is the minimum, the policy gradient of the target is 0
    clip_fraction: Tensor  # [] over targets with rl_weight != 0, as the two below
    approx_kl: Tensor  # [] mean of k3(logp, old_logp): KL(old || policy), nats per token
    ratio_max: Tensor  # [] 0 without such targets


def k3(r: Tensor, p: Tensor) -> Tensor:
    """exp(r - p) - (r - p) - 1: unbiased, non-negative estimate of KL(p || r) from samples of p (Schulman 2020)."""
    return torch.expm1(r - p) - (r - p)


def target_loss(
    logp: Tensor,
    entropy: Tensor,
    *,
    old_logp: Tensor | None,
    advantage: Tensor,
    rl_weight: Tensor,
    ce_weight: Tensor,
    ref_logp: Tensor | None,
    sampler_logp: Tensor | None,
    eps_low: float,
    eps_high: float,
    beta: float,
    entropy_coef: float,
    is_cap: float | None,
    ratio: Literal["token", "sequence"],
    row_id: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, q, clipped), each [n], in differentiable torch: the formula of this file's docstring.

    For ratio="sequence" (GSPO, arXiv 2507.18071), logp - old_logp is first averaged over the targets of a row
    that have rl_weight != 0. A weight of 0 cuts its terms off at their inputs: an inf or nan there reaches neither
    loss nor gradient.
    """
    rl = rl_weight != 0
    p = torch.where(rl, logp, 0.0)
    old = torch.where(rl, (logp if old_logp is None else old_logp).detach(), 0.0)
    log_q = p - old
    if ratio == "sequence":
        assert row_id is not None
        log_q = _row_mean(log_q, rl, row_id)
    q, a = log_q.exp(), torch.where(rl, advantage, 0.0)
    free, bounded = q * a, q.clamp(1 - eps_low, 1 + eps_high) * a
    policy = torch.minimum(free, bounded)
    if sampler_logp is not None and is_cap is not None:
        policy = policy * (old - torch.where(rl, sampler_logp, 0.0)).exp().clamp(max=is_cap)
    loss = -policy
    if beta != 0:
        assert ref_logp is not None
        loss = loss + beta * k3(torch.where(rl, ref_logp, 0.0), p)
    if entropy_coef != 0:
        loss = loss - entropy_coef * torch.where(rl, entropy, 0.0)
    loss = rl_weight * loss - ce_weight * torch.where(ce_weight != 0, logp, 0.0)
    return loss, q.detach(), bounded.detach() < free.detach()


def _row_mean(value: Tensor, mask: Tensor, row_id: Tensor) -> Tensor:
    """Mean of value [n] over the masked targets of its row, as [n]; equal neighbours in row_id make a row."""
    starts = row_id.diff(prepend=row_id[:1]) != 0
    row = starts.cumsum(0)  # [n] counts rows from 0, without a sync
    total = torch.zeros_like(value).index_add(0, row, torch.where(mask, value, 0.0))
    count = torch.zeros_like(value).index_add(0, row, mask.to(value.dtype))
    return torch.where(mask, (total / count.clamp(min=1))[row], 0.0)


class _FusedLinearCipoLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head_options: tuple[Any, ...],  # pred_index, target_id, temperature, softcap, chunk_targets
        groups: list[list[tuple[int, int]]],  # chunks; a group's loss is known once all its log-probs are
        grad_enabled: bool,  # under no_grad, ctx.needs_input_grad still says which inputs require grad
        terms: dict[str, Any],
    ) -> tuple[Tensor, ...]:
        needs_grad = tuple(grad_enabled and needed for needed in ctx.needs_input_grad[:3])
        head = ChunkedHead(hidden, weight, bias, needs_grad, *head_options)
        loss, logp, entropy, ratio = head.weight.new_empty(4, head.target_id.numel()).unbind()
        clipped = torch.empty_like(head.target_id, dtype=torch.bool)
        for group in groups:
            for start, end in group:
                chunk = head.forward(start, end)
                logp[start:end], entropy[start:end] = chunk.logp, chunk.entropy
            first, last = group[0][0], group[-1][1]
            g = slice(first, last)
            local: dict[str, Any] = {k: v[g] if isinstance(v, Tensor) else v for k, v in terms.items()}
            if not any(needs_grad):
                loss[g], ratio[g], clipped[g] = target_loss(logp[g], entropy[g], **local)
                continue
            (loss[g], ratio[g], clipped[g]), g_logp, g_entropy = _value_and_grad(logp[g], entropy[g], local)
            for start, end in group:
                if len(group) > 1:  # a row longer than a chunk: its logits again, now that its ratio is known
                    chunk = head.forward(start, end)
                part = slice(start - first, end - first)
                head.backward(chunk, g_logp[part], None if g_entropy is None else g_entropy[part])
        ctx.save_for_backward(*head.gradients())
        ctx.mark_non_differentiable(logp, entropy, ratio, clipped)
        return loss.sum(), logp, entropy, ratio, clipped

    @staticmethod
    def backward(ctx: Any, g_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        refuse_create_graph("fused_linear_cipo_loss")
        grads = [None if d is None else d * g_loss.to(d.dtype) for d in ctx.saved_tensors]
        return *grads, None, None, None, None


def _value_and_grad(
    logp: Tensor, entropy: Tensor, terms: dict[str, Any]
) -> tuple[tuple[Tensor, ...], Tensor, Tensor | None]:
    """`target_loss`, and its sum's derivative in logp and in entropy (None if the entropy has no part in it)."""
    with torch.enable_grad():
        logp, entropy = logp.detach().requires_grad_(), entropy.detach().requires_grad_()
        values = target_loss(logp, entropy, **terms)
        g_logp, g_entropy = torch.autograd.grad(values[0].sum(), (logp, entropy), allow_unused=True)
    return values, g_logp, g_entropy


def _row_lengths(row_id: Tensor) -> list[int]:
    """Targets of each row, in order. Reading row_id is the one host sync of a sequence-level loss."""
    ids, lengths = torch.unique_consecutive(row_id.cpu(), return_counts=True)
    if ids.unique().numel() != ids.numel():
        raise ValueError("row_id: the targets of a row must be contiguous")
    return lengths.tolist()


def _row_groups(row_lengths: list[int], chunk_targets: int) -> list[list[tuple[int, int]]]:
    """Groups of chunks that hold whole rows: one chunk of as many rows as fit, or the chunks of one longer row."""
    groups: list[list[tuple[int, int]]] = []
    start = end = 0  # of the chunk being filled
    for length in row_lengths:
        if end > start and end + length - start > chunk_targets:
            groups.append([(start, end)])
            start = end
        end += length
        if end - start > chunk_targets:
            groups.append([(start + a, start + b) for a, b in chunk_ranges(length, chunk_targets)])
            start = end  # nothing is being filled
    return [*groups, [(start, end)]] if end > start else groups


def fused_linear_cipo_loss_reference(
    hidden: Tensor,
    weight: Tensor,
    pred_index: Tensor,
    target_id: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    **terms: Any,  # of target_loss
) -> LossOutput:
    """Eager torch under plain autograd: the definition."""
    logp, entropy = fused_linear_logprob_reference(
        hidden, weight, pred_index, target_id, bias=bias, temperature=temperature, softcap=softcap
    )
    loss, ratio, clipped = target_loss(logp, entropy, **terms)
    return _loss_output(terms, loss.sum(), logp.detach(), entropy.detach(), ratio, clipped)


def fused_linear_cipo_loss(
    hidden: Tensor,
    weight: Tensor,
    pred_index: Tensor,
    target_id: Tensor,
    *,
    old_logp: Tensor | None,
    advantage: Tensor,
    rl_weight: Tensor,
    ce_weight: Tensor,
    ref_logp: Tensor | None = None,
    sampler_logp: Tensor | None = None,
    eps_low: float = 0.2,
    eps_high: float = 0.28,
    beta: float = 0.0,
    entropy_coef: float = 0.0,
    is_cap: float | None = None,
    ratio: Literal["token", "sequence"] = "token",
    row_id: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    chunk_targets: int | Literal["auto"] = "auto",
) -> LossOutput:
    """The CIPO loss of N targets, a plain sum: the weights carry every normaliser. Formula: this file's docstring.

    hidden [T, H], weight [V, H], bias [V], pred_index, target_id [N], temperature, softcap: fused_linear_logprob's.
    old_logp, advantage, rl_weight, ce_weight, ref_logp, sampler_logp: [N], constants; log-probs in nats at the
    sampling temperature. old_logp=None: on-policy, logp itself, so q = 1 and the gradient still flows.
    is_cap needs sampler_logp to act; is = 1 without either. ratio="sequence" (GSPO): q is that of the row; needs
    row_id [N], integers, the targets of a row contiguous. chunk_targets changes memory and rounding, not results.

    Differentiable once, in hidden, weight and bias. Without grad no gradient GEMM runs (2NHV FLOPs).
    Raises ValueError for shapes, dtypes and options that do not fit.
    Sources: CIPO (arXiv 2605.14539) over PPO's clipped objective (arXiv 1707.06347) with DAPO's two clips
    (arXiv 2503.14476); gradients in the forward pass after Liger-Kernel (arXiv 2410.10989).
    """
    check_inputs(hidden, weight, pred_index, target_id, bias, temperature, softcap)
    terms: dict[str, Any] = {
        "old_logp": old_logp,
        "advantage": advantage,
        "rl_weight": rl_weight,
        "ce_weight": ce_weight,
        "ref_logp": ref_logp,
        "sampler_logp": sampler_logp,
        "eps_low": eps_low,
        "eps_high": eps_high,
        "beta": beta,
        "entropy_coef": entropy_coef,
        "is_cap": is_cap,
        "ratio": ratio,
        "row_id": row_id,
    }
    _check_terms(pred_index.numel(), terms)
    dtype = compute_dtype(hidden, weight)
    terms |= {k: terms[k].to(dtype) for k in PER_TARGET if k != "row_id" and terms[k] is not None}
    row_lengths = _row_lengths(row_id) if ratio == "sequence" and row_id is not None else None
    if implementation(hidden) == "reference":
        return fused_linear_cipo_loss_reference(
            hidden, weight, pred_index, target_id, temperature=temperature, bias=bias, softcap=softcap, **terms
        )
    size = resolve_chunk_targets(chunk_targets, weight)
    if row_lengths is None:
        groups = [[chunk] for chunk in chunk_ranges(pred_index.numel(), size)]
    else:
        groups = _row_groups(row_lengths, size)
    head_options = (pred_index, target_id, temperature, softcap, size)
    values = _FusedLinearCipoLoss.apply(hidden, weight, bias, head_options, groups, torch.is_grad_enabled(), terms)
    return _loss_output(terms, *values)


def _loss_output(
    terms: dict[str, Any], loss: Tensor, logp: Tensor, entropy: Tensor, ratio: Tensor, clipped: Tensor
) -> LossOutput:
    rl = terms["rl_weight"] != 0
    count = rl.sum().clamp(min=1).to(logp.dtype)
    old = logp if terms["old_logp"] is None else terms["old_logp"]
    kl = k3(torch.where(rl, logp, 0.0), torch.where(rl, old, 0.0))
    ratio_max = torch.cat((torch.where(rl, ratio, 0.0), ratio.new_zeros(1))).amax()
    return LossOutput(loss, logp, entropy, ratio, clipped, clipped.sum() / count, kl.sum() / count, ratio_max)


def _check_terms(n: int, terms: dict[str, Any]) -> None:
    for name in PER_TARGET:
        if terms[name] is not None and terms[name].shape != (n,):
            raise ValueError(f"{name} is {list(terms[name].shape)}: expected [N] = [{n}], one value per target")
    if terms["ratio"] not in ("token", "sequence"):
        raise ValueError(f'ratio={terms["ratio"]!r}: expected "token" or "sequence"')
    if terms["ratio"] == "sequence" and terms["row_id"] is None:
        raise ValueError('ratio="sequence" needs row_id [N]: which targets form a sequence')
    if terms["row_id"] is not None and terms["row_id"].is_floating_point():
        raise ValueError(f"row_id is {terms['row_id'].dtype}: expected integers")
    if terms["beta"] != 0 and terms["ref_logp"] is None:
        raise ValueError(f"beta={terms['beta']} needs ref_logp [N], the reference model's log-probs")
