"""Tree attention in Triton: which configuration a kernel runs with, its launch, and the operators that torch sees.

The kernels are in forward.py and backward.py. A program owns rows of a tile, keys of one head or queries of the heads
that share one, and streams what worklist.py lists for it: full tiles, where nothing is masked, then masked ones. There
are no atomics: every sum has a fixed order, so results are bitwise reproducible. The schedule is ours; rows of several
heads are FlashAttention-3's pack_gqa.

What a query does not see has no weight in its sums: masked scores are replaced. A nan or inf of a tile may still reach
other queries of that tile, as 0 times it is nan; an update with one is dropped whole.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..autograd import refuse_create_graph
from ..launch_configs import launch_config
from .backward import add_partials_kernel, dkdv_kernel, dq_kernel
from .forward import forward_kernel
from .layout import TreeLayout
from .tiles import LOG2_E
from .worklist import OWN_TILE, TILE, TileWork, TreeWork

MAX_HEAD_DIM = 128
ADD_BLOCK = 4096
KERNELS = {"forward": forward_kernel, "dq": dq_kernel, "dkdv": dkdv_kernel}

# ---- launches


class Config(NamedTuple):
    own: int  # rows of a program: keys, or queries of all heads that share a key head
    step: int  # tokens of a streamed step
    num_warps: int
    num_stages: int  # num_stages - 1 steps' tiles are under way
    tma: bool


# By kernel, then for head dims up to 64 and up to 128. From what compiles without spilling, not from timings.
TMA_CONFIGS = {
    "forward": (Config(128, 64, 8, 3, True), Config(128, 64, 8, 3, True)),
    "dq": (Config(128, 64, 8, 3, True), Config(128, 64, 8, 3, True)),
    "dkdv": (Config(128, 64, 8, 3, True), Config(128, 32, 8, 3, True)),
}
CONFIGS = {
    "forward": (Config(128, 64, 8, 3, False), Config(64, 32, 4, 2, False)),
    "dq": (Config(128, 64, 8, 3, False), Config(128, 32, 8, 2, False)),
    "dkdv": (Config(128, 32, 8, 2, False), Config(64, 32, 8, 2, False)),
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


def few_keys(config: Config) -> Config:
    """For items of at most TILE tokens: no larger a tile, and as much work a warp."""
    own = min(config.own, TILE)
    return config._replace(own=own, num_warps=max(1, config.num_warps * own // config.own))


def constants(config: Config, head_dim: int, group: int, own_tile: int) -> dict[str, int]:
    """The compile-time arguments and options of a kernel; own_tile: of the items, at most."""
    shape = {"GROUP": group, "D": head_dim, "DP": _padded(head_dim), "TMA": config.tma}
    tiles = {"OWN_TILE": own_tile, "TILE": TILE, "OWN": config.own, "STEP": config.step}
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
    return shape | tiles | options


def _padded(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))


def config_name(kernel: str, head_dim: int) -> str:
    """In launch_configs.json."""
    return f"tree_attention_{kernel}_d{128 if head_dim > 64 else 64}"


def _config(kernel: str, x: Tensor) -> Config:
    default = INTERPRETER_CONFIG
    if x.is_cuda:
        major, minor = torch.cuda.get_device_capability(x.device)
        default = config(kernel, x.dtype, x.shape[2], 10 * major + minor)
    if x.dtype == torch.float32:
        return default
    name = config_name(kernel, x.shape[2])
    found = launch_config(name, default, x.device)
    if OWN_TILE % found.own or TILE % found.step:
        raise ValueError(f"{name}: {found}: own has to divide {OWN_TILE}, and step {TILE}")
    return found


def _aligned(x: Tensor) -> Tensor:
    """x, copied if a descriptor cannot address it: unit stride last, the others positive multiples of 16 bytes."""
    strides = [stride * x.element_size() for stride in x.stride()[:2]]
    if x.stride(2) == 1 and x.data_ptr() % 16 == 0 and all(s > 0 and s % 16 == 0 for s in strides):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _input(x: Tensor, tokens: int, tma: bool) -> TensorDescriptor | tuple[Tensor, int, int]:
    """x [T, H, D] as the kernels' `load_rows` and, without TMA, `load_queries` take it."""
    if not tma:
        return x, x.stride(0), x.stride(1)
    x = x.transpose(0, 1)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, tokens, _padded(x.shape[2])])


def _launch(
    name: str,
    own: dict[str, Tensor],
    streamed: dict[str, Tensor],
    work: TileWork,
    group: int,
    own_tile: int,
    **rest: Any,
) -> None:
    """Runs a kernel of KERNELS: a program has Config.own rows of an item's tile."""
    first = next(iter(own.values()))
    T, H, D = first.shape
    cfg = _config(name, first)
    cfg = few_keys(cfg) if own_tile == TILE else cfg
    by_key = name == "dkdv"  # rows of queries are no block of a descriptor, whose sizes are powers of two
    inputs = {argument: _input(x, cfg.own, cfg.tma and by_key) for argument, x in own.items()}
    inputs |= {argument: _input(x, cfg.step, cfg.tma) for argument, x in streamed.items()}
    lists = {"items": work.item, "full": work.full, "masked": work.masked}
    grid = (len(work.item) * (own_tile // cfg.own) * H,)
    with torch.cuda.device_of(first):
        KERNELS[name][grid](**inputs, **lists, T=T, H=H, **rest, **constants(cfg, D, group, own_tile))


# ---- operators


@torch.library.custom_op("cipo_kernels::tree_attention", mutates_args=())
def attention_op(
    q: Tensor, k: Tensor, v: Tensor, subtree_end: Tensor, work: list[Tensor], scale: float
) -> tuple[Tensor, Tensor]:
    """(o [T, Hq, D], lse [Hq, T] fp32 in nats). subtree_end [T]: of each token; work: TreeWork.tensors()."""
    q, k, v = map(_aligned, (q, k, v))
    T, Hq, _ = q.shape
    o, lse = q.new_empty(q.shape), q.new_empty(Hq, T, dtype=torch.float32)
    results = {"o": o, "lse": lse}
    by_query, group = TreeWork.of(work).by_query, Hq // k.shape[1]
    rest = {"subtree_end": subtree_end, "scale2": scale * LOG2_E.value}
    _launch("forward", {"q": q}, {"k": k, "v": v}, by_query, group, OWN_TILE, **results, **rest)
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
    by_query, by_key, by_few_keys, slots = TreeWork.of(work)
    n_slots, group = len(slots), Hq // Hkv
    partial = lse.new_empty(2, n_slots, OWN_TILE, Hkv, D)
    rest = {"subtree_end": subtree_end, "lse": lse, "delta": delta, "scale": scale, "scale2": scale * LOG2_E.value}
    _launch("dq", {"q": q, "o": o, "do": do}, {"k": k, "v": v}, by_query, group, OWN_TILE, dq=dq, **rest)
    results = {"dk": dk, "dv": dv, "partial": partial, "n_slots": n_slots}
    for items, own_tile in ((by_key.item, OWN_TILE), (by_few_keys, TILE)):
        if len(items):
            tiles = by_key._replace(item=items)
            _launch("dkdv", {"k": k, "v": v}, {"q": q, "do": do}, tiles, group, own_tile, **results, **rest)
    if n_slots:
        grid = (n_slots, triton.cdiv(OWN_TILE * Hkv * D, ADD_BLOCK), 2)
        with torch.cuda.device_of(q):
            add_partials_kernel[grid](**results, slots=slots, row_size=Hkv * D, BLOCK=ADD_BLOCK)
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

    Under torch.compile(fullgraph=True), `tree.prepare("triton")` must come before the compiled call.
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
