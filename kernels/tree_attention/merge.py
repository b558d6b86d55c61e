"""One result a token from those of the varlen calls that cover it: outputs merge by LSE, gradients add up.

Part i holds what call i returned, a row a token that it covers; parts[0] has one for every token, in order, and
row[i - 1, t] is the row of token t in part i, or -1 where that call does not cover it. Over the parts that do,

    lse = log sum_i exp(lse_i)      o = sum_i exp(lse_i - lse) o_i      (merge)
    dx = sum_i dx_i                                                     (add)

with sums in fp32 (fp64 for fp64 parts), part by part in order, and one rounding of the result. On CUDA one kernel each
reads those rows and writes one: merge_kernels.py. Elsewhere, eagerly, the same formulas.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def merge(o: Sequence[Tensor], lse: Sequence[Tensor], row: Tensor, n_rows: Tensor) -> tuple[Tensor, Tensor]:
    """(o [T, Hq, D], lse [Hq, T]), contiguous, of parts o_i [N_i, Hq, D] and lse_i [Hq, N_i] in nats.

    row: int32 [parts - 1, T]; n_rows: int32 [parts], the N_i, where the kernel can read them.
    """
    if len(o) == 1:
        return o[0].contiguous(), lse[0].contiguous()
    if o[0].is_cuda:
        from .merge_kernels import merge_triton  # CPU installations may lack Triton

        return merge_triton(o, lse, row, n_rows)
    lse_parts = torch.stack([_spread(lse_i.T, at, float("-inf")) for lse_i, at in _parts(lse, row)])  # [parts, T, Hq]
    merged = lse_parts.logsumexp(0)
    weights = (lse_parts - merged).exp()
    total = torch.zeros(o[0].shape, dtype=merged.dtype)
    for weight, (o_i, at) in zip(weights, _parts(o, row), strict=True):
        total += weight[..., None] * _spread(o_i, at, 0.0)
    return total.to(o[0].dtype), merged.T.contiguous()


def add(parts: Sequence[Tensor], row: Tensor) -> Tensor:
    """dx [T, H, D], contiguous, of parts dx_i [N_i, H, D]. row: int32 [parts - 1, T]."""
    if len(parts) == 1:
        return parts[0].contiguous()
    if parts[0].is_cuda:
        from .merge_kernels import add_triton  # CPU installations may lack Triton

        return add_triton(parts, row)
    total = torch.zeros(parts[0].shape, dtype=torch.promote_types(parts[0].dtype, torch.float32))
    for part, at in _parts(parts, row):
        total += _spread(part, at, 0.0)
    return total.to(parts[0].dtype)


def _parts(parts: Sequence[Tensor], row: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Each part with the rows of all tokens in it."""
    everything = torch.arange(row.shape[1], dtype=row.dtype)
    return zip(parts, (everything, *row), strict=True)


def _spread(x: Tensor, row: Tensor, other: float) -> Tensor:
    """x[row] of x [N, ...], `other` where row is -1."""
    covered = (row >= 0).view(-1, *[1] * (x.dim() - 1))
    return torch.where(covered, x[row.clamp_min(0)], other)
