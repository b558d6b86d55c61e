# mypy: allow-untyped-defs, allow-untyped-calls
"""Tree attention in Triton: forward, dQ and dK/dV kernels, their launches, and the operator that torch sees.

With s = scale * <q, k>, p = exp(s - lse) and delta = rowsum(do * o), over the visible pairs:

    o = sum_k p v          dv = sum_q p do          ds = p * (<do, v> - delta)
    lse = log sum_k exp s  dk = scale * sum_q ds q  dq = scale * sum_k ds k

A program owns one tile of one head and streams the tiles that tree_attention_worklist.py lists for it: full ones,
where nothing is masked, then masked ones. Softmax and sums are fp32, exponentials base 2 with scale * log2(e)
folded in. dK/dV adds up the query heads of its key head in the program. No atomics: every sum has a fixed order,
and results are bitwise reproducible. After FlashAttention-2 (arXiv 2307.08691); the tree schedule is ours.

What a query does not see cannot reach it, nan and inf included: masked scores are replaced, not multiplied, and
masked tiles zero the non-finite elements of what a masked 0 would otherwise multiply.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tree_attention_worklist import MASKED_TILE, TILE

LOG2_E = tl.constexpr(1.4426950408889634)

# ---- kernels: q, k, v, do are addressed by token and head strides; all other tensors are contiguous.
# D is the head dim, DP the next power of two, GROUP = Hq / Hkv, STEP the tokens streamed at once from a full tile,
# scale2 = scale * log2(e). q0, q_stop: the first query of a tile, and past its last; k0, k_stop: the keys alike.


@triton.jit
def _item(items, i):
    """(first, stop, full_first, full_stop, masked_first, masked_stop, slot) of item i: TileWork."""
    row = items + i * 7
    return (
        tl.load(row),
        tl.load(row + 1),
        tl.load(row + 2),
        tl.load(row + 3),
        tl.load(row + 4),
        tl.load(row + 5),
        tl.load(row + 6),
    )


@triton.jit
def _offsets(N: tl.constexpr, DP: tl.constexpr, stride):
    return tl.arange(0, N)[:, None] * stride + tl.arange(0, DP)[None, :]


@triton.jit
def _load_rows(x, first, stride, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """[N, DP]: the N tokens from `first` on of one head."""
    pointers = x + first.to(tl.int64) * stride + _offsets(N, DP, stride)
    if D == DP:
        return tl.load(pointers)
    return tl.load(pointers, mask=tl.arange(0, DP)[None, :] < D, other=0.0)


@triton.jit
def _rows_mask(first, stop, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    return (first + tl.arange(0, N) < stop)[:, None] & (tl.arange(0, DP)[None, :] < D)


@triton.jit
def _load_rows_until(x, first, stop, stride, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """[N, DP]: as `_load_rows`, zeros from token `stop` on."""
    pointers = x + first.to(tl.int64) * stride + _offsets(N, DP, stride)
    return tl.load(pointers, mask=_rows_mask(first, stop, N, D, DP), other=0.0)


@triton.jit
def _store_rows(x, value, first, stop, stride, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    pointers = x + first.to(tl.int64) * stride + _offsets(N, DP, stride)
    tl.store(pointers, value.to(x.dtype.element_ty), mask=_rows_mask(first, stop, N, D, DP))


@triton.jit
def _partial(partial, slot, kv_head, k0, Hkv, D: tl.constexpr, TILE: tl.constexpr):
    """Where row k0 is the first of this slot and head in partial [2 * n_slots, Hkv, TILE, D]."""
    return partial + (((slot.to(tl.int64) * Hkv + kv_head) * TILE - k0) * D)


@triton.jit
def _dot(a, b, acc=None):
    return tl.dot(a, b, acc, input_precision="ieee")  # of fp32 operands; others have no choice


@triton.jit
def _visible(query, key, key_end):
    return (key <= query) & (query < key_end)


@triton.jit
def _split_finite(x):
    """x with zeros for nan and inf, and for each row 0, or nan if it had any."""
    zero_or_nan = x.to(tl.float32) * 0.0
    return tl.where(zero_or_nan == 0.0, x, 0.0).to(x.dtype), tl.sum(zero_or_nan, 1)


@triton.jit
def _softmax_step(s, v, m, total, acc, scale2):
    """Adds keys with scores s and values v to each query's running maximum (base 2), sum and output."""
    m_new = tl.maximum(m, tl.max(s, 1) * scale2)
    p = tl.exp2(s * scale2 - m_new[:, None])
    alpha = tl.exp2(m - m_new)
    acc = _dot(p.to(v.dtype), v, acc * alpha[:, None])
    return m_new, total * alpha + tl.sum(p, 1), acc


@triton.jit(do_not_specialize=["T"])
def _forward_kernel(
    q,
    k,
    v,
    o,  # [T, Hq, D] contiguous
    lse,  # [Hq, T]
    subtree_end,  # [T]
    items,
    full,
    masked,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    T,
    Hq,
    scale2,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    TILE: tl.constexpr,
    MASKED_TILE: tl.constexpr,
    STEP: tl.constexpr,
):
    head = (tl.program_id(0) % Hq).to(tl.int64)
    q0, q_stop, full_first, full_stop, masked_first, masked_stop, _slot = _item(items, tl.program_id(0) // Hq)
    k += head // GROUP * stride_kh
    v += head // GROUP * stride_vh
    query = q0 + tl.arange(0, TILE)
    q_tile = _load_rows_until(q + head * stride_qh, q0, q_stop, stride_qt, TILE, D, DP)
    # Finite, so that a row whose first tiles are all masked gets exp2(-inf - m) = 0, not nan.
    m = tl.full((TILE,), -1e30, tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    acc = tl.zeros((TILE, DP), tl.float32)

    STEPS: tl.constexpr = TILE // STEP
    for i in range(full_first * STEPS, full_stop * STEPS):
        k0 = tl.load(full + i // STEPS) + i % STEPS * STEP
        k_tile = _load_rows(k, k0, stride_kt, STEP, D, DP)
        v_tile = _load_rows(v, k0, stride_vt, STEP, D, DP)
        m, total, acc = _softmax_step(_dot(q_tile, k_tile.T), v_tile, m, total, acc, scale2)

    for i in range(masked_first, masked_stop):
        k0, k_stop = tl.load(masked + 2 * i), tl.load(masked + 2 * i + 1)
        key = k0 + tl.arange(0, MASKED_TILE)
        key_end = tl.load(subtree_end + key, mask=key < k_stop, other=0).to(tl.int32)
        k_tile = _load_rows_until(k, k0, k_stop, stride_kt, MASKED_TILE, D, DP)
        v_tile, v_nan = _split_finite(_load_rows_until(v, k0, k_stop, stride_vt, MASKED_TILE, D, DP))
        s = _dot(q_tile, k_tile.T) + v_nan[None, :]
        s = tl.where(_visible(query[:, None], key[None, :], key_end[None, :]), s, float("-inf"))
        m, total, acc = _softmax_step(s, v_tile, m, total, acc, scale2)

    _store_rows(o + head * D, acc / total[:, None], q0, q_stop, Hq * D, TILE, D, DP)
    tl.store(lse + head * T + query, (m + tl.log2(total)) / LOG2_E, mask=query < q_stop)


@triton.jit(do_not_specialize=["T"])
def _dq_kernel(
    q,
    k,
    v,
    o,  # [T, Hq, D] contiguous
    do,
    lse,  # [Hq, T]
    delta,  # [Hq, T], written for _dkdv_kernel
    dq,  # [T, Hq, D] contiguous
    subtree_end,  # [T]
    items,
    full,
    masked,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_dot,
    stride_doh,
    T,
    Hq,
    scale,
    scale2,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    TILE: tl.constexpr,
    MASKED_TILE: tl.constexpr,
    STEP: tl.constexpr,
):
    head = (tl.program_id(0) % Hq).to(tl.int64)
    q0, q_stop, full_first, full_stop, masked_first, masked_stop, _slot = _item(items, tl.program_id(0) // Hq)
    k += head // GROUP * stride_kh
    v += head // GROUP * stride_vh
    query = q0 + tl.arange(0, TILE)
    q_tile = _load_rows_until(q + head * stride_qh, q0, q_stop, stride_qt, TILE, D, DP)
    do_tile = _load_rows_until(do + head * stride_doh, q0, q_stop, stride_dot, TILE, D, DP)
    o_tile = _load_rows_until(o + head * D, q0, q_stop, Hq * D, TILE, D, DP)
    delta_row = tl.sum(do_tile.to(tl.float32) * o_tile.to(tl.float32), 1)
    tl.store(delta + head * T + query, delta_row, mask=query < q_stop)
    lse2 = tl.load(lse + head * T + query, mask=query < q_stop, other=0.0) * LOG2_E
    acc = tl.zeros((TILE, DP), tl.float32)

    STEPS: tl.constexpr = TILE // STEP
    for i in range(full_first * STEPS, full_stop * STEPS):
        k0 = tl.load(full + i // STEPS) + i % STEPS * STEP
        k_tile = _load_rows(k, k0, stride_kt, STEP, D, DP)
        v_tile = _load_rows(v, k0, stride_vt, STEP, D, DP)
        p = tl.exp2(_dot(q_tile, k_tile.T) * scale2 - lse2[:, None])
        ds = p * (_dot(do_tile, v_tile.T) - delta_row[:, None])
        acc = _dot(ds.to(k_tile.dtype), k_tile, acc)

    for i in range(masked_first, masked_stop):
        k0, k_stop = tl.load(masked + 2 * i), tl.load(masked + 2 * i + 1)
        key = k0 + tl.arange(0, MASKED_TILE)
        key_end = tl.load(subtree_end + key, mask=key < k_stop, other=0).to(tl.int32)
        # The lse of a query that sees a nan is nan already.
        k_tile, _k_nan = _split_finite(_load_rows_until(k, k0, k_stop, stride_kt, MASKED_TILE, D, DP))
        v_tile = _load_rows_until(v, k0, k_stop, stride_vt, MASKED_TILE, D, DP)
        p = tl.exp2(_dot(q_tile, k_tile.T) * scale2 - lse2[:, None])
        ds = p * (_dot(do_tile, v_tile.T) - delta_row[:, None])
        ds = tl.where(_visible(query[:, None], key[None, :], key_end[None, :]), ds, 0.0)
        acc = _dot(ds.to(k_tile.dtype), k_tile, acc)

    _store_rows(dq + head * D, acc * scale, q0, q_stop, Hq * D, TILE, D, DP)


@triton.jit(do_not_specialize=["T", "n_slots"])
def _dkdv_kernel(
    q,
    k,
    v,
    do,
    lse,  # [Hq, T]
    delta,  # [Hq, T]
    dk,  # [T, Hkv, D] contiguous, as dv
    dv,
    partial,  # [2, n_slots, Hkv, TILE, D] fp32
    subtree_end,  # [T]
    items,
    full,
    masked,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_dot,
    stride_doh,
    T,
    Hkv,
    n_slots,
    scale,
    scale2,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    TILE: tl.constexpr,
    MASKED_TILE: tl.constexpr,
    STEP: tl.constexpr,
):
    kv_head = (tl.program_id(0) % Hkv).to(tl.int64)
    k0, k_stop, full_first, full_stop, masked_first, masked_stop, slot = _item(items, tl.program_id(0) // Hkv)
    key = k0 + tl.arange(0, TILE)
    key_end = tl.load(subtree_end + key, mask=key < k_stop, other=0).to(tl.int32)
    k_tile = _load_rows_until(k + kv_head * stride_kh, k0, k_stop, stride_kt, TILE, D, DP)
    v_tile = _load_rows_until(v + kv_head * stride_vh, k0, k_stop, stride_vt, TILE, D, DP)
    dk_acc = tl.zeros((TILE, DP), tl.float32)
    dv_acc = tl.zeros((TILE, DP), tl.float32)

    # The query heads of the group take turns on each tile of queries.
    TURNS: tl.constexpr = TILE // STEP * GROUP
    for i in range(full_first * TURNS, full_stop * TURNS):
        head = kv_head * GROUP + i % GROUP
        q0 = tl.load(full + i // TURNS) + i // GROUP % (TILE // STEP) * STEP
        query = q0 + tl.arange(0, STEP)
        q_tile = _load_rows(q + head * stride_qh, q0, stride_qt, STEP, D, DP)
        do_tile = _load_rows(do + head * stride_doh, q0, stride_dot, STEP, D, DP)
        lse2 = tl.load(lse + head * T + query) * LOG2_E
        delta_row = tl.load(delta + head * T + query)
        p = tl.exp2(_dot(k_tile, q_tile.T) * scale2 - lse2[None, :])  # [keys, queries]
        dv_acc = _dot(p.to(do_tile.dtype), do_tile, dv_acc)
        ds = p * (_dot(v_tile, do_tile.T) - delta_row[None, :])
        dk_acc = _dot(ds.to(q_tile.dtype), q_tile, dk_acc)

    for i in range(masked_first * GROUP, masked_stop * GROUP):
        head = kv_head * GROUP + i % GROUP
        q0, q_stop = tl.load(masked + i // GROUP * 2), tl.load(masked + i // GROUP * 2 + 1)
        query = q0 + tl.arange(0, MASKED_TILE)
        # The lse of a query with a nan is nan already.
        q_tile, _q_nan = _split_finite(
            _load_rows_until(q + head * stride_qh, q0, q_stop, stride_qt, MASKED_TILE, D, DP)
        )
        do_tile, do_nan = _split_finite(
            _load_rows_until(do + head * stride_doh, q0, q_stop, stride_dot, MASKED_TILE, D, DP)
        )
        lse2 = tl.load(lse + head * T + query, mask=query < q_stop, other=0.0) * LOG2_E
        delta_row = tl.load(delta + head * T + query, mask=query < q_stop, other=0.0)
        visible = _visible(query[None, :], key[:, None], key_end[:, None]) & (query < q_stop)[None, :]
        p = tl.exp2(_dot(k_tile, q_tile.T) * scale2 - lse2[None, :]) + do_nan[None, :]
        dv_acc = _dot(tl.where(visible, p, 0.0).to(do_tile.dtype), do_tile, dv_acc)
        ds = tl.where(visible, p * (_dot(v_tile, do_tile.T) - delta_row[None, :]), 0.0)
        dk_acc = _dot(ds.to(q_tile.dtype), q_tile, dk_acc)

    dk_acc *= scale
    if slot < 0:
        _store_rows(dk + kv_head * D, dk_acc, k0, k_stop, Hkv * D, TILE, D, DP)
        _store_rows(dv + kv_head * D, dv_acc, k0, k_stop, Hkv * D, TILE, D, DP)
    else:
        dk_partial = _partial(partial, slot, kv_head, k0, Hkv, D, TILE)
        _store_rows(dk_partial, dk_acc, k0, k_stop, D, TILE, D, DP)
        dv_partial = _partial(partial, n_slots + slot, kv_head, k0, Hkv, D, TILE)
        _store_rows(dv_partial, dv_acc, k0, k_stop, D, TILE, D, DP)


@triton.jit(do_not_specialize=["n_slots"])
def _add_partials_kernel(partial, dk, dv, slots, Hkv, n_slots, D: tl.constexpr, DP: tl.constexpr, TILE: tl.constexpr):
    """The program of a tile's first slot adds up its partials, program_id(1) == 0 for dk, 1 for dv."""
    slot = tl.program_id(0) // Hkv
    kv_head = tl.program_id(0) % Hkv
    k0, k_stop, n = tl.load(slots + slot * 3), tl.load(slots + slot * 3 + 1), tl.load(slots + slot * 3 + 2)
    acc = tl.zeros((TILE, DP), tl.float32)
    for i in range(n):
        x = _partial(partial, tl.program_id(1) * n_slots + slot + i, kv_head, k0, Hkv, D, TILE)
        acc += _load_rows_until(x, k0, k_stop, D, TILE, D, DP)
    if n > 0:
        if tl.program_id(1) == 0:
            _store_rows(dk + kv_head * D, acc, k0, k_stop, Hkv * D, TILE, D, DP)
        else:
            _store_rows(dv + kv_head * D, acc, k0, k_stop, Hkv * D, TILE, D, DP)


# ---- launches


class Launch(NamedTuple):
    step: int
    num_warps: int
    num_stages: int


def launch(kernel: str, head_dim: int, itemsize: int, capability: tuple[int, int]) -> Launch:
    return Launch(64, 8, 2)


def _constants(kernel: str, q: Tensor, k: Tensor) -> dict[str, int]:
    D = q.shape[2]
    capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else (9, 0)
    shape = {"GROUP": q.shape[1] // k.shape[1], "D": D, "DP": max(16, triton.next_power_of_2(D))}
    step, num_warps, num_stages = launch(kernel, shape["DP"], q.element_size(), capability)
    return shape | {"TILE": TILE, "MASKED_TILE": MASKED_TILE, "STEP": step, "num_warps": num_warps, "num_stages": num_stages}


def _strides(*tensors: Tensor) -> list[int]:
    return [x.stride(dim) for x in tensors for dim in (0, 1)]


def _contiguous_rows(*tensors: Tensor) -> list[Tensor]:
    return [x if x.stride(2) == 1 else x.contiguous() for x in tensors]


@torch.library.custom_op("cipo_kernels::tree_attention", mutates_args=())
def attention_op(
    q: Tensor, k: Tensor, v: Tensor, subtree_end: Tensor, work: list[Tensor], scale: float
) -> tuple[Tensor, Tensor]:
    """(o [T, Hq, D], lse [Hq, T] fp32 in nats). subtree_end [T]: of each token; work: TreeWork.tensors()."""
    q, k, v = _contiguous_rows(q, k, v)
    T, Hq, _ = q.shape
    o, lse = q.new_empty(q.shape), q.new_empty(Hq, T, dtype=torch.float32)
    items, full, masked = work[:3]
    arguments = [q, k, v, o, lse, subtree_end, items, full, masked, *_strides(q, k, v), T, Hq, scale * LOG2_E.value]
    with torch.cuda.device_of(q):
        _forward_kernel[(len(items) * Hq,)](*arguments, **_constants("forward", q, k))
    return o, lse


@attention_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, subtree_end: Tensor, work: list[Tensor], scale: float) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@torch.library.custom_op("cipo_kernels::tree_attention_backward", mutates_args=())
def attention_backward_op(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, subtree_end: Tensor, work: list[Tensor], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of `attention_op`, in the shapes and dtypes of q, k and v."""
    do, q, k, v = _contiguous_rows(do, q, k, v)
    (T, Hq, D), Hkv = q.shape, k.shape[1]
    dq, dk, dv, delta = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), torch.empty_like(lse)
    by_query, by_key, slots = work[:3], work[3:6], work[6]
    n_slots = len(slots)
    partial = lse.new_empty(2, n_slots, Hkv, TILE, D)
    strides, scale2 = _strides(q, k, v, do), scale * LOG2_E.value
    dq_arguments = [q, k, v, o, do, lse, delta, dq, subtree_end, *by_query, *strides, T, Hq, scale, scale2]
    dkdv_arguments = [q, k, v, do, lse, delta, dk, dv, partial, subtree_end, *by_key, *strides, T, Hkv, n_slots, scale, scale2]
    with torch.cuda.device_of(q):
        _dq_kernel[(len(by_query[0]) * Hq,)](*dq_arguments, **_constants("dq", q, k))  # writes delta
        _dkdv_kernel[(len(by_key[0]) * Hkv,)](*dkdv_arguments, **_constants("dkdv", q, k))
        if n_slots:
            DP = max(16, triton.next_power_of_2(D))
            _add_partials_kernel[(n_slots * Hkv, 2)](partial, dk, dv, slots, Hkv, n_slots, D, DP, TILE)
    return dq, dk, dv
