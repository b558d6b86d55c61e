"""A linear LM head on chunks of its targets: what every back-end is given, and what becomes of their d(logits).

    x = hidden[pred_index]                                                # [N, H]
    z = softcap * tanh((x W^T + b) / softcap) / temperature               # [N, V], in chunks of targets
    logp = z[target] - lse(z),   H = -sum_v p_v log p_v,   p = softmax(z)

and of d loss / d logp = g and d loss / d H = g_H the gradient, on the raw logits r = x W^T:

    dz_v = g (onehot_v - p_v) - g_H p_v (log p_v + H),   dr_v = dz_v (1 - tanh^2) / temperature

Log-probs and gradient accumulators are fp32 (fp64 for fp64 inputs).

A back-end is a file of plain functions. All have `auto_chunk_targets` and `new_buffer`, the memory of a chunk, and

    chunked.py     torch                               forward, d_logits
    row_kernel.py  Triton, logits in memory            forward, d_logits, token_loss
    exp_gemm.py    Triton, exponentials in memory      token_loss
    logp_gemm.py   Triton, nothing of [n, V] in memory forward
    vocab_parallel.py, around the first two: columns on several ranks

`forward` gives the log-probs and entropies of a chunk, `d_logits` its gradients, `token_loss` all of that in one go.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import GroupName, _resolve_process_group

from ..dispatch import implementation


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """Of log-probs and gradient accumulators: fp32, or fp64 for fp64. The weight's dtype is hidden's."""
    return torch.promote_types(hidden.dtype, torch.float32)


def on_triton(hidden: Tensor) -> bool:
    return implementation(hidden) == "triton"


def logits_back_end(hidden: Tensor, group: str | None = None) -> ModuleType:
    """chunked.py or row_kernel.py, or vocab_parallel.py around either: `forward` and `d_logits`."""
    if group is not None:
        from . import vocab_parallel

        return vocab_parallel
    if on_triton(hidden):
        from . import row_kernel  # here: only where it runs must triton be installed

        return row_kernel
    from . import chunked

    return chunked


class VocabShard(NamedTuple):
    """weight and bias are rows start, start + 1... of those of the whole vocabulary; `group` has the other rows."""

    group: ProcessGroup
    start: int


def shard_arguments(shard: VocabShard | None) -> tuple[str | None, int]:
    """As an operator of torch takes them: (name of the group, first row)."""
    return (None, 0) if shard is None else (shard.group.group_name, shard.start)


class Head(NamedTuple):
    """The head of N targets, contiguous."""

    hidden: Tensor  # [T, H]
    weight: Tensor  # [V, H], of the GEMMs' operands' dtype, as x and d(logits) are
    bias: Tensor | None  # [V] of dtype
    pred_index: Tensor  # [N]
    target_id: Tensor  # [N]
    temperature: Tensor | None  # [N] of dtype
    inv_temperature: Tensor | None
    softcap: float | None
    dtype: torch.dtype  # of log-probs and gradients
    group: str | None = None  # of the ranks that have the other columns; then target_id is -1 where it is another's

    def gather(self, start: int, end: int) -> Tensor:
        return self.hidden.index_select(0, self.pred_index[start:end]).to(self.weight.dtype)  # [n, H]

    def new_vector(self) -> Tensor:
        return torch.empty(self.target_id.shape, dtype=self.dtype, device=self.weight.device)  # [N]


def make_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pred_index: Tensor,
    target_id: Tensor,
    temperature: Tensor | None,
    softcap: float | None,
    group: str | None = None,
    vocab_start: int = 0,
) -> Head:
    """For torch a bf16 head is upcast once, so its products are those of fp32 operands: exact, accumulated in fp32."""
    dtype = compute_dtype(hidden)
    t = None if temperature is None else temperature.to(dtype).contiguous()
    if group is not None:
        column = target_id - vocab_start
        target_id = torch.where((column >= 0) & (column < weight.shape[0]), column, -1)
    return Head(
        hidden=hidden,
        weight=(weight if on_triton(hidden) else weight.to(dtype)).contiguous(),
        bias=None if bias is None else bias.to(dtype).contiguous(),
        pred_index=pred_index.contiguous(),
        target_id=target_id.contiguous(),
        temperature=t,
        inv_temperature=None if t is None else t.reciprocal(),
        softcap=softcap,
        dtype=dtype,
        group=group,
    )


class Gradients:
    """Of (hidden, weight, bias), in the head's dtype, added up chunk by chunk; `needs_grad` says which."""

    def __init__(self, head: Head, needs_grad: Sequence[bool]) -> None:
        self.head = head
        unset = torch.empty if head.target_id.numel() else torch.zeros  # the first chunk writes over what is there
        parameters, new = (head.hidden, head.weight, head.bias), (torch.zeros, unset, torch.zeros)
        self.d_hidden, self.d_weight, self.d_bias = (
            make(p.shape, dtype=head.dtype, device=p.device) if p is not None and needed else None
            for p, needed, make in zip(parameters, needs_grad, new, strict=True)
        )
        self.beta = 0  # 1 once d_weight holds a chunk's gradient

    def add(self, start: int, x: Tensor, dz: Tensor, scale: Tensor | None = None) -> None:
        """What d(logits) = scale [n] dz [n, V] gives, of the targets from `start` on, with hidden rows x [n, H]."""
        if self.d_hidden is not None:
            dx = gemm(torch.empty(x.shape, dtype=self.head.dtype, device=x.device), dz, self.head.weight)
            dx = dx if scale is None else dx.mul_(scale[:, None])
            rows = self.head.pred_index[start : start + len(x)]
            self.d_hidden.index_add_(0, rows, dx)  # a branch point repeats its hidden row
        if self.d_weight is not None:
            # rounded as it is written: a product of its own would be an fp32 tensor
            scaled = x if scale is None else torch.mul(x, scale[:, None], out=torch.empty_like(x))
            gemm(self.d_weight, dz.T, scaled, beta=self.beta)
            self.beta = 1
        if self.d_bias is not None and scale is None:
            self.d_bias.add_(dz.sum(0, dtype=self.head.dtype))
        elif self.d_bias is not None and scale is not None:
            gemm(self.d_bias[:, None], dz.T, scale[:, None].to(dz.dtype), beta=1)

    def tensors(self) -> list[Tensor]:
        """Empty where not asked for. Of a shard's columns, d(hidden) is added up over the ranks."""
        if self.head.group is not None and self.d_hidden is not None:
            reduced(self.d_hidden, self.head.group)
        found = (self.d_hidden, self.d_weight, self.d_bias)
        return [self.head.weight.new_empty(0, dtype=self.head.dtype) if d is None else d for d in found]


def reduced(x: Tensor, group: str, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """x, reduced over the ranks of the group, in place. A collective."""
    dist.all_reduce(x, op, group=_resolve_process_group(GroupName(group)))
    return x


def gemm(out: Tensor, a: Tensor, b: Tensor, beta: float = 0) -> Tensor:
    """out = beta * out + a @ b, accumulated in out's dtype, which may be wider than that of a and b.

    fp32 operands on CUDA are rounded to TF32 if torch.backends.cuda.matmul.allow_tf32 asks for it.
    """
    if a.dtype == out.dtype:
        return torch.addmm(out, a, b, beta=beta, out=out)
    if out.is_cuda:
        return torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, out=out)  # an fp32 `out`: torch >= 2.10
    return torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=beta, out=out)


def chunk_ranges(n: int, chunk_targets: int) -> list[tuple[int, int]]:
    """[start, end) of each chunk of n targets: as few as can be, and of about one size, for a short last one would be
    bound by the traffic of W and dW. Multiples of 128 where chunk_targets is."""
    if n == 0:
        return []
    align = 128 if chunk_targets % 128 == 0 else 1
    size = -(-n // -(-n // chunk_targets) // align) * align
    return [(start, min(start + size, n)) for start in range(0, n, size)]


def fake_gradients(
    parameters: tuple[Tensor, Tensor, Tensor | None], needs_grad: Sequence[bool], dtype: torch.dtype | None
) -> tuple[Tensor, ...]:
    """Gradients for torch's shape propagation, in `dtype`, or in their parameters' own; empty where not asked for."""
    _, weight, _ = parameters
    return tuple(
        (weight if p is None else p).new_empty(0 if p is None or not needed else p.shape, dtype=dtype)
        for p, needed in zip(parameters, needs_grad, strict=True)
    )
