"""LM head, log-probs, clipped RL loss, KL, entropy and correction cross-entropy in one pass, gradients included.

Log-probs and entropies: head.py. The loss of a target, a sum over them: terms.py.

The gradients of hidden, weight and bias are taken in the forward pass. A chunk of n targets is one GEMM to the
logits, `target_loss` and its derivative on [n] vectors, d(logits) in place of the logits, and two GEMMs: 6NHV
FLOPs, nothing recomputed, no [N, V] tensor. On Triton all between the GEMMs is one kernel when q is a token's.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..autograd import refuse_create_graph
from ..dispatch import implementation
from .head import (
    Gradients,
    Head,
    VocabShard,
    chunk_ranges,
    compute_dtype,
    fake_gradients,
    logits_back_end,
    make_head,
    on_triton,
    shard_arguments,
)
from .inputs import autocast_operands, check_chunk_targets, check_inputs, per_target
from .logprob import fused_linear_logprob_reference, head_log_probs
from .terms import (
    Options,
    TargetOutputs,
    Terms,
    k3,
    stack_terms,
    target_loss,
    target_loss_gradient,
    tokens_of_on_policy_rows,
)


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


class Group(NamedTuple):
    """Chunks of targets whose losses are taken together."""

    chunks: list[tuple[int, int]]
    rows: slice  # of row_lengths, for the ratio of sequences


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
    terms: Tensor,
    options: Sequence[float],
    row_lengths: Sequence[int] | None,
    impl: str,
    group: str | None,
    vocab_start: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss [], logp, entropy, ratio, clipped [N], two_pass_rows [], d_hidden, d_weight, d_bias).

    terms: `stack_terms`; options: `Options.to_floats`. A gradient not asked for is empty; the others are of the
    accumulators' dtype: `_backward` scales and rounds them.
    """
    given = Options.from_floats(options)
    rows = None if row_lengths is None else _to_device(row_lengths, hidden.device)
    head = make_head(hidden, weight, bias, pred_index, target_id, temperature, softcap, group, vocab_start)
    if not any(needs_grad):
        logp, entropy = head_log_probs(head, chunk_targets)
        loss, q, clipped = target_loss(logp, entropy, Terms(*terms), given, rows)
        nothing = [torch.empty(0, dtype=logp.dtype, device=logp.device) for _ in range(3)]
        return loss.sum(), logp, entropy, q, clipped, pred_index.new_zeros(()), *nothing  # type: ignore[return-value]
    if rows is not None and given.on_policy and given.is_cap is None:
        terms, given = tokens_of_on_policy_rows(Terms(*terms), given, rows)
        rows = row_lengths = None
    how, grads = _back_end(head, given, impl), Gradients(head, needs_grad)
    most = chunk_targets or how.auto_chunk_targets(weight)
    groups = _token_groups(pred_index.numel(), most) if row_lengths is None else _row_groups(row_lengths, most)
    clipped = torch.empty_like(head.target_id, dtype=torch.bool)
    out = TargetOutputs(head.new_vector(), head.new_vector(), head.new_vector(), head.new_vector(), clipped)
    buffer = how.new_buffer(head, min(most, pred_index.numel()))
    with torch.cuda.device_of(hidden):  # Triton launches on the current device
        for together in groups:
            if on_triton(hidden) and rows is None and group is None:
                [(start, end)] = together.chunks
                grads.add(start, *how.token_loss(head, buffer, start, end, terms, given, out))
            else:
                _group_loss(how, head, buffer, together, terms, given, rows, out, grads)
    two_pass_rows = sum(len(together.chunks) > 1 for together in groups)
    stat = torch.full((), two_pass_rows, dtype=torch.int64, device=hidden.device)  # a fill kernel: no sync
    return out.loss.sum(), *out[1:], stat, *grads.tensors()  # type: ignore[return-value]


def _back_end(head: Head, options: Options, impl: str) -> ModuleType:
    """exp_gemm.py where it is asked for and applies: fp32 on a GPU would be slow in Triton's GEMM."""
    plain = not options.sequence and options.entropy_coef == 0 and head.softcap is None and head.group is None
    if (
        impl == "exp"
        and plain
        and on_triton(head.hidden)
        and (head.hidden.dtype == torch.bfloat16 or not head.hidden.is_cuda)
    ):
        from . import exp_gemm

        return exp_gemm
    return logits_back_end(head.hidden, head.group)


def _group_loss(
    how: ModuleType,
    head: Head,
    buffer: Any,
    group: Group,
    terms: Tensor,
    options: Options,
    row_lengths: Tensor | None,
    out: TargetOutputs,
    grads: Gradients,
) -> None:
    """Losses of one group of chunks, and their gradients."""
    for start, end in group.chunks:
        chunk = how.forward(head, buffer, start, end)
        out.logp[start:end], out.entropy[start:end] = chunk.logp, chunk.entropy
    first, last = group.chunks[0][0], group.chunks[-1][1]
    logp, own = out.logp[first:last], Terms(*terms[:, first:last])
    rows = None if row_lengths is None else row_lengths[group.rows]
    loss, q, clipped = target_loss(logp, out.entropy[first:last], own, options, rows)
    out.loss[first:last], out.ratio[first:last], out.clipped[first:last] = loss, q, clipped
    g_logp, g_entropy = target_loss_gradient(logp, q, clipped, own, options, rows)
    for start, end in group.chunks:
        if len(group.chunks) > 1:  # a row longer than a chunk: its logits again, now that its ratio is known
            chunk = how.forward(head, buffer, start, end)
        part = slice(start - first, end - first)
        g_h = None if g_entropy is None else g_entropy[part]
        grads.add(start, chunk.x, how.d_logits(head, buffer, chunk, g_logp[part], g_h))


@_linear_cipo_loss.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, pred_index: Tensor, target_id: Tensor,
    temperature: Tensor | None, softcap: float | None, chunk_targets: int | None, needs_grad: Sequence[bool],
    terms: Tensor, *_: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    vector = terms.new_empty(pred_index.shape)
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
    hidden, weight, bias, *_ = inputs
    *_, d_hidden, d_weight, d_bias = output
    ctx.set_materialize_grads(False)  # or autograd makes a zero gradient for each output, [V, H] ones included
    ctx.save_for_backward(d_hidden, d_weight, d_bias)
    ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
    _, *constants = output
    ctx.mark_non_differentiable(*constants)


def _backward(ctx: Any, g_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    refuse_create_graph("fused_linear_cipo_loss")
    (d_hidden, d_weight, d_bias), constants = ctx.saved_tensors, ctx.needs_input_grad[3:]
    grads = [
        torch.mul(d, g_loss, out=torch.empty_like(d, dtype=dtype)) if needed and g_loss is not None else None
        for d, dtype, needed in zip((d_hidden, d_weight, d_bias), ctx.dtypes, ctx.needs_input_grad, strict=False)
    ]
    return *grads, *[None for _ in constants]


_linear_cipo_loss.register_autograd(_backward, setup_context=_setup_context)


def _to_device(row_lengths: Sequence[int], device: torch.device) -> Tensor:
    """[rows] int64. From pinned memory, because a copy from any other waits for the device."""
    lengths = torch.tensor(row_lengths, dtype=torch.int64, pin_memory=device.type == "cuda")
    return lengths.to(device, non_blocking=True)


def _token_groups(n: int, chunk_targets: int) -> list[Group]:
    return [Group([chunk], slice(0)) for chunk in chunk_ranges(n, chunk_targets)]


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
    terms: Terms,
    options: Options,
    row_lengths: Tensor | None,
    **head: Any,  # of fused_linear_logprob_reference
) -> LossOutput:
    """Eager torch under plain autograd: the definition."""
    logp, entropy = fused_linear_logprob_reference(hidden, weight, pred_index, target_id, **head)
    loss, ratio, clipped = target_loss(logp, entropy, terms, options, row_lengths)
    two_pass_rows = pred_index.new_zeros(())
    return _loss_output(terms, options, loss.sum(), logp.detach(), entropy.detach(), ratio, clipped, two_pass_rows)


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
    shard: VocabShard | None = None,
) -> LossOutput:
    """The CIPO loss of N targets, a plain sum: the weights carry every normaliser. Formula: terms.py.

    hidden [T, H], weight [V, H], bias [V], pred_index, target_id [N], temperature, softcap: fused_linear_logprob's.
    old_logp, advantage, rl_weight, ce_weight, ref_logp, sampler_logp: [N], constants; log-probs in nats at the
    sampling temperature. old_logp=None: on-policy, logp itself, so q = 1 and the gradient still flows.
    is_cap needs sampler_logp to act; is = 1 without either. ratio="sequence" (GSPO): q is that of the row; needs
    row_lengths, integers of the host: how many targets each row has, one row after another. clip="cispo" goes with
    neither it nor dual_clip, which is above 1. chunk_targets changes memory and rounding, not results.
    impl, on Triton: "logits", or "exp" (exp_gemm.py) where that applies: bf16 on a GPU, with grad, ratio="token"
    (or rows whose ratio is 1: no old_logp, no importance weight), no softcap, no entropy_coef and no shard; elsewhere
    "logits".
    shard: weight and bias are a part of the vocabulary's; see fused_linear_logprob. Loss and statistics are whole.

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
    n, dtype = pred_index.numel(), compute_dtype(hidden)
    terms = stack_terms(
        n,
        dtype,
        hidden.device,
        old_logp=old_logp,
        advantage=advantage,
        rl_weight=rl_weight,
        ce_weight=ce_weight,
        ref_logp=ref_logp,
        sampler_logp=sampler_logp,
    )
    _check_options(clip, dual_clip, ratio)
    if beta != 0 and ref_logp is None:
        raise ValueError(f"beta={beta} needs ref_logp [N], the reference model's log-probs")
    options = Options(
        eps_low=eps_low,
        eps_high=eps_high,
        dual_clip=dual_clip,
        beta=beta,
        entropy_coef=entropy_coef,
        is_cap=None if sampler_logp is None else is_cap,
        on_policy=old_logp is None,
        cispo=clip == "cispo",
        sequence=ratio == "sequence",
    )
    lengths = _checked_row_lengths(row_lengths, n) if options.sequence else None
    if implementation(hidden) == "reference" and shard is None:
        rows = None if lengths is None else _to_device(lengths, hidden.device)
        head: dict[str, Any] = {"temperature": temperature, "bias": bias, "softcap": softcap}
        args = (hidden, weight, pred_index, target_id, Terms(*terms), options, rows)
        return fused_linear_cipo_loss_reference(*args, **head)
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
        terms,
        options.to_floats(),
        lengths,
        impl,
        *shard_arguments(shard),
    )
    return _loss_output(Terms(*terms), options, loss, logp, entropy, q, clipped, two_pass_rows)


def _loss_output(
    terms: Terms,
    options: Options,
    loss: Tensor,
    logp: Tensor,
    entropy: Tensor,
    ratio: Tensor,
    clipped: Tensor,
    two_pass_rows: Tensor,
) -> LossOutput:
    rl = terms.rl_weight != 0
    count = rl.sum().clamp(min=1).to(logp.dtype)
    old = logp if options.on_policy else terms.old_logp
    kl = k3(torch.where(rl, logp, 0.0), torch.where(rl, old, 0.0))
    ratio_max = torch.cat((torch.where(rl, ratio, 0.0), ratio.new_zeros(1))).amax()
    clip_fraction, approx_kl = clipped.sum() / count, kl.sum() / count
    return LossOutput(loss, logp, entropy, ratio, clipped, clip_fraction, approx_kl, ratio_max, two_pass_rows)


def _check_options(clip: str, dual_clip: float | None, ratio: str) -> None:
    if ratio not in ("token", "sequence"):
        raise ValueError(f'ratio={ratio!r}: expected "token" or "sequence"')
    if clip not in ("ppo", "cispo"):
        raise ValueError(f'clip={clip!r}: expected "ppo" or "cispo"')
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip={dual_clip}: must be above 1, for at q = 1 nothing is clipped")
    if clip == "cispo" and (ratio == "sequence" or dual_clip is not None):
        raise ValueError('clip="cispo" is defined for ratio="token" and without dual_clip: it bounds every weight')


def _checked_row_lengths(row_lengths: Sequence[int] | None, n: int) -> Sequence[int]:
    if row_lengths is None:
        raise ValueError('ratio="sequence" needs row_lengths: how many targets each sequence has')
    if any(length < 0 for length in row_lengths) or sum(row_lengths) != n:
        raise ValueError(f"row_lengths={list(row_lengths)}: expected lengths of rows that add up to N = {n}")
    return row_lengths
