"""Tree attention on any flash attention with variable lengths, exactly.

What a tree lets its tokens see is a union of rectangles, two kinds a segment:

    queries [start, end)           x keys [start, end)   causal
    queries [end, subtree_end)     x keys [start, end)   full

All rectangles of the first kind are one varlen call. So are all of the second kind at one depth, where subtrees are
disjoint: depth + 1 calls whatever the number of segments. What they return is kept as it is, outputs and gradients in
the inputs' dtype and lse in fp32, until all have run; merge.py makes one result a token of it. With s = scale * <q, k>,
flash attention's backward given the *merged* o and lse takes a rectangle's softmax from them, so that what the calls
return is their exact share of the gradients, and adds up:

    p = exp(s - lse)      ds = p * (<do, v> - rowsum(do * o))      dv = p^T do,   dk = scale ds^T q,   dq = scale ds k

Within a call no query and no key occurs twice, and sums over calls have a fixed order. A call whose queries, or keys,
are one range of the stream reads them in place. Ours; merging by lse is common practice (ring attention, arXiv
2310.01889).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..autograd import refuse_create_graph
from .layout import TreeLayout
from .merge import add, merge
from .rectangles import VarlenCall, read_varlen_work

aten = torch.ops.aten


def tree_attention_flash(q: Tensor, k: Tensor, v: Tensor, tree: TreeLayout, *, scale: float | None = None) -> Tensor:
    """Arguments as `tree_attention`; differentiable once. Not run on a GPU.

    CUDA: torch's FlashAttention-2, or what `torch.nn.attention.activate_flash_attention_impl` put in its place. It
    takes bf16 and fp16, head_dim a multiple of 8 up to 256, and raises RuntimeError for others. Its backward adds up
    dq with atomics, unless `torch.use_deterministic_algorithms(True)`.
    CPU: torch's CPU flash kernel, one rectangle at a time, in any float dtype: it is there to test the rectangles.

    A nan in v can reach earlier tokens of its own segment (or merged chain), where flash attention multiplies it by a
    masked 0; it never reaches another branch.

    Under torch.compile(fullgraph=True), `tree.prepare("flash")` must come before the compiled call.
    """
    return attention_op(q, k, v, tree.varlen_work, q.shape[2] ** -0.5 if scale is None else scale)[0]


# ---- operators


@torch.library.custom_op("cipo_kernels::tree_attention_flash", mutates_args=())
def attention_op(q: Tensor, k: Tensor, v: Tensor, work: list[Tensor], scale: float) -> tuple[Tensor, Tensor]:
    """(o [T, Hq, D], lse [Hq, T] in nats, fp32 or fp64). work: `TreeLayout.varlen_work`."""
    calls, query_row, n_query_rows, _ = read_varlen_work(work)
    parts = [_varlen_forward(q[call.query], k[call.key], v[call.key], call, scale) for call in calls]
    o, lse = zip(*parts, strict=True)
    return merge(o, lse, query_row, n_query_rows)


@attention_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, work: list[Tensor], scale: float) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=dtype)


@torch.library.custom_op("cipo_kernels::tree_attention_flash_backward", mutates_args=())
def attention_backward_op(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, work: list[Tensor], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of `attention_op`, contiguous, in the dtypes of q, k and v."""
    calls, query_row, _, key_row = read_varlen_work(work)
    parts = []
    for call in calls:
        do_i, q_i, o_i = (x[call.query] for x in (do, q, o))
        lse_i = lse[:, call.query].contiguous()  # FlashAttention-2 does not look at its strides
        parts.append(_varlen_backward(do_i, q_i, k[call.key], v[call.key], o_i, lse_i, call, scale))
    dq, dk, dv = zip(*parts, strict=True)
    return add(dq, query_row), add(dk, key_row), add(dv, key_row)


@attention_backward_op.register_fake
def _(do: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, work, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, *work)


def _backward(ctx: Any, do: Tensor, _: Tensor) -> tuple[Any, ...]:
    refuse_create_graph("tree_attention")
    q, k, v, o, lse, *work = ctx.saved_tensors
    return *attention_backward_op(do, q, k, v, o, lse, work, ctx.scale), [None] * len(work), None


attention_op.register_autograd(_backward, setup_context=_setup_context)


# ---- flash attention: q, o, do [Nq, Hq, D]; k, v [Nk, Hkv, D], Hq a multiple of Hkv; lse [Hq, Nq], in nats


def _varlen_forward(q: Tensor, k: Tensor, v: Tensor, call: VarlenCall, scale: float) -> tuple[Tensor, Tensor]:
    """o and lse of every rectangle of `call`."""
    if q.is_cuda:
        lengths = call.cu_q, call.cu_k, call.max_q, call.max_k
        o, lse, *_ = aten._flash_attention_forward(q, k, v, *lengths, 0.0, call.causal, False, scale=scale)
        return o, lse
    sequences = zip(_split(q, call.cu_q), _split(k, call.cu_k), _split(v, call.cu_k), strict=True)
    forward = aten._scaled_dot_product_flash_attention_for_cpu
    results = [forward(*x, 0.0, call.causal, scale=scale) for x in sequences]
    return _join([o for o, _ in results]), torch.cat([lse[0] for _, lse in results], 1)


def _varlen_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, call: VarlenCall, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv of every rectangle of `call`, from the merged o and lse."""
    if q.is_cuda:
        lengths = call.cu_q, call.cu_k, call.max_q, call.max_k
        unused = lse.new_empty(0)  # dropout's random state
        return aten._flash_attention_backward(
            do, q, k, v, o, lse, *lengths, 0.0, call.causal, unused, unused, scale=scale
        )
    sequences = zip(
        _split(do, call.cu_q),
        _split(q, call.cu_q),
        _split(k, call.cu_k),
        _split(v, call.cu_k),
        _split(o, call.cu_q),
        lse[None].split(call.cu_q.diff().tolist(), 2),  # [1, Hq, n]
        strict=True,
    )
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
    gradients = [backward(*x, 0.0, call.causal, scale=scale) for x in sequences]
    dq, dk, dv = (_join(x) for x in zip(*gradients, strict=True))
    return dq, dk, dv


def _split(x: Tensor, cu: Tensor) -> list[Tensor]:
    """The sequences of x [N, H, D], each as [1, H, n, D]."""
    return [x_i.transpose(0, 1)[None] for x_i in x.split(cu.diff().tolist())]


def _join(sequences: Sequence[Tensor]) -> Tensor:
    """`_split` undone."""
    return torch.cat([x[0].transpose(0, 1) for x in sequences])
