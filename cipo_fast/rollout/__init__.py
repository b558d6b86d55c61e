"""Where answers are sampled. An engine holds its own copy of the weights, and knows nothing of rewards or losses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from cipo_fast.records import Completion


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; its log-probs are taken at temperature 1."""

    temperature: float
    top_p: float
    max_tokens: int


@dataclass(frozen=True)
class SyncReport:
    version: int
    parameters: int
    bytes: int
    seconds: float


class Engine(Protocol):
    policy_version: int

    def generate(self, prompts: Sequence[list[int]], n: int, sampling: Sampling, seed: int) -> list[list[Completion]]:
        """`n` completions of each prompt (token ids), in the prompts' order; the same seed gives the same ones."""
        ...

    def sync(self, weights: Iterable[tuple[str, Tensor]], version: int) -> SyncReport:
        """Take over the trainer's weights, all of them: a missing or unknown name is a RuntimeError."""
        ...
