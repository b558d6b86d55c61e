"""Where answers are sampled. An engine holds its own copy of the weights, and knows nothing of rewards or losses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from cipo_fast.errors import EngineFailure as EngineFailure
from cipo_fast.records import Completion

# (index of the prompt, token ids of one of its answers that has come to its end): called while others are still
# sampled, from any thread. An engine that is asked again after a failure may call it for other ids.
Finished = Callable[[int, list[int]], None]


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
    """Every rank has one and calls the same methods in the same order. Engines fail each for itself, and say so with
    EngineFailure where a fresh engine could do better; `supervised.py` makes the ranks agree, and repairs."""

    @property
    def policy_version(self) -> int:
        """Of the weights it samples with; -1 before the first sync."""
        ...

    @property
    def max_model_len(self) -> int | None:
        """Longest prompt and answer together; None without a limit."""
        ...

    def generate(
        self,
        prompts: Sequence[list[int]],
        n: int,
        sampling: Sampling,
        seed: int,
        finished: Finished | None = None,
    ) -> list[list[Completion]]:
        """`n` completions of each prompt (token ids), in the prompts' order; the same seed gives the same ones.

        Answers are cut at max_model_len. `finished` hears of those that are not cut as they come. Raises
        EngineFailure."""
        ...

    def sync(self, weights: Iterable[tuple[str, Tensor]], version: int) -> SyncReport:
        """Take over the trainer's weights, all of them, and forget the prefix cache. Every rank calls it, and iterates.

        A missing or unknown name is a RuntimeError. Interrupted half-way, it leaves an engine that refuses to generate.
        Raises EngineFailure."""
        ...

    def score(self, sequences: Sequence[list[int]]) -> list[list[float]]:
        """Log-probs at temperature 1 of every token but the first, given those before it. Raises EngineFailure."""
        ...

    def checksums(self) -> dict[str, int]:
        """Of what the engine computes with (checksums.py), by the trainer's names, tied ones under each of theirs.
        Raises EngineFailure."""
        ...

    def release(self) -> None:
        """Give the device's memory to the trainer, until the next sync."""
        ...

    def restart(self) -> None:
        """After an EngineFailure: a fresh engine, without weights. Raises EngineFailure when it did not come up, and
        TrainingStopped when it cannot be had."""
        ...

    def prefix_cache(self) -> tuple[int, int] | None:
        """(prompt tokens looked up, of them found) since its start; (0, 0) without a cache, None when not known. Raises
        nothing: a metric ends no run."""
        ...

    def close(self) -> None: ...
