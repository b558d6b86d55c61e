# mypy: allow-untyped-defs, allow-untyped-calls
"""Forward of the Triton tree attention. With s = scale * <q, k> over the visible pairs,

    lse = log sum_k exp(s)      o = sum_k exp(s - lse) v

by FlashAttention-2's recurrence (arXiv 2307.08691) with fp32 sums: tiles of keys raise a query's running maximum m,
and rescale what is summed up so far by exp(m - m_new). A program owns rows of a tile of queries.
"""

import triton
import triton.language as tl

from .tiles import (
    LOG2_E,
    dot,
    full_tile,
    load_queries,
    load_rows,
    masked_tile,
    step_first,
    store_rows,
    unseen_steps,
    visible,
    work_item,
)


@triton.jit(do_not_specialize=["T"])
def forward_kernel(
    q, k, v,
    items, full, masked,  # TileWork
    subtree_end,  # [T]
    T, H,
    o,  # [T, H, D]
    lse,  # [H, T]
    scale2,
    GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, TMA: tl.constexpr,
    OWN_TILE: tl.constexpr, TILE: tl.constexpr, OWN: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    kv_head, tile_first, tile_stop, row0, q_stop, full_first, full_stop, masked_first, masked_stop, _ = work_item(
        items, H // GROUP, GROUP, OWN_TILE, TILE, OWN, STEP
    )
    if row0 >= (tile_stop - tile_first) * GROUP:
        return
    masked_stop -= unseen_steps(tile_first, tile_stop, q_stop, TILE, STEP)
    row = row0 + tl.arange(0, OWN)
    query, head = tile_first + row // GROUP, kv_head * GROUP + row % GROUP
    q_tile = load_queries(q, kv_head, tile_first, q_stop, row, GROUP, D, DP)
    # Finite, so that a row whose first tiles are all masked gets exp2(-inf - m) = 0, not nan.
    m = tl.full((OWN,), -1e30, tl.float32)
    total = tl.zeros((OWN,), tl.float32)
    acc = tl.zeros((OWN, DP), tl.float32)

    tile0 = full_tile(full, full_first, TILE, STEP)
    for i in range(full_first, full_stop):
        k0 = step_first(tile0, i, TILE, STEP)
        next_tile0 = full_tile(full, i + 1, TILE, STEP)
        k_tile = load_rows(k, kv_head, k0, T, STEP, D, DP, TMA)
        v_tile = load_rows(v, kv_head, k0, T, STEP, D, DP, TMA)
        m, total, acc = _softmax_step(dot(q_tile, k_tile.T), v_tile, m, total, acc, scale2)
        tile0 = next_tile0

    tile0, k_stop = masked_tile(masked, masked_first, TILE, STEP)
    for i in range(masked_first, masked_stop):
        k0 = step_first(tile0, i, TILE, STEP)
        next_tile0, next_k_stop = masked_tile(masked, i + 1, TILE, STEP)
        key = k0 + tl.arange(0, STEP)
        key_end = tl.load(subtree_end + key, mask=key < k_stop, other=0).to(tl.int32)
        k_tile = load_rows(k, kv_head, k0, T, STEP, D, DP, TMA)
        v_tile = load_rows(v, kv_head, k0, T, STEP, D, DP, TMA)
        seen = visible(query[:, None], key[None, :], key_end[None, :])
        s = tl.where(seen, dot(q_tile, k_tile.T), float("-inf"))
        m, total, acc = _softmax_step(s, v_tile, m, total, acc, scale2)
        tile0, k_stop = next_tile0, next_k_stop

    store_rows(o, acc / total[:, None], head[:, None], query, q_stop, H, D, DP)
    tl.store(lse + head.to(tl.int64) * T + query, (m + tl.log2(total)) / LOG2_E, mask=query < q_stop)


@triton.jit
def _softmax_step(s, v, m, total, acc, scale2):
    """Adds keys with scores s / scale and values v to each query's running maximum (base 2), sum and output."""
    m_new = tl.maximum(m, tl.max(s, 1) * scale2)
    p = tl.exp2(s * scale2 - m_new[:, None])
    alpha = tl.exp2(m - m_new)
    acc = dot(p.to(v.dtype), v, acc * alpha[:, None])
    return m_new, total * alpha + tl.sum(p, 1), acc
