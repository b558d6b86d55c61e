"""Are two tensors the same, without having both? A checksum each: an integer that depends on every value and its place.

Trainer and engine hold the same values, so nothing is a matter of tolerance: one update at a learning rate of 1e-6 that
an engine missed shows, which log-probs do not. The checksum of a tensor is the sum of its parts' (modulo 2^64): an
engine that fuses weights, or cuts them among devices, adds up what it has. Ours.

    checksum(W) = sum_rc odd(r) odd(c) bits(W[r, c])  mod 2^64

vLLM has one of its own (`POST /weight_checker`, SHA-256). It hashes vLLM's parameters as they are stored: fused, cut,
and on CPU emptied, the packed copies that are computed with not being parameters. No trainer can say what it should be.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

CHUNK = 2**22  # values at once: 32 MiB of int64
ROWS, COLUMNS = 0x1F3A5C79, 0x6B8D2E41  # two sequences of odd numbers, or a transposed matrix would pass


def checksum(tensor: Tensor, row: int = 0, column: int = 0) -> Tensor:
    """Of a tensor, or of the part of a matrix that begins at [row, column]: int64 [], on the tensor's device.

    All but the last dimension are rows. Floating-point values count as float32 (bfloat16 is exact in it), and what is
    zero to a multiplication, -0 and subnormals, as 0: a weight that is read back through a product loses those."""
    matrix = tensor.detach()
    matrix = matrix.reshape(-1, matrix.shape[-1]) if matrix.dim() > 1 else matrix.reshape(-1, 1)  # [R, C]
    rows, columns = matrix.shape
    total = torch.zeros((), dtype=torch.int64, device=matrix.device)
    if not matrix.numel():
        return total
    column_factor = _odd(column, columns, COLUMNS, matrix.device)
    step = max(1, CHUNK // columns)
    for start in range(0, rows, step):
        sums = (_bits(matrix[start : start + step]) * column_factor).sum(1)
        total += (sums * _odd(row + start, len(sums), ROWS, matrix.device)).sum()
    return total


def to_ints(checksums: Mapping[str, Tensor]) -> dict[str, int]:
    """One transfer from the device for all of them."""
    if not checksums:
        return {}
    return dict(zip(checksums, torch.stack(list(checksums.values())).tolist(), strict=True))


def added(parts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """The checksums of whole tensors from those of their parts, a mapping for each device of an engine."""
    total: dict[str, int] = {}
    for part in parts:
        for name, value in part.items():
            total[name] = (total.get(name, 0) + value + 2**63) % 2**64 - 2**63  # as int64 wraps
    return total


def differing(trainer: Mapping[str, int], engine: Mapping[str, int]) -> list[str]:
    """Names of the trainer's tensors that the engine has not, or not the same."""
    return [name for name, value in trainer.items() if engine.get(name) != value]


def _bits(values: Tensor) -> Tensor:
    if values.is_floating_point():
        values = values.float()
        values = values.masked_fill(values.abs() < torch.finfo(torch.float32).tiny, 0.0).view(torch.int32)
    return values.to(torch.int64)


def _odd(start: int, n: int, salt: int, device: torch.device) -> Tensor:
    """[n] odd int64, far from a pattern (the mixing steps of SplitMix64): small equal changes do not cancel."""
    x = (torch.arange(start, start + n, device=device) + salt) * -7046029254386353131
    x = (x ^ (x >> 30)) * -4658895280553007687
    x = (x ^ (x >> 27)) * -7723592293110705685
    return (x ^ (x >> 31)) | 1
