"""`add 12+34` -> `46`: two numbers of `size` digits."""

from __future__ import annotations

import numpy as np

from cipo_fast.embedded.tasks.edits import edited
from cipo_fast.embedded.tasks.task import Pair, Task


def make(rng: np.random.Generator, size: int) -> Pair:
    a, b = rng.integers(10 ** (size - 1), 10**size, size=2)
    return f"add {a}+{b}", str(a + b)


TASK = Task(make, edited, size=2, sizes=range(2, 13))
