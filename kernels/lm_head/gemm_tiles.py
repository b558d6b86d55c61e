# mypy: allow-untyped-defs, allow-untyped-calls
"""Logits r = x W^T, tile by tile, for the kernels that take them in the GEMM's epilogue: exp_gemm.py, logp_gemm.py.

A persistent program takes tiles p, p + programs, ...; they run down GROUP_M row tiles, then on to the next column, so
that the programs at work share W in L2, and their rows of x stay there. Epilogues take a quarter of a tile's columns at
a time: all of them would spill.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..launch_configs import launch_config
from .softmax import LOG2E


class Tiles(NamedTuple):
    """m x n of the logits, k along H; `group` row tiles share a column of W in L2."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    group: int = 16


TMA_TILES, POINTER_TILES = Tiles(128, 256, 64, 8, 4), Tiles(128, 128, 64, 8, 4)


def use_tma(weight: Tensor) -> bool:
    """Descriptors need rows on 16 bytes. sm_90 and sm_100 have TMA and the memory for TMA_TILES; sm_120 only TMA."""
    if not weight.is_cuda or torch.cuda.get_device_capability(weight.device)[0] not in (9, 10):
        return False
    return weight.data_ptr() % 16 == 0 and weight.stride(0) * weight.element_size() % 16 == 0


def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


class Launch(NamedTuple):
    """Of a kernel over the tiles of x [n, H] and weight [V, H], both contiguous."""

    programs: int
    column_tiles: int
    operands: dict  # x and weight, or descriptors of them
    options: dict  # blocks, warps, stages


def launch(kernel: str, x: Tensor, weight: Tensor) -> Launch:
    """kernel: its name in launch_configs.json."""
    if not x.is_cuda and x.dtype == torch.bfloat16:
        x, weight = x.float(), weight.float()  # the interpreter multiplies the bits of bf16; fp32's products are bf16's
    tma = use_tma(weight)
    tiles = launch_config(kernel, TMA_TILES if tma else POINTER_TILES, x.device)
    row_tiles, column_tiles = triton.cdiv(len(x), tiles.m), triton.cdiv(len(weight), tiles.n)
    most = multiprocessors(x.device) if x.is_cuda else 2
    operands = {
        "x": TensorDescriptor.from_tensor(x, [tiles.m, tiles.k]) if tma else x,
        "weight": TensorDescriptor.from_tensor(weight, [tiles.n, tiles.k]) if tma else weight,
    }
    blocks = {"BLOCK_M": tiles.m, "BLOCK_N": tiles.n, "BLOCK_K": tiles.k, "GROUP_M": tiles.group, "TMA": tma}
    options = blocks | {"num_warps": tiles.warps, "num_stages": tiles.stages}
    return Launch(min(most, row_tiles * column_tiles), column_tiles, operands, options)


@triton.jit
def tile_origin(tile, n, vocab, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """(first row, first column) of a tile."""
    row_tiles, column_tiles = tl.cdiv(n, BLOCK_M), tl.cdiv(vocab, BLOCK_N)
    group, within = tile // (GROUP_M * column_tiles), tile % (GROUP_M * column_tiles)
    group_rows = tl.minimum(row_tiles - group * GROUP_M, GROUP_M)
    return (group * GROUP_M + within % group_rows) * BLOCK_M, within // group_rows * BLOCK_N


@triton.jit
def gemm_tile(
    x, weight, row, column, n, vocab, H, dtype: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """r [BLOCK_M, BLOCK_N] from (row, column) on, accumulated in dtype; 0 outside."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype)
    for k in range(0, H, BLOCK_K):
        a = _load_tile(x, row, k, n, H, BLOCK_M, BLOCK_K, TMA)
        b = _load_tile(weight, column, k, vocab, H, BLOCK_N, BLOCK_K, TMA)
        acc = tl.dot(a, b.T, acc, input_precision="ieee", out_dtype=acc.dtype)
    return acc


@triton.jit
def _load_tile(x, row, k, rows, H, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr):
    """[ROWS, BLOCK_K] of x [rows, H] from (row, k), zeros outside."""
    if TMA:
        return x.load([row, k])
    else:
        r, h = row + tl.arange(0, ROWS), k + tl.arange(0, BLOCK_K)
        inside = (r < rows)[:, None] & (h < H)[None, :]
        return tl.load(x + r.to(tl.int64)[:, None] * H + h[None, :], mask=inside, other=0.0)


@triton.jit
def tile_rows(
    target_id, inv_temperature, first, i, live, column, vocab, BLOCK_N: tl.constexpr, dtype: tl.constexpr
):  # fmt: skip
    """(target [M], log2(e) / temperature [M], plain) of a tile's rows i [M] that are live; row 0 is target first.

    plain: its columns are all in the vocabulary, and none is a target's. Of tiles of 128 targets and 256 columns of
    151,936 four in five are, and their epilogue compares nothing. Logits are taken to base 2, where exp2 is one
    instruction (ex2.approx.ftz); tl.exp is five, for results below 1.2e-38, which here are 0.
    """
    target = tl.load(target_id + first + i, mask=live, other=-1)
    scale = tl.full(i.shape, LOG2E, dtype)
    if inv_temperature is not None:
        scale *= tl.load(inv_temperature + first + i, mask=live, other=1.0)
    here = (target >= column) & (target < column + BLOCK_N)
    return target, scale, (tl.max(here.to(tl.int32), 0) == 0) & (column + BLOCK_N <= vocab)


@triton.jit
def quarters(acc):
    """[M, N] as four of [M, N / 4], from left to right."""
    left, right = halves(acc)
    a, b = halves(left)
    c, d = halves(right)
    return a, b, c, d


@triton.jit
def halves(x):
    """[M, N] as two of [M, N / 2]."""
    return x.reshape(x.shape[0], 2, x.shape[1] // 2).permute(0, 2, 1).split()
