"""Log-probs and entropies of targets under a linear LM head, without an [N, V] tensor. Formulas: head.py."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ..autograd import refuse_create_graph
from ..dispatch import implementation
from .chunked import linear_logits
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


def fused_linear_logprob_reference(
    hidden: Tensor,
    weight: Tensor,
    pred_index: Tensor,
    target_id: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(logp [N], entropy [N]) as eager torch under plain autograd: the definition."""
    dtype = compute_dtype(hidden)
    x = hidden[pred_index].to(dtype)  # [N, H]
    b = None if bias is None else bias.to(dtype)
    t = temperature[:, None].to(dtype) if isinstance(temperature, Tensor) else temperature
    with torch.autocast(hidden.device.type, enabled=False):  # which would round x and W to its dtype once more
        logp_v = torch.log_softmax(linear_logits(x, weight.to(dtype), b, t, softcap), dim=-1)  # [N, V]
    return logp_v.gather(-1, target_id[:, None])[:, 0], -(logp_v.exp() * logp_v).sum(-1)


@torch.library.custom_op("cipo_kernels::linear_logprob", mutates_args=())
def _linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pred_index: Tensor,
    target_id: Tensor,
    temperature: Tensor | None,
    softcap: float | None,
    chunk_targets: int | None,
    group: str | None,
    vocab_start: int,
) -> tuple[Tensor, Tensor]:
    """(logp, entropy) [N]: 2NHV FLOPs, nothing [N, V] is kept."""
    head = make_head(hidden, weight, bias, pred_index, target_id, temperature, softcap, group, vocab_start)
    return head_log_probs(head, chunk_targets)


def head_log_probs(head: Head, chunk_targets: int | None) -> tuple[Tensor, Tensor]:
    """(logp, entropy) [N] without gradients. Triton stores no logit, except fp32 on a GPU, by cuBLAS, and a shard's."""
    hidden, n = head.hidden, head.target_id.numel()
    logp, entropy = head.new_vector(), head.new_vector()
    if head.group is None and on_triton(hidden) and (hidden.dtype == torch.bfloat16 or not hidden.is_cuda):
        from . import logp_gemm as how
    else:
        how = logits_back_end(hidden, head.group)
    most = chunk_targets or how.auto_chunk_targets(head.weight)
    buffer = how.new_buffer(head, min(most, n))
    with torch.cuda.device_of(hidden):  # Triton launches on the current device
        for start, end in chunk_ranges(n, most):
            chunk = how.forward(head, buffer, start, end)
            logp[start:end], entropy[start:end] = chunk.logp, chunk.entropy
    return logp, entropy


@_linear_logprob.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, pred_index: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    n, dtype = pred_index.shape, compute_dtype(hidden)
    return hidden.new_empty(n, dtype=dtype), hidden.new_empty(n, dtype=dtype)


@torch.library.custom_op("cipo_kernels::linear_logprob_backward", mutates_args=())
def _linear_logprob_backward(
    g_logp: Tensor | None,
    g_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pred_index: Tensor,
    target_id: Tensor,
    temperature: Tensor | None,
    softcap: float | None,
    chunk_targets: int | None,
    group: str | None,
    vocab_start: int,
    needs_grad: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of (hidden, weight, bias), empty where not asked for: 6NHV FLOPs, the logits are recomputed."""
    head = make_head(hidden, weight, bias, pred_index, target_id, temperature, softcap, group, vocab_start)
    grads = Gradients(head, needs_grad)
    g_logp = torch.zeros_like(head.new_vector()) if g_logp is None else g_logp.contiguous()
    with torch.cuda.device_of(hidden):
        _add_gradients(head, chunk_targets, g_logp, None if g_entropy is None else g_entropy.contiguous(), grads)
    parameters = (hidden, weight, weight if bias is None else bias)
    d_hidden, d_weight, d_bias = (d.to(p.dtype) for d, p in zip(grads.tensors(), parameters, strict=True))
    return d_hidden, d_weight, d_bias


def _add_gradients(
    head: Head, chunk_targets: int | None, g_logp: Tensor, g_entropy: Tensor | None, grads: Gradients
) -> None:
    """In a buffer that is gone before gradients are rounded to their parameters' dtype."""
    how, n = logits_back_end(head.hidden, head.group), head.target_id.numel()
    most = chunk_targets or how.auto_chunk_targets(head.weight)
    buffer = how.new_buffer(head, min(most, n))
    for start, end in chunk_ranges(n, most):
        chunk = how.forward(head, buffer, start, end)
        g_h = None if g_entropy is None else g_entropy[start:end]
        grads.add(start, chunk.x, how.d_logits(head, buffer, chunk, g_logp[start:end], g_h))


@_linear_logprob_backward.register_fake
def _(
    g_logp: Tensor | None,
    g_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *inputs: Any,
) -> tuple[Tensor, ...]:
    *_, needs_grad = inputs
    return fake_gradients((hidden, weight, bias), needs_grad, None)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # an unused entropy then has gradient None, and costs nothing
    *tensors, ctx.softcap, ctx.chunk_targets, ctx.group, ctx.vocab_start = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, g_logp: Tensor | None, g_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
    refuse_create_graph("fused_linear_logprob")
    needs_grad, constants = ctx.needs_input_grad[:3], ctx.needs_input_grad[3:]
    hidden, weight, bias, pred_index, target_id, temperature = ctx.saved_tensors
    gradients = _linear_logprob_backward(
        g_logp,
        g_entropy,
        hidden,
        weight,
        bias,
        pred_index,
        target_id,
        temperature,
        ctx.softcap,
        ctx.chunk_targets,
        ctx.group,
        ctx.vocab_start,
        needs_grad,
    )
    d_hidden, d_weight, d_bias = (d if needed else None for d, needed in zip(gradients, needs_grad, strict=True))
    return d_hidden, d_weight, d_bias, *[None for _ in constants]


_linear_logprob.register_autograd(_backward, setup_context=_setup_context)


def fused_linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    pred_index: Tensor,
    target_id: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
    chunk_targets: int | Literal["auto"] = "auto",
    shard: VocabShard | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-prob of each target, differentiable in hidden, weight and bias. Formulas: head.py.

    hidden [T, H], weight [V, H], bias [V]: floating; pred_index, target_id [N] int64: target n is the token
    target_id[n], predicted from hidden[pred_index[n]] (rows may repeat). temperature: a number, or [N]. softcap: in
    logits, before the temperature. Logits must be finite. Without grad only the forward runs (2NHV FLOPs);
    the backward recomputes the logits.

    shard: weight and bias are a part of the vocabulary's, all ranks of its group have the same other inputs, and call
    this together (vocab_parallel.py); d(hidden) is whole on all of them.

    hidden and weight are of one dtype, bf16, fp32 or fp64; under torch.autocast both are cast to its dtype.

    Returns logp [N] in nats, fp32 (fp64 for fp64 inputs), and the entropy [N] if `return_entropy`.
    Raises ValueError for shapes and dtypes that do not fit. Source: ours; the chunking is common practice.
    """
    hidden, weight = autocast_operands(hidden, weight)
    check_inputs(hidden, weight, pred_index, target_id, bias, temperature, softcap)
    if implementation(hidden) == "reference" and shard is None:
        logp, entropy = fused_linear_logprob_reference(
            hidden, weight, pred_index, target_id, bias=bias, temperature=temperature, softcap=softcap
        )
    else:
        t, size = per_target(temperature, pred_index), check_chunk_targets(chunk_targets)
        where = shard_arguments(shard)
        logp, entropy = _linear_logprob(hidden, weight, bias, pred_index, target_id, t, softcap, size, *where)
    return (logp, entropy) if return_entropy else logp
