"""What a task is made of, and which file has it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cipo_fast.errors import UserError

Pair = tuple[str, str]  # (question, one right answer)
Make = Callable[[np.random.Generator, int], Pair]
DRAWS = 4  # times n, at most: `add` has but 8,100 sums
NearMiss = Callable[[str, str, np.random.Generator], str]


@dataclass(frozen=True)
class Start:
    """How far the supervised first steps go, and what they show; model.embedded.warm_* says what each is."""

    accuracy: float = 0.42
    kept: float = 0.0
    mended: float = 0.0
    steps: int = 600
    plain: float = 0.25
    right: float = 0.25
    own: float = 0.0


@dataclass(frozen=True)
class Task:
    """`make(rng, size)` is one problem; `near_miss(question, answer, rng)` a wrong answer such as a half-trained model
    gives, seldom a right one. `verifier` is a function of verifiers.py where there are many right answers."""

    make: Make
    near_miss: NearMiss
    size: int
    sizes: range  # of which there are enough problems, and short enough ones
    verifier: str | None = None
    start: Start = Start()

    def pairs(self, rng: np.random.Generator, n: int, size: int | None) -> list[Pair]:
        """`n` problems with different questions, fewer where there are hardly more. Raises UserError for a size that
        the task has not."""
        size = self.size if size is None else size
        if size not in self.sizes:
            raise UserError(f"data.task_size={size}: this task has {self.sizes[0]} to {self.sizes[-1]}")
        found: dict[str, str] = {}
        for _ in range(DRAWS * n):
            question, answer = self.make(rng, size)
            found.setdefault(question, answer)
            if len(found) == n:
                break
        return list(found.items())


def task_named(name: str) -> Task:
    """The task of a file beside this one."""
    task: Task = importlib.import_module(f"cipo_fast.embedded.tasks.{name}").TASK
    return task
