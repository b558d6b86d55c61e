# mypy: allow-untyped-defs, allow-untyped-calls
"""Log-probs and entropies of targets by one GEMM that stores no logit: 2NHV FLOPs, 12 bytes a target and tile.

With y = softcap * tanh((x W^T + bias) / softcap) and z = log2(e) y / temperature, a tile of columns keeps, of each row
and over its columns v other than the target's,

    m = max z_v,   s = sum 2^(z_v - m),   t = sum 2^(z_v - m) (z_v - m)

and a row's tiles, one after another, come to one maximum M, the target's own z among them:

    S = sum_j 2^(m_j - M) s_j,   T = sum_j 2^(m_j - M) (t_j + (m_j - M) s_j)

logp and H from z[target] - M, S and T, in nats: `logp_entropy_rest`. y[target] is the GEMM's, as all other logits are;
one tile has it. A target id outside the vocabulary gives logp = nan.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gemm_tiles import gemm_tile, halves, launch, quarters, tile_origin, tile_rows
from .head import Head
from .softmax import LN2, LOG2E, LOWEST, logp_entropy_rest, soft_capped


@triton.jit
def _fold(
    r, row, column, m, s, t, y_target, bias, target, scale, n, vocab, softcap, PLAIN: tl.constexpr,
):  # fmt: skip
    """(m, s, t) [M] with the columns of r [M, N], raw logits from (row, column) on, which stores y[target] where it has
    the target's column. PLAIN: the columns are all in the vocabulary, and none is a target's."""
    i, v = row + tl.arange(0, r.shape[0]), column + tl.arange(0, r.shape[1])
    y = r
    if bias is not None:
        y += tl.load(bias + v, mask=v < vocab, other=0.0)[None, :]
    if softcap is not None:
        y, _ = soft_capped(y, softcap)
    if not PLAIN:
        is_target = tl.arange(0, r.shape[1])[None, :] == (target - column).to(tl.int32)[:, None]
        here = (target >= column) & (target < tl.minimum(column + r.shape[1], vocab))
        tl.store(y_target + i, tl.sum(tl.where(is_target, y, 0.0), 1), mask=here)
        y = tl.where((v < vocab)[None, :] & (is_target == 0), y, LOWEST)
    new_m = tl.maximum(m, tl.max(y, 1) * scale)  # above LOWEST, as m is: what is left out has exp2 of it 0
    z = y * scale[:, None] - new_m[:, None]  # an FMA: rounded once, however large both are
    e = tl.exp2(z)
    shrink = tl.exp2(m - new_m)
    t = shrink * (t + (m - new_m) * s) + tl.sum(e * z, 1)
    return new_m, shrink * s + tl.sum(e, 1), t


@triton.jit(do_not_specialize=["n"])
def logp_gemm_kernel(
    x, weight, bias, target_id, inv_temperature, y_target, sums, n, vocab, H, parts, softcap,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """x [n, H], weight [V, H] (contiguous, or descriptors); y_target [n]; sums [3, n, parts]: m, s, t of each tile."""
    tiles = tl.cdiv(n, BLOCK_M) * tl.cdiv(vocab, BLOCK_N)
    dtype: tl.constexpr = y_target.dtype.element_ty
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row, column = tile_origin(tile, n, vocab, BLOCK_M, BLOCK_N, GROUP_M)
        acc = gemm_tile(x, weight, row, column, n, vocab, H, dtype, BLOCK_M, BLOCK_N, BLOCK_K, TMA)
        i = row + tl.arange(0, BLOCK_M)
        target, scale, plain = tile_rows(target_id, inv_temperature, 0, i, i < n, column, vocab, BLOCK_N, dtype)
        a, b, c, d = quarters(acc)
        m = tl.full((BLOCK_M,), 0.1 * LOWEST, dtype)
        s = tl.zeros((BLOCK_M,), dtype)
        t = tl.zeros((BLOCK_M,), dtype)
        for q in tl.static_range(4):
            left, right = halves((a, b, c, d)[q])
            for h in tl.static_range(2):
                at = column + (2 * q + h) * (BLOCK_N // 8)
                if plain:
                    m, s, t = _fold(
                        (left, right)[h], row, at, m, s, t, y_target, bias, target, scale, n, vocab, softcap, True
                    )
                else:
                    m, s, t = _fold(
                        (left, right)[h], row, at, m, s, t, y_target, bias, target, scale, n, vocab, softcap, False
                    )
        at = sums + i.to(tl.int64) * parts + column // BLOCK_N
        plane = n.to(tl.int64) * parts
        tl.store(at, m, mask=i < n)
        tl.store(at + plane, s, mask=i < n)
        tl.store(at + 2 * plane, t, mask=i < n)


@triton.jit(do_not_specialize=["n"])
def logp_of_parts_kernel(
    sums, y_target, inv_temperature, logp_out, entropy_out, n, parts, BLOCK: tl.constexpr
):  # fmt: skip
    """Program i brings the parts of target i together."""
    i = tl.program_id(0).to(tl.int64)
    plane = n.to(tl.int64) * parts
    y = tl.load(y_target + i)
    scale = tl.full((), LOG2E, y.dtype)
    if inv_temperature is not None:
        scale *= tl.load(inv_temperature + i)
    m = tl.where(y == y, y * scale, LOWEST)  # a nan stays in y, not in what it is compared with
    for start in range(0, parts, BLOCK):
        j = start + tl.arange(0, BLOCK)
        m = tl.maximum(m, tl.max(tl.load(sums + i * parts + j, mask=j < parts, other=LOWEST), 0))
    s = tl.zeros((BLOCK,), sums.dtype.element_ty)
    t = tl.zeros((BLOCK,), sums.dtype.element_ty)
    for start in range(0, parts, BLOCK):
        j = start + tl.arange(0, BLOCK)
        at, mask = sums + i * parts + j, j < parts
        d = tl.load(at, mask=mask, other=LOWEST) - m
        s_j, t_j = tl.load(at + plane, mask=mask, other=0.0), tl.load(at + 2 * plane, mask=mask, other=0.0)
        s += tl.exp2(d) * s_j
        t += tl.exp2(d) * (t_j + d * s_j)
    logp, entropy, _ = logp_entropy_rest((y * scale - m) * LN2, tl.sum(s, 0), tl.sum(t, 0) * LN2)
    tl.store(logp_out + i, logp)
    tl.store(entropy_out + i, entropy)


class LogProbs(NamedTuple):
    """Of a chunk of n targets, [n]."""

    logp: Tensor
    entropy: Tensor


def auto_chunk_targets(weight: Tensor) -> int:
    return 2**13  # their partial sums: 58 MB at V = 151,936


def new_buffer(head: Head, rows: int) -> Tensor | None:
    return None


def forward(head: Head, buffer: Tensor | None, start: int, end: int) -> LogProbs:
    x, n, (vocab, width) = head.gather(start, end), end - start, head.weight.shape
    plan = launch("logp_gemm", x, head.weight)
    y_target = torch.full((n,), float("nan"), dtype=head.dtype, device=x.device)
    sums = torch.empty(3, n, plan.column_tiles, dtype=head.dtype, device=x.device)
    inv_temperature = None if head.inv_temperature is None else head.inv_temperature[start:end]
    logp_gemm_kernel[(plan.programs,)](
        **plan.operands, bias=head.bias, target_id=head.target_id[start:end], inv_temperature=inv_temperature,
        y_target=y_target, sums=sums, n=n, vocab=vocab, H=width, parts=plan.column_tiles, softcap=head.softcap,
        **plan.options,
    )  # fmt: skip
    logp, entropy = torch.empty(2, n, dtype=head.dtype, device=x.device).unbind()
    logp_of_parts_kernel[(n,)](
        sums=sums,
        y_target=y_target,
        inv_temperature=inv_temperature,
        logp_out=logp,
        entropy_out=entropy,
        n=n,
        parts=plan.column_tiles,
        BLOCK=1024,
    )
    return LogProbs(logp, entropy)
