"""`shoot 12012201 2` -> `202202112`: values modulo 3 whose differences are 1, 2, 0, 1, ... and whose last is 2.

A boundary value problem, solved by shooting: every value follows from the one before it, but the first takes the sum of
all differences. A path from a wrong first value misses the last by just what the first is off, so an attempt is checked
at one place and mended by one subtraction. `size` is the number of differences.
"""

from __future__ import annotations

import numpy as np

from cipo_fast.embedded.tasks.task import Pair, Start, Task

BASE = 3


def make(rng: np.random.Generator, size: int) -> Pair:
    steps = rng.integers(BASE, size=size)
    first = int(rng.integers(BASE))
    values = path(first, steps.tolist())
    return f"shoot {''.join(map(str, steps))} {values[-1]}", values


def path(first: int, steps: list[int]) -> str:
    """All values from the first on."""
    return "".join(str(value % BASE) for value in np.cumsum([first, *steps]).tolist())


def near_miss(question: str, answer: str, rng: np.random.Generator) -> str:
    """The path from another first value."""
    steps = [int(c) for c in question.split(" ")[1]]
    return path(int(answer[0]) + int(rng.integers(1, BASE)), steps)


START = Start(accuracy=0.3, steps=400, plain=0.4, right=0.35, own=0.5)
TASK = Task(make, near_miss, size=8, sizes=range(8, 11), start=START)
