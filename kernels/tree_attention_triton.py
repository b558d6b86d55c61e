# mypy: allow-untyped-defs, allow-untyped-calls
"""Tree attention in Triton: forward, dQ and dK/dV kernels, their launches, and the operator that torch sees.

With s = scale * <q, k>, p = exp(s - lse) and delta = rowsum(do * o), over the visible pairs:

    o = sum_k p v          dv = sum_q p do          ds = p * (<do, v> - delta)
    lse = log sum_k exp s  dk = scale * sum_q ds q  dq = scale * sum_k ds k

A program owns a tile of one head and streams what tree_attention_worklist.py lists for it: full tiles, where
nothing is masked, then masked ones. Softmax and sums are fp32, exponentials base 2 with scale * log2(e) folded in.
dK/dV adds up the query heads of its key head in the program. There are no atomics: every sum has a fixed order, so
results are bitwise reproducible. After FlashAttention-2 (arXiv 2307.08691); the tree schedule is ours.

What a query does not see cannot reach it, nan and inf included: masked scores are replaced, not multiplied, and
masked tiles zero the non-finite elements that a masked 0 would otherwise multiply.

Where there is TMA, inputs are read through tensor descriptors: addresses in registers made dK/dV spill.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .fused_linear_logprob import refuse_create_graph
from .tree_attention_worklist import MASKED_TILE, TILE
from .tree_layout import TreeLayout

LOG2_E = tl.constexpr(1.4426950408889634)
MAX_HEAD_DIM = 128
ADD_BLOCK = 4096

# ---- kernels: q, k, v, do and dq's o are descriptors of [H, T, D] in blocks [1, OWN or STEP, DP], or, without TMA,
# (pointer, token stride, head stride); other tensors are pointers to contiguous memory. D is the head dim, DP a power
# of two >= D, GROUP = Hq / Hkv, scale2 = scale * log2(e).
# OWN and STEP: tokens of the own tile and of one streamed step; they divide TILE and, STEP, MASKED_TILE.
# q0, q_stop: the first query of a tile, and past its last; k0, k_stop: the keys alike.


@triton.jit
def _item(items, i, part, OWN: tl.constexpr):
    """Item i (TileWork), its own tile cut to the part-th OWN tokens."""
    row = items + i * 7
    first = tl.load(row) + part * OWN
    stop = tl.minimum(tl.load(row + 1), first + OWN)
    return first, stop, tl.load(row + 2), tl.load(row + 3), tl.load(row + 4), tl.load(row + 5), tl.load(row + 6)


@triton.jit
def _load_rows(x, head, first, T, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, TMA: tl.constexpr):
    """[N, DP] tokens of a head from `first` on, zeros past T; unwanted tokens are the caller's to mask."""
    if TMA:
        return x.load([head, first, 0]).reshape(N, DP)
    else:  # without it, the lines below would be compiled too
        pointer, stride_t, stride_h = x
        row, column = tl.arange(0, N)[:, None], tl.arange(0, DP)[None, :]
        pointer += first.to(tl.int64) * stride_t + head.to(tl.int64) * stride_h
        return tl.load(pointer + row * stride_t + column, mask=(first + row < T) & (column < D), other=0.0)


@triton.jit
def _store_rows(x, value, head, first, stop, H, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """Writes rows [first, stop) of a head of the contiguous x [T, H, D]."""
    row = first + tl.arange(0, N)[:, None]
    column = tl.arange(0, DP)[None, :]
    pointers = x + (row.to(tl.int64) * H + head) * D + column
    tl.store(pointers, value.to(x.dtype.element_ty), mask=(row < stop) & (column < D))


@triton.jit
def _dot(a, b, acc=None):
    return tl.dot(a, b, acc, input_precision="ieee")  # of fp32 operands; others have no choice


@triton.jit
def _visible(query, key, key_end):
    return (key <= query) & (query < key_end)


@triton.jit
def _zero_or_nan(x):
    return x.to(tl.float32) * 0.0  # nan for inf, too


@triton.jit
def _finite(x):
    """x with zeros for nan and inf: what a masked score, being 0, may be multiplied by."""
    return tl.where(_zero_or_nan(x) == 0.0, x, 0.0).to(x.dtype)


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
    items,
    full,
    masked,
    subtree_end,  # [T]
    T,
    Hq,
    o,  # [T, Hq, D]
    lse,  # [Hq, T]
    scale2,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    TILE: tl.constexpr,
    MASKED_TILE: tl.constexpr,
    OWN: tl.constexpr,
    STEP: tl.constexpr,
    TMA: tl.constexpr,
):
    pid = tl.program_id(0)
    PARTS: tl.constexpr = TILE // OWN
    head, part = pid % Hq, pid // Hq % PARTS
    q0, q_stop, full_first, full_stop, masked_first, masked_stop, _slot = _item(items, pid // (Hq * PARTS), part, OWN)
    if q0 >= q_stop:
        return
    query = q0 + tl.arange(0, OWN)
    q_tile = _load_rows(q, head, q0, T, OWN, D, DP, TMA)
    # Finite, so that a row whose first tiles are all masked gets exp2(-inf - m) = 0, not nan.
    m = tl.full((OWN,), -1e30, tl.float32)
    total = tl.zeros((OWN,), tl.float32)
    acc = tl.zeros((OWN, DP), tl.float32)

    STEPS: tl.constexpr = TILE // STEP
    for i in range(full_first * STEPS, full_stop * STEPS):
        k0 = tl.load(full + i // STEPS) + i % STEPS * STEP
        k_tile = _load_rows(k, head // GROUP, k0, T, STEP, D, DP, TMA)
        v_tile = _load_rows(v, head // GROUP, k0, T, STEP, D, DP, TMA)
        m, total, acc = _softmax_step(_dot(q_tile, k_tile.T), v_tile, m, total, acc, scale2)

    MASKED_STEPS: tl.constexpr = MASKED_TILE // STEP
    for i in range(masked_first * MASKED_STEPS, masked_stop * MASKED_STEPS):
        k0 = tl.load(masked + i // MASKED_STEPS * 2) + i % MASKED_STEPS * STEP
        k_stop = tl.load(masked + i // MASKED_STEPS * 2 + 1)
        key = k0 + tl.arange(0, STEP)
        key_end = tl.load(subtree_end + key, mask=key < k_stop, other=0).to(tl.int32)
        k_tile = _load_rows(k, head // GROUP, k0, T, STEP, D, DP, TMA)
        v_tile = _load_rows(v, head // GROUP, k0, T, STEP, D, DP, TMA)
        s = _dot(q_tile, k_tile.T) + tl.sum(_zero_or_nan(v_tile), 1)[None, :]  # of the keys a query does see
        s = tl.where(_visible(query[:, None], key[None, :], key_end[None, :]), s, float("-inf"))
        m, total, acc = _softmax_step(s, _finite(v_tile), m, total, acc, scale2)

    _store_rows(o, acc / total[:, None], head, q0, q_stop, Hq, OWN, D, DP)
    tl.store(lse + head.to(tl.int64) * T + query, (m + tl.log2(total)) / LOG2_E, mask=query < q_stop)


@triton.jit(do_not_specialize=["T"])
def _dq_kernel(
    q,
    o,
    do,
    k,
    v,
    items,
    full,
    masked,
    subtree_end,  # [T]
    T,
    Hq,
    lse,  # [Hq, T]
    delta,  # [Hq, T], written here for _dkdv_kernel
    dq,  # [T, Hq, D]
    scale,
    scale2,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    TILE: tl.constexpr,
    MASKED_TILE: tl.constexpr,
    OWN: tl.constexpr,
    STEP: tl.constexpr,
    TMA: tl.constexpr,
):
    pid = tl.program_id(0)
    PARTS: tl.constexpr = TILE // OWN
    head, part = pid % Hq, pid // Hq % PARTS
    q0, q_stop, full_first, full_stop, masked_first, masked_stop, _slot = _item(items, pid // (Hq * PARTS), part, OWN)
    if q0 >= q_stop:
        return
    query = q0 + tl.arange(0, OWN)
    q_tile = _load_rows(q, head, q0, T, OWN, D, DP, TMA)
    do_tile = _load_rows(do, head, q0, T, OWN, D, DP, TMA)
    o_tile = _load_rows(o, head, q0, T, OWN, D, DP, TMA)
    delta_row = tl.sum(do_tile.to(tl.float32) * o_tile.to(tl.float32), 1)
    lse += head.to(tl.int64) * T
    tl.store(delta + head.to(tl.int64) * T + query, delta_row, mask=query < q_stop)
    lse2 = tl.load(lse + query, mask=query < q_stop, other=0.0) * LOG2_E
    acc = tl.zeros((OWN, DP), tl.float32)

    STEPS: tl.constexpr = TILE // STEP
    for i in range(full_first * STEPS, full_stop * STEPS):
        k0 = tl.load(full + i // STEPS) + i % STEPS * STEP
        k_tile = _load_rows(k, head // GROUP, k0, T, STEP, D, DP, TMA)
        v_tile = _load_rows(v, head // GROUP, k0, T, STEP, D, DP, TMA)
        p = tl.exp2(_dot(q_tile, k_tile.T) * scale2 - lse2[:, None])
        ds = p * (_dot(do_tile, v_tile.T) - delta_row[:, None])
        acc = _dot(ds.to(k_tile.dtype), k_tile, acc)

    MASKED_STEPS: tl.constexpr = MASKED_TILE // STEP
    for i in range(masked_first * MASKED_STEPS, masked_stop * MASKED_STEPS):
        k0 = tl.load(masked + i // MASKED_STEPS * 2) + i % MASKED_STEPS * STEP
        k_stop = tl.load(masked + i // MASKED_STEPS * 2 + 1)
        key = k0 + tl.arange(0, STEP)
        key_end = tl.load(subtree_end + key, mask=key < k_stop, other=0).to(tl.int32)
        # This hides no nan: a query that sees it has lse nan.
        k_tile = _finite(_load_rows(k, head // GROUP, k0, T, STEP, D, DP, TMA))
        v_tile = _load_rows(v, head // GROUP, k0, T, STEP, D, DP, TMA)
        p = tl.exp2(_dot(q_tile, k_tile.T) * scale2 - lse2[:, None])
        ds = p * (_dot(do_tile, v_tile.T) - delta_row[:, None])
        ds = tl.where(_visible(query[:, None], key[None, :], key_end[None, :]), ds, 0.0)
        acc = _dot(ds.to(k_tile.dtype), k_tile, acc)

    _store_rows(dq, acc * scale, head, q0, q_stop, Hq, OWN, D, DP)


@triton.jit(do_not_specialize=["T", "n_slots"])
def _dkdv_kernel(
    k,
    v,
    q,
    do,
    items,
    full,
    masked,
    subtree_end,  # [T]
    T,
    Hkv,
    lse,  # [Hq, T]
    delta,  # [Hq, T]
    dk,  # [T, Hkv, D], as dv
    dv,
    partial,  # [2, n_slots, TILE, Hkv, D] fp32
    n_slots,
    scale,
    scale2,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    TILE: tl.constexpr,
    MASKED_TILE: tl.constexpr,
    OWN: tl.constexpr,
    STEP: tl.constexpr,
    TMA: tl.constexpr,
):
    pid = tl.program_id(0)
    PARTS: tl.constexpr = TILE // OWN
    kv_head, part = pid % Hkv, pid // Hkv % PARTS
    k0, k_stop, full_first, full_stop, masked_first, masked_stop, slot = _item(items, pid // (Hkv * PARTS), part, OWN)
    if k0 >= k_stop:
        return
    key = k0 + tl.arange(0, OWN)
    key_end = tl.load(subtree_end + key, mask=key < k_stop, other=0).to(tl.int32)
    k_tile = _load_rows(k, kv_head, k0, T, OWN, D, DP, TMA)
    v_tile = _load_rows(v, kv_head, k0, T, OWN, D, DP, TMA)
    dk_acc = tl.zeros((OWN, DP), tl.float32)
    dv_acc = tl.zeros((OWN, DP), tl.float32)

    # The query heads of the group take turns on each step.
    TURNS: tl.constexpr = TILE // STEP * GROUP
    for i in range(full_first * TURNS, full_stop * TURNS):
        head = kv_head * GROUP + i % GROUP
        q0 = tl.load(full + i // TURNS) + i % TURNS // GROUP * STEP
        row = head.to(tl.int64) * T + q0 + tl.arange(0, STEP)
        q_tile = _load_rows(q, head, q0, T, STEP, D, DP, TMA)
        do_tile = _load_rows(do, head, q0, T, STEP, D, DP, TMA)
        p = tl.exp2(_dot(k_tile, q_tile.T) * scale2 - tl.load(lse + row)[None, :] * LOG2_E)  # [keys, queries]
        dv_acc = _dot(p.to(do_tile.dtype), do_tile, dv_acc)
        ds = p * (_dot(v_tile, do_tile.T) - tl.load(delta + row)[None, :])
        dk_acc = _dot(ds.to(q_tile.dtype), q_tile, dk_acc)

    MASKED_TURNS: tl.constexpr = MASKED_TILE // STEP * GROUP
    for i in range(masked_first * MASKED_TURNS, masked_stop * MASKED_TURNS):
        head = kv_head * GROUP + i % GROUP
        q0 = tl.load(masked + i // MASKED_TURNS * 2) + i % MASKED_TURNS // GROUP * STEP
        q_stop = tl.load(masked + i // MASKED_TURNS * 2 + 1)
        query = q0 + tl.arange(0, STEP)
        row = head.to(tl.int64) * T + query
        # This hides no nan: a query that has it has lse or delta nan.
        q_tile = _finite(_load_rows(q, head, q0, T, STEP, D, DP, TMA))
        do_tile = _finite(_load_rows(do, head, q0, T, STEP, D, DP, TMA))
        lse2 = tl.load(lse + row, mask=query < q_stop, other=0.0) * LOG2_E
        delta_row = tl.load(delta + row, mask=query < q_stop, other=0.0)
        query = tl.where(query < q_stop, query, -1)  # sees nothing
        visible = _visible(query[None, :], key[:, None], key_end[:, None])
        p = tl.where(visible, tl.exp2(_dot(k_tile, q_tile.T) * scale2 - lse2[None, :]), 0.0)
        dv_acc = _dot(p.to(do_tile.dtype), do_tile, dv_acc)
        # p again, not visible: a mask kept for it spills. nan != 0.
        ds = tl.where(p != 0.0, p * (_dot(v_tile, do_tile.T) - delta_row[None, :]), 0.0)
        dk_acc = _dot(ds.to(q_tile.dtype), q_tile, dk_acc)

    dk_acc *= scale
    if slot < 0:
        _store_rows(dk, dk_acc, kv_head, k0, k_stop, Hkv, OWN, D, DP)
        _store_rows(dv, dv_acc, kv_head, k0, k_stop, Hkv, OWN, D, DP)
    else:
        shift = slot * TILE + part * OWN - k0  # from token to row of partial
        _store_rows(partial, dk_acc, kv_head, k0 + shift, k_stop + shift, Hkv, OWN, D, DP)
        shift += n_slots * TILE
        _store_rows(partial, dv_acc, kv_head, k0 + shift, k_stop + shift, Hkv, OWN, D, DP)


@triton.jit(do_not_specialize=["n_slots"])
def _add_partials_kernel(
    partial,  # [2, n_slots, TILE, Hkv, D] fp32
    dk,  # [T, Hkv, D], as dv
    dv,
    slots,  # [n_slots, 3] TreeWork.partial
    n_slots,
    row_size,  # Hkv * D
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds up BLOCK elements of one tile's partial results, into dk for program_id(2) = 0 and into dv for 1."""
    slot, is_dv = tl.program_id(0), tl.program_id(2)
    k0, k_stop, n = tl.load(slots + slot * 3), tl.load(slots + slot * 3 + 1), tl.load(slots + slot * 3 + 2)
    element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if n == 0:
        return
    wanted = element < (k_stop - k0) * row_size
    partial += (is_dv * n_slots + slot).to(tl.int64) * TILE * row_size
    acc = tl.zeros((BLOCK,), tl.float32)
    for i in range(n):
        acc += tl.load(partial + i * TILE * row_size + element, mask=wanted, other=0.0)
    out = k0.to(tl.int64) * row_size + element
    if is_dv:
        tl.store(dv + out, acc.to(dv.dtype.element_ty), mask=wanted)
    else:
        tl.store(dk + out, acc.to(dk.dtype.element_ty), mask=wanted)


KERNELS = {"forward": _forward_kernel, "dq": _dq_kernel, "dkdv": _dkdv_kernel}

# ---- launches


class Config(NamedTuple):
    own: int  # tokens of the own tile
    step: int  # tokens of a streamed step
    num_warps: int
    num_stages: int  # a tile's load waits for that of its first token: (num_stages - 1) // 2 tiles are under way
    tma: bool


# By kernel, then for head dims up to 64 and up to 128. From what compiles without spilling, not from timings.
TMA_CONFIGS = {
    "forward": (Config(128, 64, 8, 5, True), Config(128, 64, 8, 5, True)),
    "dq": (Config(128, 64, 8, 5, True), Config(128, 64, 8, 5, True)),
    "dkdv": (Config(128, 64, 8, 3, True), Config(128, 64, 8, 2, True)),
}
CONFIGS = {
    "forward": (Config(128, 64, 8, 3, False), Config(64, 32, 4, 3, False)),
    "dq": (Config(128, 64, 8, 3, False), Config(128, 32, 8, 3, False)),
    "dkdv": (Config(128, 32, 8, 3, False), Config(64, 32, 8, 3, False)),
}
FP32_CONFIG = Config(32, 32, 8, 1, False)  # no tensor cores: for small models and tests
INTERPRETER_CONFIG = TMA_CONFIGS["forward"][1]


def config(kernel: str, dtype: torch.dtype, head_dim: int, capability: int) -> Config:
    """capability: 10 * major + minor of a device of sm_80 or later."""
    if dtype == torch.float32:
        return FP32_CONFIG
    # sm_120 has TMA, but the shared memory and the MMA of sm_86.
    configs = TMA_CONFIGS if 90 <= capability < 120 else CONFIGS
    return configs[kernel][head_dim > 64]


def constants(config: Config, head_dim: int, group: int) -> dict[str, int]:
    """The compile-time arguments and options of a kernel."""
    shape = {"GROUP": group, "D": head_dim, "DP": _padded(head_dim), "TMA": config.tma}
    tiles = {"TILE": TILE, "MASKED_TILE": MASKED_TILE, "OWN": config.own, "STEP": config.step}
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
    return shape | tiles | options


def _padded(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))


def _config(kernel: str, x: Tensor) -> Config:
    if not x.is_cuda:
        return INTERPRETER_CONFIG
    major, minor = torch.cuda.get_device_capability(x.device)
    return config(kernel, x.dtype, x.shape[2], 10 * major + minor)


def _aligned(x: Tensor) -> Tensor:
    """x, copied if a descriptor cannot address it: unit stride last, the others positive multiples of 16 bytes."""
    strides = [stride * x.element_size() for stride in x.stride()[:2]]
    if x.stride(2) == 1 and x.data_ptr() % 16 == 0 and all(s > 0 and s % 16 == 0 for s in strides):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _input(x: Tensor, tokens: int, tma: bool) -> TensorDescriptor | tuple[Tensor, int, int]:
    """x [T, H, D] as `_load_rows` takes it."""
    if not tma:
        return x, x.stride(0), x.stride(1)
    x = x.transpose(0, 1)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, tokens, _padded(x.shape[2])])


def _launch(
    name: str,
    own: list[Tensor],
    streamed: list[Tensor],
    work: list[Tensor],
    subtree_end: Tensor,
    group: int,
    *rest: Any,
) -> None:
    """Runs a kernel of KERNELS with one program an item, part of its tile, and head of the `own` tensors."""
    T, heads, D = own[0].shape
    cfg = _config(name, own[0])
    inputs = [_input(x, cfg.own, cfg.tma) for x in own] + [_input(x, cfg.step, cfg.tma) for x in streamed]
    grid = (len(work[0]) * (TILE // cfg.own) * heads,)
    with torch.cuda.device_of(own[0]):
        KERNELS[name][grid](*inputs, *work, subtree_end, T, heads, *rest, **constants(cfg, D, group))


# ---- operators


@torch.library.custom_op("cipo_kernels::tree_attention", mutates_args=())
def attention_op(
    q: Tensor, k: Tensor, v: Tensor, subtree_end: Tensor, work: list[Tensor], scale: float
) -> tuple[Tensor, Tensor]:
    """(o [T, Hq, D], lse [Hq, T] fp32 in nats). subtree_end [T]: of each token; work: TreeWork.tensors()."""
    q, k, v = map(_aligned, (q, k, v))
    T, Hq, _ = q.shape
    o, lse = q.new_empty(q.shape), q.new_empty(Hq, T, dtype=torch.float32)
    group = Hq // k.shape[1]
    _launch("forward", [q], [k, v], work[:3], subtree_end, group, o, lse, scale * LOG2_E.value)
    return o, lse


@attention_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, subtree_end: Tensor, work: list[Tensor], scale: float) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@torch.library.custom_op("cipo_kernels::tree_attention_backward", mutates_args=())
def attention_backward_op(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    subtree_end: Tensor,
    work: list[Tensor],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of `attention_op`, contiguous, in q's dtype."""
    do, q, k, v = map(_aligned, (do, q, k, v))
    Hq, Hkv, D = q.shape[1], k.shape[1], k.shape[2]
    dq, dk, dv, delta = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), torch.empty_like(lse)
    by_query, by_key, slots = work[:3], work[3:6], work[6]
    n_slots = len(slots)
    partial = lse.new_empty(2, n_slots, TILE, Hkv, D)
    group, scale2 = Hq // Hkv, scale * LOG2_E.value
    _launch("dq", [q, o, do], [k, v], by_query, subtree_end, group, lse, delta, dq, scale, scale2)
    results = dk, dv, partial, n_slots
    _launch("dkdv", [k, v], [q, do], by_key, subtree_end, group, lse, delta, *results, scale, scale2)
    if n_slots:
        grid = (n_slots, triton.cdiv(TILE * Hkv * D, ADD_BLOCK), 2)
        with torch.cuda.device_of(q):
            _add_partials_kernel[grid](partial, dk, dv, slots, n_slots, Hkv * D, TILE, ADD_BLOCK)
    return dq, dk, dv


@attention_backward_op.register_fake
def _(do: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, work, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output, *work)


def _backward(ctx: Any, do: Tensor, _: Tensor) -> tuple[Any, ...]:
    refuse_create_graph("tree_attention")
    q, k, v, subtree_end, o, lse, *work = ctx.saved_tensors
    grads = attention_backward_op(do, q, k, v, o, lse, subtree_end, work, ctx.scale)
    return *grads, None, [None] * len(work), None


attention_op.register_autograd(_backward, setup_context=_setup_context)


def tree_attention_triton(q: Tensor, k: Tensor, v: Tensor, tree: TreeLayout, *, scale: float | None = None) -> Tensor:
    """Arguments as `tree_attention`. Raises ValueError for what the kernels do not take.

    Under torch.compile(fullgraph=True), `tree.attention_work` must exist before the compiled call.
    """
    D = q.shape[2]
    scale = D**-0.5 if scale is None else scale
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"q {q.dtype}, k {k.dtype}, v {v.dtype}: expected one of float32, bfloat16 and float16 for all"
        )
    if D % 8 or D > MAX_HEAD_DIM:
        raise ValueError(f"head_dim {D}: the Triton kernels take multiples of 8 up to {MAX_HEAD_DIM}")
    if scale <= 0:
        raise ValueError(f"scale {scale}: the Triton kernels take positive ones")
    if q.dtype == torch.bfloat16 and not q.is_cuda:
        raise ValueError("bfloat16 on CPU: Triton's interpreter multiplies its bit patterns; use float32 or float16")
    return attention_op(q, k, v, tree.subtree_end_of_token, tree.attention_work, scale)[0]
