"""What callers of the head pass: checked, and cast."""

from typing import Literal

import torch
from torch import Tensor


def autocast_operands(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both in autocast's dtype where that is on, as F.linear has them (fp64 stays); it does not know our operators."""
    device = hidden.device.type
    if not torch.is_autocast_enabled(device):
        return hidden, weight
    dtype = torch.get_autocast_dtype(device)
    h, w = (x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in (hidden, weight))
    return h, w


def per_target(temperature: float | Tensor, pred_index: Tensor) -> Tensor | None:
    """The temperature as [N], None for 1."""
    if isinstance(temperature, Tensor):
        return temperature
    n = pred_index.shape
    return None if temperature == 1.0 else torch.full(n, temperature, dtype=torch.float64, device=pred_index.device)


def check_chunk_targets(chunk_targets: int | Literal["auto"]) -> int | None:
    """None for "auto": the head's own choice."""
    if chunk_targets == "auto":
        return None
    if not isinstance(chunk_targets, int) or chunk_targets < 1:
        raise ValueError(f'chunk_targets={chunk_targets!r}: expected "auto" or a positive integer')
    return chunk_targets


def check_inputs(
    hidden: Tensor,
    weight: Tensor,
    pred_index: Tensor,
    target_id: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
) -> None:
    """ValueError, one sentence, for what the head cannot take. Values on the device are not looked at: no sync."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {list(hidden.shape)} and weight {list(weight.shape)}: expected [T, H] and [V, H]")
    if not (hidden.is_floating_point() and weight.is_floating_point()):
        raise ValueError(f"hidden is {hidden.dtype} and weight {weight.dtype}: both must be floating point")
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype} and weight {weight.dtype}: cast one of them to the other's dtype")
    if hidden.dtype == torch.float16:
        raise ValueError("hidden and weight are torch.float16, in which small gradients are 0: expected bfloat16")
    n, vocab = pred_index.shape[:1], weight.shape[:1]
    for name, index in (("pred_index", pred_index), ("target_id", target_id)):
        if index.shape != n or index.dim() != 1 or index.dtype != torch.int64:
            raise ValueError(f"{name} is {index.dtype} {list(index.shape)}: expected int64 [N], one per target")
    if bias is not None and bias.shape != vocab:
        raise ValueError(f"bias is {list(bias.shape)}: expected [V] = {list(vocab)}")
    if isinstance(temperature, Tensor):
        if temperature.shape != n:
            raise ValueError(f"temperature is {list(temperature.shape)}: expected a number or [N] = {list(n)}")
    elif not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be positive")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap={softcap}: must be positive, or None for no softcap")
