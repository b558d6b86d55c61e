# mypy: allow-untyped-defs, allow-untyped-calls
"""The token-level loss without a pass over the logits: the GEMM's epilogue stores E = exp(z - k), not z.

With z = (x W^T + bias) / temperature and, per target n, an anchor k near lse(z), known before the GEMM:

    k = x W[target] / temperature - old_logp       (without old_logp where there is none)
    E_v = exp(z_v - k),  d = z[target] - k         # the epilogue: E stored, d and the sums in fp32
    S' = sum of E_v over v other than target,  T' = that of E_v (z_v - k)
    logp, H, 1 - p from d, S', T': `logp_entropy_rest`
    dr = g (onehot - p) / temperature = u E',   u = -g / (S temperature),  S = S' + exp(d)
    E'_v = E_v,   E'_target = -S'
    d hidden = u (E' W),   dW = E'^T (u x)

z[target] is the GEMM's own, as all other logits are, and no sum has the target in it: where p is near 1 neither logp
nor 1 - p is a difference of two large numbers. The dot product serves as anchor alone. A target id outside the
vocabulary has d = nan: logp is nan, and nothing is written for it.

After the GEMM only one element a row changes, and u is applied to the narrow side of the two others. E is
bf16 for bf16 inputs, 2 bytes a logit instead of 4; logp, H and S come from the fp32 epilogue. S outside
[2^-40, 2^40], where E or u would leave bf16's range, means a bad anchor: `reanchor_kernel` computes that row again
with k = max z. That is slow (two passes over W by one program), exact, and without the host synchronisation that
V0's cuBLAS GEMM over those rows would need for their number.

dr is not a multiple of E under a softcap or an entropy bonus: those, as sequence-level ratios, run on the logits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import row_kernel
from .gemm_tiles import gemm_tile, launch, quarters, tile_origin, tile_rows
from .head import Head
from .softmax import LN2, LOG2E, LOWEST, load_or, logp_entropy_rest
from .terms import Options, TargetOutputs, Terms
from .token_terms import loss_arguments, target_loss_of_token

BLOCK_H = 1024  # of the target's dot product
REPAIR_V, REPAIR_H = 64, 64
MAX_SUM = tl.constexpr(2.0**40)


@triton.jit(do_not_specialize=["first"])
def anchor_kernel(
    x, weight, first, bias, target_id, inv_temperature, old_logp, anchor_out, d_out,
    vocab, H, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Row i of x [n, H] belongs to target first + i; x and weight [V, H] are contiguous, outputs [n]. d is nan until
    the tile that has the target's column writes it."""
    i = tl.program_id(0).to(tl.int64)
    target = tl.load(target_id + first + i)
    target = tl.where((target >= 0) & (target < vocab), target, 0)
    total = tl.zeros((BLOCK_H,), anchor_out.dtype.element_ty)
    for start in range(0, H, BLOCK_H):
        h = start + tl.arange(0, BLOCK_H)
        a = tl.load(x + i * H + h, mask=h < H, other=0.0).to(total.dtype)
        total += a * tl.load(weight + target * H + h, mask=h < H, other=0.0).to(total.dtype)
    z = (tl.sum(total, 0) + load_or(bias, target, 0.0)) * load_or(inv_temperature, first + i, 1.0)
    old = load_or(old_logp, first + i, 0.0)
    tl.store(anchor_out + i, z - tl.where((old <= 0) & (old > -60), old, 0.0))  # masked targets may hold anything
    tl.store(d_out + i, float("nan"))


@triton.jit
def _store_exp(
    acc, row, column, part, parts, e_out, e_stride, bias, target, scale, anchor, d_out, sums, n, vocab,
    PLAIN: tl.constexpr,
):  # fmt: skip
    """Epilogue of acc [M, N], raw logits from (row, column): E, d where the target's column is here, and column `part`
    of the partial S' and T' [n, parts]. scale and anchor [M] give log2(e) (z - k). PLAIN: the columns are all in the
    vocabulary, and none is a target's."""
    i, v = row + tl.arange(0, acc.shape[0]), column + tl.arange(0, acc.shape[1])
    inside = (i < n)[:, None]
    z = acc
    if bias is not None:
        z += tl.load(bias + v, mask=v < vocab, other=0.0)[None, :]
    z = z * scale[:, None] - anchor[:, None]  # an FMA, rounded once; an anchor's own rounding cancels in E / S
    e = tl.exp2(z)
    if not PLAIN:
        is_target = tl.arange(0, acc.shape[1])[None, :] == (target - column).to(tl.int32)[:, None]
        here = (target >= column) & (target < tl.minimum(column + acc.shape[1], vocab))
        tl.store(d_out + i, tl.sum(tl.where(is_target, z, 0.0), 1) * LN2, mask=here)
        e = tl.where((v < vocab)[None, :] & (is_target == 0), e, 0.0)
        inside &= (v < vocab)[None, :]
    i = i.to(tl.int64)
    tl.store(e_out + i[:, None] * e_stride + v[None, :], e.to(e_out.dtype.element_ty), mask=inside)
    tl.store(sums + i * parts + part, tl.sum(e, 1), mask=i < n)
    tl.store(sums + (n + i) * parts + part, tl.sum(e * z, 1) * LN2, mask=i < n)


@triton.jit(do_not_specialize=["first", "n"])
def exp_gemm_kernel(
    x, weight, e_out, e_stride, first, bias, target_id, inv_temperature, anchor, d_out, sums,
    n, vocab, H,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """E [n, V] of x [n, H], weight [V, H] (contiguous, or descriptors of them); sums [2, n, parts]: partial S', T'."""
    column_tiles = tl.cdiv(vocab, BLOCK_N)
    QUARTER: tl.constexpr = BLOCK_N // 4
    for tile in range(tl.program_id(0), tl.cdiv(n, BLOCK_M) * column_tiles, tl.num_programs(0)):
        row, column = tile_origin(tile, n, vocab, BLOCK_M, BLOCK_N, GROUP_M)
        dtype: tl.constexpr = anchor.dtype.element_ty
        acc = gemm_tile(x, weight, row, column, n, vocab, H, dtype, BLOCK_M, BLOCK_N, BLOCK_K, TMA)
        target, scale, plain = tile_rows(
            target_id, inv_temperature, first, row, column, n, vocab, BLOCK_M, BLOCK_N, dtype
        )
        i = row + tl.arange(0, BLOCK_M)
        k = tl.load(anchor + i, mask=i < n, other=0.0) * LOG2E
        a, b, c, d = quarters(acc)
        for q in tl.static_range(4):
            args = (
                (a, b, c, d)[q], row, column + q * QUARTER, column // QUARTER + q, 4 * column_tiles, e_out, e_stride,
                bias, target, scale, k, d_out, sums, n, vocab,
            )  # fmt: skip
            if plain:
                _store_exp(*args, True)
            else:
                _store_exp(*args, False)


@triton.jit
def _total(sums, parts, BLOCK: tl.constexpr):
    """Sum of the `parts` values from `sums` on."""
    total = tl.zeros((BLOCK,), sums.dtype.element_ty)
    for start in range(0, parts, BLOCK):
        j = start + tl.arange(0, BLOCK)
        total += tl.load(sums + j, mask=j < parts, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def _logits_tile(x_row, weight, start, bias, inv_t, vocab, H, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, dtype):
    """z [BLOCK_V] from column `start` on, of one row of x; LOWEST past the vocabulary."""
    v = start + tl.arange(0, BLOCK_V)
    z = tl.zeros((BLOCK_V,), dtype)
    for k in range(0, H, BLOCK_H):
        h = k + tl.arange(0, BLOCK_H)
        inside = (v < vocab)[:, None] & (h < H)[None, :]
        w = tl.load(weight + v.to(tl.int64)[:, None] * H + h[None, :], mask=inside, other=0.0)
        z += tl.sum(w.to(dtype) * tl.load(x_row + h, mask=h < H, other=0.0).to(dtype)[None, :], 1)
    if bias is not None:
        z += tl.load(bias + v, mask=v < vocab, other=0.0)
    return tl.where(v < vocab, z * inv_t, LOWEST)


@triton.jit(do_not_specialize=["first", "n"])
def reanchor_kernel(
    x, weight, e_out, e_stride, first, bias, target_id, inv_temperature, anchor, d_out, sums, n, vocab, H, parts,
    BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Rows whose S is out of range: E, d, S' and T' again, with the anchor max z. Others, nan among them: nothing."""
    i = tl.program_id(0).to(tl.int64)
    s = _total(sums + i * parts, parts, 1024) + tl.exp(tl.load(d_out + i))
    if (s <= 1.0 / MAX_SUM) | (s >= MAX_SUM):
        target = tl.load(target_id + first + i)
        dtype: tl.constexpr = anchor.dtype.element_ty
        inv_t = load_or(inv_temperature, first + i, 1.0)
        m = tl.full((), LOWEST, dtype)
        for start in range(0, vocab, BLOCK_V):
            m = tl.maximum(
                m, tl.max(_logits_tile(x + i * H, weight, start, bias, inv_t, vocab, H, BLOCK_V, BLOCK_H, dtype), 0)
            )  # fmt: skip
        s = tl.zeros((), dtype)
        t = tl.zeros((), dtype)
        for start in range(0, vocab, BLOCK_V):
            z = _logits_tile(x + i * H, weight, start, bias, inv_t, vocab, H, BLOCK_V, BLOCK_H, dtype) - m
            v = start + tl.arange(0, BLOCK_V)
            e = tl.where(v == target, 0.0, tl.exp(z))
            tl.store(d_out + i + tl.zeros_like(v), z, mask=v == target)
            tl.store(e_out + i * e_stride + v, e.to(e_out.dtype.element_ty), mask=v < vocab)
            s += tl.sum(e, 0)
            t += tl.sum(e * z, 0)
        tl.store(anchor + i, m)
        for start in range(0, parts, 1024):
            j = start + tl.arange(0, 1024)
            tl.store(sums + i * parts + j, tl.where(j == 0, s, 0.0), mask=j < parts)
            tl.store(sums + (n + i) * parts + j, tl.where(j == 0, t, 0.0), mask=j < parts)


@triton.jit(do_not_specialize=["first", "n", "targets"])
def exp_loss_kernel(
    e, e_stride, first, target_id, inv_temperature, d_in, sums, n, parts, terms, targets,
    loss_out, logp_out, entropy_out, ratio_out, clipped_out, u_out,
    eps_low, eps_high, dual_clip, beta, entropy_coef, is_cap, ON_POLICY: tl.constexpr, CISPO: tl.constexpr,
):  # fmt: skip
    """Row i of E belongs to target first + i of `targets`. Writes its outputs, E'_target over E_target, and u [n]."""
    i = tl.program_id(0).to(tl.int64)
    at = first + i
    s, t = _total(sums + i * parts, parts, 1024), _total(sums + (n + i) * parts, parts, 1024)
    d = tl.load(d_in + i)
    logp, entropy, _ = logp_entropy_rest(d, s, t)
    loss, q, clipped, g, _ = target_loss_of_token(
        at, logp, entropy, terms, targets, eps_low, eps_high, dual_clip, beta, entropy_coef, is_cap, ON_POLICY, CISPO
    )
    tl.store(loss_out + at, loss)
    tl.store(logp_out + at, logp)
    tl.store(entropy_out + at, entropy)
    tl.store(ratio_out + at, q)
    tl.store(clipped_out + at, clipped)
    tl.store(u_out + i, -g / (s + tl.exp(d)) * load_or(inv_temperature, at, 1.0))
    tl.store(e + i * e_stride + tl.load(target_id + at), (-s).to(e.dtype.element_ty), mask=d == d)


def auto_chunk_targets(weight: Tensor) -> int:
    if not weight.is_cuda:
        return row_kernel.auto_chunk_targets(weight)
    return row_kernel.gpu_chunk_targets(weight.shape[0], weight.element_size())


def new_buffer(head: Head, rows: int) -> Tensor:
    """E [chunk, V], in the operands' dtype."""
    vocab = head.weight.shape[0]
    columns = triton.cdiv(vocab, 64) * 64  # aligned rows, whatever V
    return torch.empty(rows, columns, dtype=head.weight.dtype, device=head.weight.device)[:, :vocab]


def token_loss(
    head: Head, e: Tensor, start: int, end: int, terms: Tensor, options: Options, out: TargetOutputs
) -> tuple[Tensor, Tensor, Tensor]:
    """(x [n, H], E' [n, V], u [n]) of targets start:end: dr is u E'. Their outputs are written."""
    x, n = head.gather(start, end), end - start
    d, sums = _exp_logits(head, e, start, x, None if options.on_policy else Terms(*terms).old_logp)
    u = torch.empty_like(d)
    exp_loss_kernel[(n,)](
        e=e, e_stride=e.stride(0), first=start, target_id=head.target_id, inv_temperature=head.inv_temperature,
        d_in=d, sums=sums, n=n, parts=sums.shape[2], terms=terms, targets=terms.shape[1], **loss_arguments(options),
        loss_out=out.loss, logp_out=out.logp, entropy_out=out.entropy, ratio_out=out.ratio, clipped_out=out.clipped,
        u_out=u,
    )  # fmt: skip
    return x, e[:n], u


def _exp_logits(head: Head, e: Tensor, start: int, x: Tensor, old_logp: Tensor | None) -> tuple[Tensor, Tensor]:
    """E of targets start on, x [n, H]; (d [n], partial sums [2, n, parts])."""
    n, (vocab, width) = len(x), head.weight.shape
    anchor, d = torch.empty(2, n, dtype=head.dtype, device=x.device).unbind()
    plan = launch(x, head.weight)
    sums = torch.empty(2, n, 4 * plan.column_tiles, dtype=head.dtype, device=x.device)
    row = {
        "first": start, "bias": head.bias, "target_id": head.target_id, "inv_temperature": head.inv_temperature,
        "vocab": vocab, "H": width,
    }  # fmt: skip
    found = {"e_out": e, "e_stride": e.stride(0), "anchor": anchor, "d_out": d, "sums": sums, "n": n}
    anchor_kernel[(n,)](x=x, weight=head.weight, old_logp=old_logp, anchor_out=anchor, d_out=d, BLOCK_H=BLOCK_H, **row)
    exp_gemm_kernel[(plan.programs,)](**plan.operands, **row, **found, **plan.options)
    reanchor_kernel[(n,)](
        x=x, weight=head.weight, parts=sums.shape[2], BLOCK_V=REPAIR_V, BLOCK_H=REPAIR_H, **row, **found
    )
    return d, sums
