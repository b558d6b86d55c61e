# mypy: allow-untyped-defs, allow-untyped-calls
"""What the Triton tree attention kernels share: finding their work, reading and writing tiles, who sees whom.

q, k, v, do and backward's o are tensor descriptors of [H, T, D] in blocks [1, OWN or STEP, DP], or, where there is no
TMA, (pointer, token stride, head stride); other tensors are pointers to contiguous memory. With descriptors, addresses
stay out of the registers: dK/dV spills without.

Loops carry the first token of the next step's tile, as the lists hold it: loads that had to wait for it within a step
would take a stage of the pipeline each, and on sm_100 dK/dV is not pipelined at all if anything is added to it.

    D             head dim; DP a power of two >= D
    GROUP         query heads a key head, Hq / Hkv
    TILE          tokens of a full tile, and of an item's own tile at most; MASKED_TILE of a masked one
    OWN, STEP     tokens of a program's own tile and of one streamed step; OWN divides TILE, STEP divides MASKED_TILE
    scale2        scale * log2(e): exponentials are base 2
"""

import triton
import triton.language as tl

from .worklist import Item

LOG2_E = tl.constexpr(1.4426950408889634)
COLUMNS = tl.constexpr(len(Item))
FIRST, STOP, FULL_FIRST, FULL_STOP, MASKED_FIRST, MASKED_STOP, SLOT = (tl.constexpr(int(column)) for column in Item)


@triton.jit
def work_item(items, heads, TILE: tl.constexpr, MASKED_TILE: tl.constexpr, OWN: tl.constexpr, STEP: tl.constexpr):
    """This program's head, the part of its item's tile that it owns, that part's first token and past its last one;
    the ranges of steps through full and through masked tiles; the item's slot."""
    pid = tl.program_id(0)
    PARTS: tl.constexpr = TILE // OWN
    STEPS: tl.constexpr = TILE // STEP
    MASKED_STEPS: tl.constexpr = MASKED_TILE // STEP
    head, part, item = pid % heads, pid // heads % PARTS, items + pid // (heads * PARTS) * COLUMNS
    first = tl.load(item + FIRST) + part * OWN
    stop = tl.minimum(tl.load(item + STOP), first + OWN)
    full_first, full_stop = tl.load(item + FULL_FIRST) * STEPS, tl.load(item + FULL_STOP) * STEPS
    masked_first, masked_stop = tl.load(item + MASKED_FIRST) * MASKED_STEPS, tl.load(item + MASKED_STOP) * MASKED_STEPS
    return head, part, first, stop, full_first, full_stop, masked_first, masked_stop, tl.load(item + SLOT)


@triton.jit
def full_tile(full, i, TILE: tl.constexpr, STEP: tl.constexpr):
    """First token of the tile of the i-th step through full tiles."""
    return tl.load(full + i // (TILE // STEP))


@triton.jit
def masked_tile(masked, i, MASKED_TILE: tl.constexpr, STEP: tl.constexpr):
    """First token of the tile of the i-th step through masked tiles, and past its last one."""
    tile = masked + i // (MASKED_TILE // STEP) * 2
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
def store_rows(x, value, head, first, stop, H, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """Writes rows [first, stop) of a head of the contiguous x [T, H, D]."""
    row = first + tl.arange(0, N)[:, None]
    column = tl.arange(0, DP)[None, :]
    pointers = x + (row.to(tl.int64) * H + head) * D + column
    tl.store(pointers, value.to(x.dtype.element_ty), mask=(row < stop) & (column < D))


@triton.jit
def dot(a, b, acc=None):
    return tl.dot(a, b, acc, input_precision="ieee")  # of fp32 operands; others have no choice


@triton.jit
def visible(query, key, key_end):
    return (key <= query) & (query < key_end)
