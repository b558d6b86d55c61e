"""LM head, log-probs, clipped RL loss, KL, entropy and correction cross-entropy in one pass, gradients included.

With logp, H as in fused_linear_logprob.py and q = exp(logp - old_logp):

    loss = sum_n rl_weight[n] * (-is[n] * min(q A, clip(q, 1 - eps_low, 1 + eps_high) A)
                                 + beta * k3(ref_logp, logp) - entropy_coef * H) - ce_weight[n] * logp
    is[n] = min(exp(old_logp - sampler_logp), is_cap), a constant

The term of the policy, min(...), is that of PPO. Two others, with clip(q) between the same bounds:

    dual_clip=c, for A < 0:  max(min(q A, clip(q) A), c A)
    clip="cispo":            clip(q) A logp, clip(q) a constant; no token is dropped, d/d logp = clip(q) A

CISPO's value is what its authors differentiate, and means nothing by itself: logp is in it, where PPO has q.

The gradients of hidden, weight and bias are taken in the forward pass. A chunk of n targets is one GEMM to the
logits, `target_loss` and its derivative on [n] vectors, d(logits) in place of the logits, and two GEMMs: 6NHV
FLOPs, nothing recomputed, no [N, V] tensor. On Triton all between the GEMMs is one kernel when q is a token's.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .dispatch import implementation
from .fused_linear_logprob import (
    ChunkedHead,
    autocast_operands,
    check_chunk_targets,
    check_inputs,
    chunk_ranges,
    compute_dtype,
    fake_gradients,
    fused_linear_logprob_reference,
    head_class,
    head_log_probs,
    per_target,
    refuse_create_graph,
)

PER_TARGET = ("old_logp", "advantage", "rl_weight", "ce_weight", "ref_logp", "sampler_logp")


class LossOutput(NamedTuple):
    """A NamedTuple because FSDP2 finds the tensors of an output through pytree. Only `loss` is differentiable."""

    loss: Tensor  # []
    logp: Tensor  # [N]
    entropy: Tensor  # [N]
    ratio: Tensor  # [N] q; 1 where rl_weight is 0
    clipped: Tensor  # [N] bool: the policy gradient of the target is 0; with clip="cispo": q is beyond the bounds
    clip_fraction: Tensor  # [] over targets with rl_weight != 0, as the two below
    approx_kl: Tensor  # [] mean of k3(logp, old_logp): KL(old || policy), nats per token
    ratio_max: Tensor  # [] 0 without such targets
    two_pass_rows: Tensor  # [] int64: rows longer than a chunk, whose logits a sequence's ratio takes twice (8NHV)


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
    clip: Literal["ppo", "cispo"],
    dual_clip: float | None,
    beta: float,
    entropy_coef: float,
    is_cap: float | None,
    ratio: Literal["token", "sequence"],
    row_lengths: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, q, clipped), each [n], in differentiable torch: the formula of this file's docstring.

    For ratio="sequence" (GSPO, arXiv 2507.18071), logp - old_logp is first averaged over the targets of a row
    that have rl_weight != 0; row_lengths [rows] int64: a row's targets follow those of the row before. A weight of 0
    cuts its terms off at their inputs: an inf or nan there reaches neither loss nor gradient.
    """
    rl = rl_weight != 0
    p = torch.where(rl, logp, 0.0)
    old = torch.where(rl, (logp if old_logp is None else old_logp).detach(), 0.0)
    log_q = p - old
    if ratio == "sequence":
        assert row_lengths is not None
        log_q = _row_mean(log_q, rl, row_lengths)
    q, a = log_q.exp(), torch.where(rl, advantage, 0.0)
    held = q.clamp(1 - eps_low, 1 + eps_high)
    if clip == "cispo":
        policy, clipped = held.detach() * a * p, held != q
    else:
        policy, clipped = torch.minimum(q * a, held * a), held * a < q * a
        if dual_clip is not None:
            below = (a < 0) & (policy < dual_clip * a)
            policy, clipped = torch.where(below, dual_clip * a, policy), clipped | below
    if sampler_logp is not None and is_cap is not None:
        policy = policy * _importance(old, torch.where(rl, sampler_logp, 0.0), is_cap)
    loss = -policy
    if beta != 0:
        assert ref_logp is not None
        loss = loss + beta * k3(torch.where(rl, ref_logp, 0.0), p)
    if entropy_coef != 0:
        loss = loss - entropy_coef * torch.where(rl, entropy, 0.0)
    loss = rl_weight * loss - ce_weight * torch.where(ce_weight != 0, logp, 0.0)
    return loss, q.detach(), clipped


def _importance(old_logp: Tensor, sampler_logp: Tensor, is_cap: float) -> Tensor:
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


def target_loss_gradient(
    logp: Tensor, q: Tensor, clipped: Tensor, terms: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """d sum(target_loss) / d logp and / d entropy, [n]; None without an entropy bonus. q, clipped: target_loss's.

    d/d logp = rl_weight * (-is * q A [not clipped] + beta * (1 - exp(ref_logp - logp))) - ce_weight, the first term
    averaged over the row for a sequence's q: q is exp of a row mean, and that mean is its own adjoint. CISPO's is
    -is * clip(q) A, clipped or not.
    """
    rl = terms["rl_weight"] != 0
    p = torch.where(rl, logp, 0.0)
    if terms["clip"] == "cispo":
        q, clipped = q.clamp(1 - terms["eps_low"], 1 + terms["eps_high"]), torch.zeros_like(clipped)
    g = -terms["rl_weight"] * torch.where(rl & ~clipped, q * terms["advantage"], 0.0)
    if terms["sampler_logp"] is not None and terms["is_cap"] is not None:
        old = torch.where(rl, logp if terms["old_logp"] is None else terms["old_logp"], 0.0)
        g = g * _importance(old, torch.where(rl, terms["sampler_logp"], 0.0), terms["is_cap"])
    if terms["ratio"] == "sequence":
        g = _row_mean(g, rl, terms["row_lengths"])
    if terms["beta"] != 0:
        g = g - terms["beta"] * terms["rl_weight"] * torch.expm1(torch.where(rl, terms["ref_logp"], 0.0) - p)
    g_entropy = -terms["entropy_coef"] * terms["rl_weight"] if terms["entropy_coef"] != 0 else None
    return g - terms["ce_weight"], g_entropy


class TargetOutputs(NamedTuple):
    """What the op writes for each target, all [N]."""

    loss: Tensor
    logp: Tensor
    entropy: Tensor
    ratio: Tensor
    clipped: Tensor  # bool


class Group(NamedTuple):
    """Chunks of targets whose losses are taken together."""

    chunks: list[tuple[int, int]]
    rows: slice  # of row_lengths, for the ratio of sequences


def _group_loss(head: ChunkedHead, group: Group, terms: dict[str, Any], out: TargetOutputs) -> None:
    """Losses of one group of chunks, and their gradients."""
    for start, end in group.chunks:
        chunk = head.forward(start, end)
        out.logp[start:end], out.entropy[start:end] = chunk.logp, chunk.entropy
    first, last = group.chunks[0][0], group.chunks[-1][1]
    local = {k: v[first:last] if k in PER_TARGET and v is not None else v for k, v in terms.items()}
    if local["row_lengths"] is not None:
        local["row_lengths"] = local["row_lengths"][group.rows]
    logp = out.logp[first:last]
    loss, q, clipped = target_loss(logp, out.entropy[first:last], **local)
    out.loss[first:last], out.ratio[first:last], out.clipped[first:last] = loss, q, clipped
    g_logp, g_entropy = target_loss_gradient(logp, q, clipped, local)
    for start, end in group.chunks:
        if len(group.chunks) > 1:  # a row longer than a chunk: its logits again, now that its ratio is known
            chunk = head.forward(start, end)
        part = slice(start - first, end - first)
        head.backward(chunk, g_logp[part], None if g_entropy is None else g_entropy[part])


def _head_and_loss(
    hidden: Tensor, weight: Tensor, ratio: str, exp: bool
) -> tuple[type[ChunkedHead], Callable[..., None]]:
    """The head, and what computes the loss of a group of chunks on it, as `_group_loss` does."""
    Head = head_class(hidden)
    if Head is ChunkedHead or ratio == "sequence":
        return Head, _group_loss
    if exp and (hidden.dtype == torch.bfloat16 or not hidden.is_cuda):
        from .exp_gemm import ExpHead, exp_loss

        return ExpHead, exp_loss
    from .fused_linear_cipo_loss_triton import token_loss

    return Head, token_loss


@torch.library.custom_op("cipo_kernels::linear_cipo_loss", mutates_args=())
def _linear_cipo_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pred_index: Tensor,
    target_id: Tensor,
    temperature: Tensor | None,
    softcap: float | None,
    chunk_targets: int | None,
    needs_grad: Sequence[bool],
    old_logp: Tensor | None,
    advantage: Tensor,
    rl_weight: Tensor,
    ce_weight: Tensor,
    ref_logp: Tensor | None,
    sampler_logp: Tensor | None,
    eps_low: float,
    eps_high: float,
    clip: str,
    dual_clip: float | None,
    beta: float,
    entropy_coef: float,
    is_cap: float | None,
    ratio: str,
    row_lengths: Sequence[int] | None,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss [], logp, entropy, ratio, clipped [N], two_pass_rows [], d_hidden, d_weight, d_bias).

    A gradient not asked for is empty; the others are of the accumulators' dtype: `_backward` scales and rounds them.
    """
    terms: dict[str, Any] = {
        "old_logp": old_logp,
        "advantage": advantage,
        "rl_weight": rl_weight,
        "ce_weight": ce_weight,
        "ref_logp": ref_logp,
        "sampler_logp": sampler_logp,
        "eps_low": eps_low,
        "eps_high": eps_high,
        "clip": clip,
        "dual_clip": dual_clip,
        "beta": beta,
        "entropy_coef": entropy_coef,
        "is_cap": is_cap,
        "ratio": ratio,
        "row_lengths": None if row_lengths is None else _to_device(row_lengths, hidden.device),
    }
    if not any(needs_grad):
        logp, entropy = head_log_probs(hidden, weight, bias, pred_index, target_id, temperature, softcap, chunk_targets)
        loss, q, clipped = target_loss(logp, entropy, **terms)
        nothing = [torch.empty(0, dtype=logp.dtype, device=logp.device) for _ in range(3)]
        return loss.sum(), logp, entropy, q, clipped, pred_index.new_zeros(()), *nothing  # type: ignore[return-value]
    if ratio == "sequence" and _ratio_is_one(terms):
        terms |= {"advantage": _advantage_of_row(advantage, rl_weight, terms["row_lengths"]), "ratio": "token"}
    ratio = terms["ratio"]
    exp = impl == "exp" and ratio == "token" and softcap is None and entropy_coef == 0
    Head, group_loss = _head_and_loss(hidden, weight, ratio, exp)
    size = chunk_targets or Head.auto_chunk_targets(weight)
    head = Head(hidden, weight, bias, needs_grad, pred_index, target_id, temperature, softcap, size)
    clipped = torch.empty_like(head.target_id, dtype=torch.bool)
    out = TargetOutputs(head.new_vector(), head.new_vector(), head.new_vector(), head.new_vector(), clipped)
    if ratio == "sequence":
        assert row_lengths is not None
        groups = _row_groups(row_lengths, size)
    else:
        groups = [Group([chunk], slice(0)) for chunk in chunk_ranges(pred_index.numel(), size)]
    with torch.cuda.device_of(hidden):  # Triton launches on the current device
        for group in groups:
            group_loss(head, group, terms, out)
    two_pass_rows = sum(len(group.chunks) > 1 for group in groups)
    stat = torch.full((), two_pass_rows, dtype=torch.int64, device=hidden.device)  # a fill kernel: no sync
    d_hidden, d_weight, d_bias = head.gradients()
    return out.loss.sum(), out.logp, out.entropy, out.ratio, out.clipped, stat, d_hidden, d_weight, d_bias


@_linear_cipo_loss.register_fake
def _(*args: Any, **_: Any) -> tuple[Tensor, ...]:
    hidden, weight, bias, pred_index, _target_id, _temperature, _softcap, _size, needs_grad, *_terms = args
    vector = hidden.new_empty(pred_index.shape, dtype=compute_dtype(hidden, weight))
    return (
        vector.new_empty(()),
        vector,
        torch.empty_like(vector),
        torch.empty_like(vector),
        torch.empty_like(vector, dtype=torch.bool),
        vector.new_empty((), dtype=torch.int64),
        *fake_gradients((hidden, weight, bias), needs_grad, vector.dtype),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # or autograd makes a zero gradient for each output, [V, H] ones included
    ctx.save_for_backward(*output[6:])
    ctx.dtypes = [None if p is None else p.dtype for p in inputs[:3]]
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, g_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    refuse_create_graph("fused_linear_cipo_loss")
    grads = [
        torch.mul(d, g_loss, out=torch.empty_like(d, dtype=dtype)) if needed and g_loss is not None else None
        for d, dtype, needed in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad[:3], strict=True)
    ]
    return *grads, *(None,) * 22


_linear_cipo_loss.register_autograd(_backward, setup_context=_setup_context)


def _to_device(row_lengths: Sequence[int], device: torch.device) -> Tensor:
    """[rows] int64. From pinned memory, because a copy from any other waits for the device."""
    lengths = torch.tensor(row_lengths, dtype=torch.int64, pin_memory=device.type == "cuda")
    return lengths.to(device, non_blocking=True)


def _ratio_is_one(terms: dict[str, Any]) -> bool:
    """On-policy, and no importance weight, which is a function of logp: q and what it weighs are known beforehand."""
    return terms["old_logp"] is None and (terms["sampler_logp"] is None or terms["is_cap"] is None)


def _advantage_of_row(advantage: Tensor, rl_weight: Tensor, row_lengths: Tensor) -> Tensor:
    """[N]: with it the token's ratio gives the loss and the gradient of a sequence's ratio that is 1.

    Of a row of m targets that count the loss is -sum_n w_n A_n q, and q = exp(mean of logp - old_logp): d/d logp_n is
    -mean(w A) for each of them. A token's is -w_n A'_n, so A'_n = mean(w A) / w_n; and sum_n w_n A'_n = sum_n w_n A_n.
    """
    rl = rl_weight != 0
    return torch.where(rl, _row_mean(rl_weight * advantage, rl, row_lengths) / rl_weight, 0.0)


def _row_groups(row_lengths: Sequence[int], chunk_targets: int) -> list[Group]:
    """Groups of chunks that hold whole rows: one chunk of as many rows as fit, or the chunks of one longer row."""
    groups: list[Group] = []
    start = end = first = 0  # the chunk being filled: targets start:end, of rows from `first` on
    for row, length in enumerate(row_lengths):
        if end > start and end + length - start > chunk_targets:
            groups.append(Group([(start, end)], slice(first, row)))
            start, first = end, row
        end += length
        if end - start > chunk_targets:
            chunks = [(start + a, start + b) for a, b in chunk_ranges(length, chunk_targets)]
            groups.append(Group(chunks, slice(first, row + 1)))
            start, first = end, row + 1  # nothing is being filled
    return [*groups, Group([(start, end)], slice(first, len(row_lengths)))] if end > start else groups


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
    two_pass_rows = pred_index.new_zeros(())
    return _loss_output(terms, loss.sum(), logp.detach(), entropy.detach(), ratio, clipped, two_pass_rows)


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
    clip: Literal["ppo", "cispo"] = "ppo",
    dual_clip: float | None = None,
    beta: float = 0.0,
    entropy_coef: float = 0.0,
    is_cap: float | None = None,
    ratio: Literal["token", "sequence"] = "token",
    row_lengths: Sequence[int] | None = None,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    chunk_targets: int | Literal["auto"] = "auto",
    impl: Literal["logits", "exp"] = "logits",
) -> LossOutput:
    """The CIPO loss of N targets, a plain sum: the weights carry every normaliser. Formula: this file's docstring.

    hidden [T, H], weight [V, H], bias [V], pred_index, target_id [N], temperature, softcap: fused_linear_logprob's.
    old_logp, advantage, rl_weight, ce_weight, ref_logp, sampler_logp: [N], constants; log-probs in nats at the
    sampling temperature. old_logp=None: on-policy, logp itself, so q = 1 and the gradient still flows.
    is_cap needs sampler_logp to act; is = 1 without either. ratio="sequence" (GSPO): q is that of the row; needs
    row_lengths, integers of the host: how many targets each row has, one row after another. clip="cispo" goes with
    neither it nor dual_clip, which is above 1. chunk_targets changes memory and rounding, not results.
    impl, on Triton: "logits", or "exp" (exp_gemm.py) where that applies: bf16 on a GPU, with grad, ratio="token"
    (or rows whose ratio is 1: no old_logp, no importance weight), no softcap and no entropy_coef; elsewhere "logits".

    Differentiable once, in hidden, weight and bias. Without grad no gradient GEMM runs (2NHV FLOPs).
    Raises ValueError for shapes, dtypes and options that do not fit.
    Sources: CIPO (arXiv 2605.14539) over PPO's clipped objective (arXiv 1707.06347) with DAPO's two clips
    (arXiv 2503.14476); CISPO is MiniMax-M1's (arXiv 2506.13585), dual clip arXiv 1912.09729's; gradients in the
    forward pass after Liger-Kernel (arXiv 2410.10989).
    """
    hidden, weight = autocast_operands(hidden, weight)
    check_inputs(hidden, weight, pred_index, target_id, bias, temperature, softcap)
    if impl not in ("logits", "exp"):
        raise ValueError(f'impl={impl!r}: expected "logits" or "exp"')
    terms: dict[str, Any] = {
        "old_logp": old_logp,
        "advantage": advantage,
        "rl_weight": rl_weight,
        "ce_weight": ce_weight,
        "ref_logp": ref_logp,
        "sampler_logp": sampler_logp,
        "eps_low": eps_low,
        "eps_high": eps_high,
        "clip": clip,
        "dual_clip": dual_clip,
        "beta": beta,
        "entropy_coef": entropy_coef,
        "is_cap": is_cap,
        "ratio": ratio,
        "row_lengths": row_lengths if ratio == "sequence" else None,
    }
    _check_terms(pred_index.numel(), terms)
    dtype = compute_dtype(hidden, weight)
    terms |= {k: terms[k].to(dtype).contiguous() for k in PER_TARGET if terms[k] is not None}
    if implementation(hidden) == "reference":
        if terms["row_lengths"] is not None:
            terms["row_lengths"] = _to_device(terms["row_lengths"], hidden.device)
        return fused_linear_cipo_loss_reference(
            hidden, weight, pred_index, target_id, temperature=temperature, bias=bias, softcap=softcap, **terms
        )
    needs_grad = [torch.is_grad_enabled() and p is not None and p.requires_grad for p in (hidden, weight, bias)]
    loss, logp, entropy, q, clipped, two_pass_rows, *_ = _linear_cipo_loss(
        hidden,
        weight,
        bias,
        pred_index,
        target_id,
        per_target(temperature, pred_index),
        softcap,
        check_chunk_targets(chunk_targets),
        needs_grad,
        **terms,
        impl=impl,
    )
    return _loss_output(terms, loss, logp, entropy, q, clipped, two_pass_rows)


def _loss_output(
    terms: dict[str, Any],
    loss: Tensor,
    logp: Tensor,
    entropy: Tensor,
    ratio: Tensor,
    clipped: Tensor,
    two_pass_rows: Tensor,
) -> LossOutput:
    rl = terms["rl_weight"] != 0
    count = rl.sum().clamp(min=1).to(logp.dtype)
    old = logp if terms["old_logp"] is None else terms["old_logp"]
    kl = k3(torch.where(rl, logp, 0.0), torch.where(rl, old, 0.0))
    ratio_max = torch.cat((torch.where(rl, ratio, 0.0), ratio.new_zeros(1))).amax()
    clip_fraction, approx_kl = clipped.sum() / count, kl.sum() / count
    return LossOutput(loss, logp, entropy, ratio, clipped, clip_fraction, approx_kl, ratio_max, two_pass_rows)


def _check_terms(n: int, terms: dict[str, Any]) -> None:
    for name in PER_TARGET:
        if terms[name] is not None and terms[name].shape != (n,):
            raise ValueError(f"{name} is {list(terms[name].shape)}: expected [N] = [{n}], one value per target")
    if terms["ratio"] not in ("token", "sequence"):
        raise ValueError(f'ratio={terms["ratio"]!r}: expected "token" or "sequence"')
    if terms["clip"] not in ("ppo", "cispo"):
        raise ValueError(f'clip={terms["clip"]!r}: expected "ppo" or "cispo"')
    if terms["dual_clip"] is not None and not terms["dual_clip"] > 1:
        raise ValueError(f"dual_clip={terms['dual_clip']}: must be above 1, for at q = 1 nothing is clipped")
    if terms["clip"] == "cispo" and (terms["ratio"] == "sequence" or terms["dual_clip"] is not None):
        raise ValueError('clip="cispo" is defined for ratio="token" and without dual_clip: it bounds every weight')
    if terms["ratio"] == "sequence":
        lengths = terms["row_lengths"]
        if lengths is None:
            raise ValueError('ratio="sequence" needs row_lengths: how many targets each sequence has')
        if any(length < 0 for length in lengths) or sum(lengths) != n:
            raise ValueError(f"row_lengths={list(lengths)}: expected lengths of rows that add up to N = {n}")
    if terms["beta"] != 0 and terms["ref_logp"] is None:
        raise ValueError(f"beta={terms['beta']} needs ref_logp [N], the reference model's log-probs")
