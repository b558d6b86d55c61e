# mypy: allow-untyped-defs, allow-untyped-calls
"""What the Triton tree attention kernels share: finding their work, reading and writing tiles, who sees whom.

q, k, v, do and backward's o are tensor descriptors of [H, T, D] in blocks [HEADS, OWN, DP] or [1, STEP, DP], or, where
there is no TMA, (pointer, token stride, head stride); other tensors are pointers to contiguous memory. With
descriptors, addresses stay out of the registers: dK/dV spills without.

Loops carry the first token of the next step's tile, as the lists hold it: loads that had to wait for it within a step
would take a stage of the pipeline each, and on sm_100 dK/dV is not pipelined at all if anything is added to it.

    D             head dim; DP a power of two >= D
    GROUP         query heads a key head, Hq / Hkv
    HEADS         query heads a program, of one key head: they share its keys, so that HEADS tiles of few queries are
                  as good a multiplication as one of many, and less of it lies past the diagonal and a segment's end
    OWN_TILE      tokens of an item's own tile at most; TILE of a full tile, and of a masked one at most
    OWN, STEP     tokens of a program's own tile and of one streamed step; OWN divides OWN_TILE, STEP divides TILE
    scale2        scale * log2(e): exponentials are base 2

A tile of HEADS heads has HEADS * OWN rows, head by head.
"""

import triton
import triton.language as tl

from .worklist import Item

LOG2_E = tl.constexpr(1.4426950408889634)
COLUMNS = tl.constexpr(len(Item))
FIRST, STOP, FULL_FIRST, FULL_STOP, MASKED_FIRST, MASKED_STOP, SLOT = (tl.constexpr(int(column)) for column in Item)


@triton.jit
def work_item(items, n_heads, OWN_TILE: tl.constexpr, TILE: tl.constexpr, OWN: tl.constexpr, STEP: tl.constexpr):
    """Which of n_heads this program has; the first token of its item's tile, and past the last one; the same of the
    part that it owns; the ranges of steps through full and through masked tiles; the item's slot."""
    pid = tl.program_id(0)
    PARTS: tl.constexpr = OWN_TILE // OWN
    STEPS: tl.constexpr = TILE // STEP
    head, part, item = pid % n_heads, pid // n_heads % PARTS, items + pid // (n_heads * PARTS) * COLUMNS
    tile_first, tile_stop = tl.load(item + FIRST), tl.load(item + STOP)
    first = tile_first + part * OWN
    stop = tl.minimum(tile_stop, first + OWN)
    full_first, full_stop = tl.load(item + FULL_FIRST) * STEPS, tl.load(item + FULL_STOP) * STEPS
    masked_first, masked_stop = tl.load(item + MASKED_FIRST) * STEPS, tl.load(item + MASKED_STOP) * STEPS
    slot = tl.load(item + SLOT)
    return head, tile_first, tile_stop, first, stop, full_first, full_stop, masked_first, masked_stop, slot


@triton.jit
def unseen_steps(tile_first, tile_stop, q_stop, TILE: tl.constexpr, STEP: tl.constexpr):
    """Of the last steps, which go through a tile of queries itself: those past q_stop."""
    return tl.cdiv(tile_stop - tile_first, TILE) * (TILE // STEP) - tl.cdiv(q_stop - tile_first, STEP)


@triton.jit
def full_tile(full, i, TILE: tl.constexpr, STEP: tl.constexpr):
    """First token of the tile of the i-th step through full tiles."""
    return tl.load(full + i // (TILE // STEP))


@triton.jit
def masked_tile(masked, i, TILE: tl.constexpr, STEP: tl.constexpr):
    """First token of the tile of the i-th step through masked tiles, and past its last one."""
    tile = masked + i // (TILE // STEP) * 2
    return tl.load(tile), tl.load(tile + 1)


@triton.jit
def into_tile(i, TILE: tl.constexpr, STEP: tl.constexpr):
    """Tokens of the i-th step's tile before the step."""
    return i % (TILE // STEP) * STEP


@triton.jit
def load_rows(x, head, first, T, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, TMA: tl.constexpr):
    """[N, DP] tokens of a head from `first` on, zeros past T; unwanted tokens are the caller's to mask."""
    if TMA:
        return x.load([head, first, 0]).reshape(N, DP)
    else:  # without it, the lines below would be compiled too
        pointer, stride_t, stride_h = x
        row, column = tl.arange(0, N)[:, None], tl.arange(0, DP)[None, :]
        pointer += first.to(tl.int64) * stride_t + head.to(tl.int64) * stride_h
        return tl.load(pointer + row * stride_t + column, mask=(first + row < T) & (column < D), other=0.0)


@triton.jit
def load_heads(
    x, head, first, T, HEADS: tl.constexpr, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, TMA: tl.constexpr
):
    """[HEADS * N, DP]: `load_rows` of the heads from `head` on."""
    if TMA:
        return x.load([head, first, 0]).reshape(HEADS * N, DP)
    else:
        pointer, stride_t, stride_h = x
        row, column = tl.arange(0, HEADS * N)[:, None], tl.arange(0, DP)[None, :]
        pointer += first.to(tl.int64) * stride_t + head.to(tl.int64) * stride_h
        pointers = pointer + row % N * stride_t + row // N * stride_h + column
        return tl.load(pointers, mask=(first + row % N < T) & (column < D), other=0.0)


@triton.jit
def store_rows(x, value, head, token, stop, H, D: tl.constexpr, DP: tl.constexpr):
    """Writes rows, one a token before `stop`, to the contiguous x [T, H, D]. head: one, or [rows, 1]."""
    row, column = token[:, None], tl.arange(0, DP)[None, :]
    pointers = x + (row.to(tl.int64) * H + head) * D + column
    tl.store(pointers, value.to(x.dtype.element_ty), mask=(row < stop) & (column < D))


@triton.jit
def dot(a, b, acc=None):
    return tl.dot(a, b, acc, input_precision="ieee")  # of fp32 operands; others have no choice


@triton.jit
def visible(query, key, key_end):
    return (key <= query) & (query < key_end)
