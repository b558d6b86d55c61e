"""What a model computes with, parameter by parameter, as two numbers each: y = W x for a fixed x, then <u, y> and |y|.

Engines fuse, transpose, pad and prepack their weights, so there is often nothing left to compare with the trainer's
tensors. What a layer does to a fixed input is the same however it is stored. Ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class Fingerprint(NamedTuple):
    along: float  # <u, y>
    norm: float  # |y|


def fixed_vector(n: int, like: Tensor) -> Tensor:
    """The same n normal numbers every time and everywhere, on the device and of the type of `like`."""
    return torch.randn(n, generator=torch.Generator().manual_seed(n)).to(like.device, like.dtype)


def of_output(y: Tensor) -> Fingerprint:
    """Of y [n], which is W x, or a parameter that is a vector."""
    y = y.detach().double()
    return Fingerprint((fixed_vector(len(y), y) @ y).item(), y.norm().item())


def of_parameter(parameter: Tensor) -> Fingerprint:
    """Of W [out, in], or of a vector."""
    w = parameter.detach()
    return of_output(w if w.dim() == 1 else w.flatten(1) @ fixed_vector(w.flatten(1).shape[1], w))


def differing(
    trainer: Iterable[tuple[str, Fingerprint]], engine: Mapping[str, Fingerprint], tolerance: float
) -> list[tuple[str, float]]:
    """(name, difference relative to |y|) of the parameters that are not the same, worst first. A parameter that the
    engine has no fingerprint of is left out."""
    found = []
    for name, (along, norm) in trainer:
        if name in engine:
            other = engine[name]
            difference = max(abs(along - other.along), abs(norm - other.norm)) / (norm or 1.0)
            if not difference <= tolerance:
                found.append((name, difference))
    return sorted(found, key=lambda item: -item[1])
