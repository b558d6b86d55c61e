# mypy: allow-untyped-defs, allow-untyped-calls
"""Backward of the Triton tree attention. With s = scale * <q, k> and lse of the forward pass, over the visible pairs,

    p = exp(s - lse)      delta = sum_d do o      ds = p (<do, v> - delta)
    dq = scale sum_k ds k      dk = scale sum_q ds q      dv = sum_q p do

with fp32 sums. dQ: a program owns rows of a tile of queries. dK/dV: a tile of keys of one key head, whose query heads
take turns on each streamed step; tiles that are split (TreeWork.partial) leave fp32 partial results, which a last
kernel adds up. Nothing is atomic: every sum has a fixed order. After FlashAttention-2 (arXiv 2307.08691).
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
from .worklist import OWN_TILE

SLOT_TOKENS = tl.constexpr(OWN_TILE)  # of a partial result, whose tile may have fewer


@triton.jit
def _p(a, b, lse2, scale2):
    """a, b: q and k, then queries are rows; or k and q."""
    return tl.exp2(dot(a, b.T) * scale2 - lse2)


@triton.jit
def _ds(p, a, b, delta):
    """a, b: do and v, or v and do."""
    return p * (dot(a, b.T) - delta)


@triton.jit(do_not_specialize=["T"])
def dq_kernel(
    q, o, do, k, v,
    items, full, masked,  # TileWork
    subtree_end,  # [T]
    T, H,
    lse,  # [H, T]
    delta,  # [H, T], written here for dkdv_kernel
    dq,  # [T, H, D]
    scale, scale2,
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
    do_tile = load_queries(do, kv_head, tile_first, q_stop, row, GROUP, D, DP)
    o_tile = load_queries(o, kv_head, tile_first, q_stop, row, GROUP, D, DP)
    delta_row = tl.sum(do_tile.to(tl.float32) * o_tile.to(tl.float32), 1)
    in_lse = head.to(tl.int64) * T + query
    tl.store(delta + in_lse, delta_row, mask=query < q_stop)
    lse2 = tl.load(lse + in_lse, mask=query < q_stop, other=0.0) * LOG2_E
    acc = tl.zeros((OWN, DP), tl.float32)

    tile0 = full_tile(full, full_first, TILE, STEP)
    for i in range(full_first, full_stop):
        k0 = step_first(tile0, i, TILE, STEP)
        next_tile0 = full_tile(full, i + 1, TILE, STEP)
        k_tile = load_rows(k, kv_head, k0, T, STEP, D, DP, TMA)
        v_tile = load_rows(v, kv_head, k0, T, STEP, D, DP, TMA)
        ds = _ds(_p(q_tile, k_tile, lse2[:, None], scale2), do_tile, v_tile, delta_row[:, None])
        acc = dot(ds.to(k_tile.dtype), k_tile, acc)
        tile0 = next_tile0

    tile0, k_stop = masked_tile(masked, masked_first, TILE, STEP)
    for i in range(masked_first, masked_stop):
        k0 = step_first(tile0, i, TILE, STEP)
        next_tile0, next_k_stop = masked_tile(masked, i + 1, TILE, STEP)
        key = k0 + tl.arange(0, STEP)
        key_end = tl.load(subtree_end + key, mask=key < k_stop, other=0).to(tl.int32)
        k_tile = load_rows(k, kv_head, k0, T, STEP, D, DP, TMA)
        v_tile = load_rows(v, kv_head, k0, T, STEP, D, DP, TMA)
        ds = _ds(_p(q_tile, k_tile, lse2[:, None], scale2), do_tile, v_tile, delta_row[:, None])
        ds = tl.where(visible(query[:, None], key[None, :], key_end[None, :]), ds, 0.0)
        acc = dot(ds.to(k_tile.dtype), k_tile, acc)
        tile0, k_stop = next_tile0, next_k_stop

    store_rows(dq, acc * scale, head[:, None], query, q_stop, H, D, DP)


@triton.jit(do_not_specialize=["T", "n_slots"])
def dkdv_kernel(
    k, v, q, do,
    items, full, masked,  # TileWork
    subtree_end,  # [T]
    T, H,
    lse, delta,  # [H * GROUP, T]
    dk, dv,  # [T, H, D]
    partial,  # [2, n_slots, SLOT_TOKENS, H, D] fp32
    n_slots,
    scale, scale2,
    GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, TMA: tl.constexpr,
    OWN_TILE: tl.constexpr, TILE: tl.constexpr, OWN: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    kv_head, tile_first, _, row0, k_stop, full_first, full_stop, masked_first, masked_stop, slot = work_item(
        items, H, 1, OWN_TILE, TILE, OWN, STEP
    )
    k0 = tile_first + row0
    if k0 >= k_stop:
        return
    key = k0 + tl.arange(0, OWN)
    key_end = tl.load(subtree_end + key, mask=key < k_stop, other=0).to(tl.int32)
    k_tile = load_rows(k, kv_head, k0, T, OWN, D, DP, TMA)
    v_tile = load_rows(v, kv_head, k0, T, OWN, D, DP, TMA)
    dk_acc = tl.zeros((OWN, DP), tl.float32)
    dv_acc = tl.zeros((OWN, DP), tl.float32)

    tile0 = full_tile(full, full_first, TILE, STEP)
    for i in range(full_first * GROUP, full_stop * GROUP):
        head = kv_head * GROUP + i % GROUP
        q0 = step_first(tile0, i // GROUP, TILE, STEP)
        next_tile0 = full_tile(full, (i + 1) // GROUP, TILE, STEP)
        row = head * T + q0 + tl.arange(0, STEP)
        q_tile = load_rows(q, head, q0, T, STEP, D, DP, TMA)
        do_tile = load_rows(do, head, q0, T, STEP, D, DP, TMA)
        p = _p(k_tile, q_tile, tl.load(lse + row)[None, :] * LOG2_E, scale2)  # [keys, queries]
        ds = _ds(p, v_tile, do_tile, tl.load(delta + row)[None, :])
        dv_acc = dot(p.to(do_tile.dtype), do_tile, dv_acc)
        dk_acc = dot(ds.to(q_tile.dtype), q_tile, dk_acc)
        tile0 = next_tile0

    tile0, q_stop = masked_tile(masked, masked_first, TILE, STEP)
    for i in range(masked_first * GROUP, masked_stop * GROUP):
        head = kv_head * GROUP + i % GROUP
        q0 = step_first(tile0, i // GROUP, TILE, STEP)
        next_tile0, next_q_stop = masked_tile(masked, (i + 1) // GROUP, TILE, STEP)
        query = q0 + tl.arange(0, STEP)
        row = head * T + query
        q_tile = load_rows(q, head, q0, T, STEP, D, DP, TMA)
        do_tile = load_rows(do, head, q0, T, STEP, D, DP, TMA)
        lse2 = tl.load(lse + row, mask=query < q_stop, other=0.0) * LOG2_E
        delta_row = tl.load(delta + row, mask=query < q_stop, other=0.0)
        query = tl.where(query < q_stop, query, -1)  # sees nothing
        seen = visible(query[None, :], key[:, None], key_end[:, None])
        p = tl.where(seen, _p(k_tile, q_tile, lse2[None, :], scale2), 0.0)
        dv_acc = dot(p.to(do_tile.dtype), do_tile, dv_acc)
        ds = _ds(p, v_tile, do_tile, delta_row[None, :])  # 0 where p is
        dk_acc = dot(ds.to(q_tile.dtype), q_tile, dk_acc)
        tile0, q_stop = next_tile0, next_q_stop

    dk_acc *= scale
    if slot < 0:
        store_rows(dk, dk_acc, kv_head, key, k_stop, H, D, DP)
        store_rows(dv, dv_acc, kv_head, key, k_stop, H, D, DP)
    else:
        shift = slot * SLOT_TOKENS - tile_first  # from token to row of partial
        store_rows(partial, dk_acc, kv_head, key + shift, k_stop + shift, H, D, DP)
        shift += n_slots * SLOT_TOKENS
        store_rows(partial, dv_acc, kv_head, key + shift, k_stop + shift, H, D, DP)


@triton.jit(do_not_specialize=["n_slots"])
def add_partials_kernel(
    partial,  # [2, n_slots, SLOT_TOKENS, Hkv, D] fp32
    dk, dv,  # [T, Hkv, D]
    slots,  # [n_slots, 3] TreeWork.partial
    n_slots,
    row_size,  # Hkv * D
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds up BLOCK elements of one tile's partial results, into dk for program_id(2) = 0 and into dv for 1."""
    slot, is_dv = tl.program_id(0), tl.program_id(2)
    k0, k_stop, n = tl.load(slots + slot * 3), tl.load(slots + slot * 3 + 1), tl.load(slots + slot * 3 + 2)
    element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if n == 0:
        return
    wanted = element < (k_stop - k0) * row_size
    partial += (is_dv * n_slots + slot).to(tl.int64) * SLOT_TOKENS * row_size
    acc = tl.zeros((BLOCK,), tl.float32)
    for i in range(n):
        acc += tl.load(partial + i * SLOT_TOKENS * row_size + element, mask=wanted, other=0.0)
    out = k0.to(tl.int64) * row_size + element
    if is_dv:
        tl.store(dv + out, acc.to(dv.dtype.element_ty), mask=wanted)
    else:
        tl.store(dk + out, acc.to(dk.dtype.element_ty), mask=wanted)
