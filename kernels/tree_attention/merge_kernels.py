# mypy: allow-untyped-defs, allow-untyped-calls
"""The merge of merge.py in Triton; formulas and `row` are there.

A program owns BLOCK tokens of one head, reads their row of every part that has one, and writes theirs. Heads vary
fastest: programs that run at a time share rows of [H, D], which lie side by side in memory. The parts are a tuple, so
a kernel is compiled once for each number of calls: a stream's depth + 1.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 16  # tokens of a program: with 4 warps and D = 128, 32 bytes of every part a thread


@triton.jit(do_not_specialize=["T"])
def merge_kernel(
    o, lse,  # tuples: [N_i, H, D], [H, N_i] fp32
    row,  # [parts - 1, T]
    n_rows,  # [parts]
    T, H,
    o_merged,  # [T, H, D]
    lse_merged,  # [H, T] fp32
    PARTS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    head, token = tl.program_id(0) % H, tl.program_id(0) // H * BLOCK + tl.arange(0, BLOCK)
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    for i in tl.static_range(PARTS):
        largest = tl.maximum(largest, _lse(lse[i], n_rows, row, i, head, token, T))
    acc = tl.zeros((BLOCK, DP), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(PARTS):
        weight = tl.exp(_lse(lse[i], n_rows, row, i, head, token, T) - largest)  # nan where an lse is
        acc += weight[:, None] * _rows(o[i], row, i, head, token, T, H, D, DP)
        total += weight
    _store(o_merged, acc / total[:, None], head, token, T, H, D, DP)
    tl.store(lse_merged + head.to(tl.int64) * T + token, largest + tl.log(total), mask=token < T)


@triton.jit(do_not_specialize=["T"])
def add_kernel(
    parts,  # tuple: [N_i, H, D]
    row,  # [parts - 1, T]
    T, H,
    out,  # [T, H, D]
    PARTS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    head, token = tl.program_id(0) % H, tl.program_id(0) // H * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK, DP), tl.float32)
    for i in tl.static_range(PARTS):
        acc += _rows(parts[i], row, i, head, token, T, H, D, DP)
    _store(out, acc, head, token, T, H, D, DP)


@triton.jit
def _row(row, i: tl.constexpr, token, T):
    """Rows of the tokens in part i, -1 where it has none."""
    if i == 0:
        return tl.where(token < T, token, -1)
    else:
        return tl.load(row + (i - 1) * T + token, mask=token < T, other=-1)


@triton.jit
def _lse(lse, n_rows, row, i: tl.constexpr, head, token, T):
    at = _row(row, i, token, T)
    return tl.load(lse + head.to(tl.int64) * tl.load(n_rows + i) + at, mask=at >= 0, other=float("-inf"))


@triton.jit
def _rows(x, row, i: tl.constexpr, head, token, T, H, D: tl.constexpr, DP: tl.constexpr):
    """[BLOCK, DP] of x [N_i, H, D] in fp32, zeros where a token has no row."""
    at, column = _row(row, i, token, T)[:, None], tl.arange(0, DP)[None, :]
    pointers = x + (at.to(tl.int64) * H + head) * D + column
    return tl.load(pointers, mask=(at >= 0) & (column < D), other=0.0).to(tl.float32)


@triton.jit
def _store(x, value, head, token, T, H, D: tl.constexpr, DP: tl.constexpr):
    at, column = token[:, None], tl.arange(0, DP)[None, :]
    pointers = x + (at.to(tl.int64) * H + head) * D + column
    tl.store(pointers, value.to(x.dtype.element_ty), mask=(at < T) & (column < D))


def merge_triton(o: Sequence[Tensor], lse: Sequence[Tensor], row: Tensor, n_rows: Tensor) -> tuple[Tensor, Tensor]:
    """As `merge`, of parts in fp32 or less and lse_i in fp32."""
    T, Hq, D = o[0].shape
    o_merged, lse_merged = o[0].new_empty(T, Hq, D), lse[0].new_empty(Hq, T)
    with torch.cuda.device_of(row):
        merge_kernel[_grid(T, Hq)](
            o=_contiguous(o),
            lse=_contiguous(lse),
            row=row,
            n_rows=n_rows,
            T=T,
            H=Hq,
            o_merged=o_merged,
            lse_merged=lse_merged,
            **constants(len(o), D),
        )
    return o_merged, lse_merged


def add_triton(parts: Sequence[Tensor], row: Tensor) -> Tensor:
    """As `add`, of parts in fp32 or less."""
    T, H, D = parts[0].shape
    out = parts[0].new_empty(T, H, D)
    with torch.cuda.device_of(row):
        add_kernel[_grid(T, H)](parts=_contiguous(parts), row=row, T=T, H=H, out=out, **constants(len(parts), D))
    return out


def constants(parts: int, head_dim: int) -> dict[str, int]:
    """The compile-time arguments of both kernels."""
    return {"PARTS": parts, "D": head_dim, "DP": triton.next_power_of_2(head_dim), "BLOCK": BLOCK}


def _grid(tokens: int, heads: int) -> tuple[int]:
    return (triton.cdiv(tokens, BLOCK) * heads,)


def _contiguous(parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Flash attention's gradients have the strides of its inputs, whatever these are."""
    return tuple(x.contiguous() for x in parts)
