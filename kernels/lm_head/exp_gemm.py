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
[2^-40, 2^40], where E or u would leave bf16's range, means a bad anchor: such rows are computed again with k = max z,
by two more GEMMs over them alone, first of max z, then of E. Their number stays on the device, where the GEMMs read it:
no synchronisation, and next to nothing to do where there are none. A row that is nan has no better anchor.

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
BLOCK = 1024  # of sums over parts and rows
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
    acc, i, live, column, part, parts, e_out, e_stride, bias, target, scale, anchor, d_out, sums, n, vocab,
    PLAIN: tl.constexpr,
):  # fmt: skip
    """Epilogue of acc [M, N], raw logits of the rows i [M] that are live, from `column` on: E, d where the target's
    column is here, and column `part` of the partial S' and T' [n, parts]. scale and anchor [M] give log2(e) (z - k).
    PLAIN: the columns are all in the vocabulary, and none is a target's."""
    v = column + tl.arange(0, acc.shape[1])
    inside = live[:, None]
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
    tl.store(sums + i * parts + part, tl.sum(e, 1), mask=live)
    tl.store(sums + (n + i) * parts + part, tl.sum(e * z, 1) * LN2, mask=live)


@triton.jit
def _rows_of_tile(rows, row, count, BLOCK_M: tl.constexpr):
    """(i [BLOCK_M], which of them are live) of the tile from `row` on: row + 0, 1, .. below count, or `rows` there."""
    i = row + tl.arange(0, BLOCK_M)
    live = i < count
    if rows is not None:
        i = tl.load(rows + i, mask=live, other=0)
    return i, live


@triton.jit(do_not_specialize=["first", "n"])
def exp_gemm_kernel(
    x, weight, rows, count, e_out, e_stride, first, bias, target_id, inv_temperature, anchor, d_out, sums,
    n, vocab, H,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """E [n, V] of x [n, H], weight [V, H] (contiguous, or descriptors of them); sums [2, n, parts]: partial S', T'.
    With `rows` and `count`, in memory both: of those rows alone, and x [r] is that of rows[r]."""
    given = n
    if count is not None:
        given = tl.load(count)
    column_tiles = tl.cdiv(vocab, BLOCK_N)
    QUARTER: tl.constexpr = BLOCK_N // 4
    for tile in range(tl.program_id(0), tl.cdiv(given, BLOCK_M) * column_tiles, tl.num_programs(0)):
        row, column = tile_origin(tile, given, vocab, BLOCK_M, BLOCK_N, GROUP_M)
        dtype: tl.constexpr = anchor.dtype.element_ty
        acc = gemm_tile(x, weight, row, column, given, vocab, H, dtype, BLOCK_M, BLOCK_N, BLOCK_K, TMA)
        i, live = _rows_of_tile(rows, row, given, BLOCK_M)
        target, scale, plain = tile_rows(target_id, inv_temperature, first, i, live, column, vocab, BLOCK_N, dtype)
        k = tl.load(anchor + i, mask=live, other=0.0) * LOG2E
        a, b, c, d = quarters(acc)
        for q in tl.static_range(4):
            args = (
                (a, b, c, d)[q], i, live, column + q * QUARTER, column // QUARTER + q, 4 * column_tiles, e_out,
                e_stride, bias, target, scale, k, d_out, sums, n, vocab,
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
def total_kernel(d_in, sums, s_out, parts, BLOCK: tl.constexpr):
    """S of row i: what its partial sums and its target's own column come to."""
    i = tl.program_id(0).to(tl.int64)
    tl.store(s_out + i, _total(sums + i * parts, parts, BLOCK) + tl.exp(tl.load(d_in + i)))


@triton.jit(do_not_specialize=["n"])
def bad_rows_kernel(s_in, rows, count, n, BLOCK: tl.constexpr):
    """The rows whose S is out of range, in their order, and how many they are; a nan is not. For one program."""
    found = 0
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        s = tl.load(s_in + i, mask=i < n, other=1.0)
        bad = (s <= 1.0 / MAX_SUM) | (s >= MAX_SUM)
        tl.store(rows + found + tl.cumsum(bad.to(tl.int32), 0) - 1, i, mask=bad)
        found += tl.sum(bad.to(tl.int32), 0)
    tl.store(count, found)


@triton.jit(do_not_specialize=["first"])
def max_gemm_kernel(
    x, weight, rows, count, first, bias, inv_temperature, maxima, parts, vocab, H,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """maxima [n, parts]: in each of `rows`, max z of a tile's columns. x [r] is that of rows[r], as in exp_gemm."""
    given = tl.load(count)
    column_tiles = tl.cdiv(vocab, BLOCK_N)
    for tile in range(tl.program_id(0), tl.cdiv(given, BLOCK_M) * column_tiles, tl.num_programs(0)):
        row, column = tile_origin(tile, given, vocab, BLOCK_M, BLOCK_N, GROUP_M)
        dtype: tl.constexpr = maxima.dtype.element_ty
        z = gemm_tile(x, weight, row, column, given, vocab, H, dtype, BLOCK_M, BLOCK_N, BLOCK_K, TMA)
        i, live = _rows_of_tile(rows, row, given, BLOCK_M)
        v = column + tl.arange(0, BLOCK_N)
        if bias is not None:
            z += tl.load(bias + v, mask=v < vocab, other=0.0)[None, :]
        m = tl.max(tl.where((v < vocab)[None, :], z, LOWEST), 1)
        if inv_temperature is not None:
            m *= tl.load(inv_temperature + first + i, mask=live, other=1.0)
        tl.store(maxima + i.to(tl.int64) * parts + column // BLOCK_N, m, mask=live)


@triton.jit
def reanchor_kernel(rows, count, anchor, maxima, parts, column_tiles, BLOCK: tl.constexpr):
    """k = max z, from the maxima of its tiles, for row rows[r]."""
    r = tl.program_id(0)
    if r < tl.load(count):
        i = tl.load(rows + r).to(tl.int64)
        m = tl.full((BLOCK,), LOWEST, anchor.dtype.element_ty)
        for start in range(0, column_tiles, BLOCK):
            j = start + tl.arange(0, BLOCK)
            m = tl.maximum(m, tl.load(maxima + i * parts + j, mask=j < column_tiles, other=LOWEST))
        tl.store(anchor + i, tl.max(m, 0))


@triton.jit(do_not_specialize=["first", "n", "targets"])
def exp_loss_kernel(
    e, e_stride, first, target_id, inv_temperature, d_in, sums, n, parts, terms, targets,
    loss_out, logp_out, entropy_out, ratio_out, clipped_out, u_out,
    eps_low, eps_high, dual_clip, beta, entropy_coef, is_cap, ON_POLICY: tl.constexpr, CISPO: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Row i of E belongs to target first + i of `targets`. Writes its outputs, E'_target over E_target, and u [n]."""
    i = tl.program_id(0).to(tl.int64)
    at = first + i
    s, t = _total(sums + i * parts, parts, BLOCK), _total(sums + (n + i) * parts, parts, BLOCK)
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
        u_out=u, BLOCK=BLOCK,
    )  # fmt: skip
    return x, e[:n], u


def _exp_logits(head: Head, e: Tensor, start: int, x: Tensor, old_logp: Tensor | None) -> tuple[Tensor, Tensor]:
    """E of targets start on, x [n, H]; (d [n], partial sums [2, n, parts])."""
    n = len(x)
    anchor, d = torch.empty(2, n, dtype=head.dtype, device=x.device).unbind()
    plan = launch("exp_gemm", x, head.weight)
    sums = torch.empty(2, n, 4 * plan.column_tiles, dtype=head.dtype, device=x.device)
    row = {"first": start, "bias": head.bias, "inv_temperature": head.inv_temperature}
    row |= dict(zip(("vocab", "H"), head.weight.shape, strict=True))
    anchor_kernel[(n,)](
        x=x, weight=head.weight, target_id=head.target_id, old_logp=old_logp, anchor_out=anchor, d_out=d,
        BLOCK_H=BLOCK_H, **row,
    )  # fmt: skip
    exp = row | {
        "e_out": e, "e_stride": e.stride(0), "target_id": head.target_id, "anchor": anchor, "d_out": d, "sums": sums,
        "n": n,
    }  # fmt: skip
    exp_gemm_kernel[(plan.programs,)](rows=None, count=None, **plan.operands, **exp, **plan.options)
    rows, count = _bad_rows(d, sums)
    plan = launch("exp_gemm", x.index_select(0, rows), head.weight)
    given = {"rows": rows, "count": count, **plan.operands, **plan.options}
    maxima = {"maxima": sums, "parts": sums.shape[2]}  # of rows whose sums are of no use
    max_gemm_kernel[(plan.programs,)](**given, **row, **maxima)
    reanchor_kernel[(n,)](rows=rows, count=count, anchor=anchor, **maxima, column_tiles=plan.column_tiles, BLOCK=BLOCK)
    exp_gemm_kernel[(plan.programs,)](**given, **exp)
    return d, sums


def _bad_rows(d: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """(rows [n] int32, count [1] int32): the rows whose S is out of range, then zeros."""
    s, n = torch.empty_like(d), len(d)
    rows, count = torch.zeros(n, dtype=torch.int32, device=d.device), torch.empty(1, dtype=torch.int32, device=d.device)
    total_kernel[(n,)](d_in=d, sums=sums, s_out=s, parts=sums.shape[2], BLOCK=BLOCK)
    bad_rows_kernel[(1,)](s_in=s, rows=rows, count=count, n=n, BLOCK=BLOCK)
    return rows, count
