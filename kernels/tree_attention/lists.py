"""A layout's work lists in one tensor, so that a single copy brings them to a device."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor

ALIGNMENT = 4  # int32: Triton compiles a kernel anew for pointers that are not multiples of 16 bytes


class WorkLists(NamedTuple):
    """`tensors` are views of `buffer`, followed by those that the host reads and that stay with it."""

    buffer: Tensor  # int32
    shapes: tuple[torch.Size, ...]
    on_host: tuple[Tensor, ...]
    tensors: list[Tensor]

    @classmethod
    def of(cls, tensors: Sequence[Tensor], on_host: tuple[Tensor, ...] = ()) -> Self:
        """Of integer tensors on the CPU, whose values int32 holds."""
        shapes = tuple(x.shape for x in tensors)
        lists = cls._of(torch.zeros(sum(map(_room, shapes)), dtype=torch.int32), shapes, on_host)
        for view, x in zip(lists.tensors, tensors, strict=False):
            view.copy_(x)
        return lists

    @classmethod
    def _of(cls, buffer: Tensor, shapes: tuple[torch.Size, ...], on_host: tuple[Tensor, ...]) -> Self:
        parts = buffer.split([_room(shape) for shape in shapes])
        views = [part[: shape.numel()].view(shape) for part, shape in zip(parts, shapes, strict=True)]
        return cls(buffer, shapes, on_host, [*views, *on_host])

    def map(self, f: Callable[[Tensor], Tensor]) -> Self:
        """These lists after `f`, which moves a tensor."""
        return self._of(f(self.buffer), self.shapes, self.on_host)


def _room(shape: torch.Size) -> int:
    return -(-shape.numel() // ALIGNMENT) * ALIGNMENT
