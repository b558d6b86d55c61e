# mypy: allow-untyped-defs, allow-untyped-calls
"""What the Triton tree attention kernels share: finding their work, reading and writing tiles, who sees whom.

What is streamed, and dK/dV's own k and v, are tensor descriptors of [H, T, D] in blocks [1, STEP, DP] or [1, OWN, DP],
or, where there is no TMA, (pointer, token stride, head stride), which forward's and dQ's own q, o and do always are;
other tensors are pointers to contiguous memory. With descriptors, addresses stay out of the registers: dK/dV spills
without.

Queries are owned in rows. A tile's tokens have GROUP rows each, their queries of the heads that share a key head, token
by token, and a program owns OWN consecutive rows of them: whatever GROUP is, its rows have the same keys, so that few
queries of many heads are as good a multiplication as many of one, and less of it lies past the diagonal and a segment's
end. A tile of keys has one row a token.

Loops carry the first token of the next step's tile, as the lists hold it: loads that had to wait for it within a step
would take a stage of the pipeline each, and on sm_100 dK/dV is not pipelined at all if anything is added to it.

    D             head dim; DP a power of two >= D
    GROUP         query heads a key head, Hq / Hkv
    OWN_TILE      tokens of an item's own tile at most; TILE of a full tile, and of a masked one at most
    OWN, STEP     rows of a program and tokens of one streamed step; OWN divides OWN_TILE, STEP divides TILE
    scale2        scale * log2(e): exponentials are base 2
"""

import triton
import triton.language as tl

from .worklist import Item

LOG2_E = tl.constexpr(1.4426950408889634)
COLUMNS = tl.constexpr(len(Item))
FIRST, STOP, FULL_FIRST, FULL_STOP, MASKED_FIRST, MASKED_STOP, SLOT = (tl.constexpr(int(column)) for column in Item)


@triton.jit
def work_item(
    items, n_heads, ROWS: tl.constexpr,
    OWN_TILE: tl.constexpr, TILE: tl.constexpr, OWN: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Which of n_heads key heads this program has; the first token of its item's tile, and past the last one; which
    of the tile's rows, ROWS a token, is its first, and past the last token that it has a row of; the ranges of steps
    through full and through masked tiles; the item's slot."""
    pid = tl.program_id(0)
    PARTS: tl.constexpr = OWN_TILE * ROWS // OWN
    STEPS: tl.constexpr = TILE // STEP
    head, part, item = pid % n_heads, pid // n_heads % PARTS, items + pid // (n_heads * PARTS) * COLUMNS
    tile_first, tile_stop = tl.load(item + FIRST), tl.load(item + STOP)
    row = part * OWN
    stop = tl.minimum(tile_stop, tile_first + tl.cdiv(row + OWN, ROWS))
    full_first, full_stop = tl.load(item + FULL_FIRST) * STEPS, tl.load(item + FULL_STOP) * STEPS
    masked_first, masked_stop = tl.load(item + MASKED_FIRST) * STEPS, tl.load(item + MASKED_STOP) * STEPS
    slot = tl.load(item + SLOT)
    return head, tile_first, tile_stop, row, stop, full_first, full_stop, masked_first, masked_stop, slot


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
def step_first(tile_first, i, TILE: tl.constexpr, STEP: tl.constexpr):
    """First token of the i-th step, whose tile starts at tile_first."""
    # The maximum changes nothing: Triton 3.9.0 fails on sm_100 where a load is at the very integer that a loop carries.
    return tl.maximum(tile_first + i % (TILE // STEP) * STEP, 0)


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
def load_queries(x, kv_head, first, stop, row, GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """[rows, DP]: these rows of the tile of queries that starts at the token `first`; zeros from `stop` on."""
    pointer, stride_t, stride_h = x
    pointer += first.to(tl.int64) * stride_t + kv_head.to(tl.int64) * GROUP * stride_h
    token, head, column = row // GROUP, row % GROUP, tl.arange(0, DP)[None, :]
    pointers = pointer + (token * stride_t + head.to(tl.int64) * stride_h)[:, None] + column
    return tl.load(pointers, mask=(first + token < stop)[:, None] & (column < D), other=0.0)


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
