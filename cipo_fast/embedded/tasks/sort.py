"""`sort qzkabfpm` -> `abfkmpqz`: `size` letters drawn with replacement."""

from __future__ import annotations

import string

import numpy as np

from cipo_fast.embedded.tasks.edits import edited
from cipo_fast.embedded.tasks.task import Pair, Task

LETTERS = np.array(list(string.ascii_lowercase))


def make(rng: np.random.Generator, size: int) -> Pair:
    word = "".join(rng.choice(LETTERS, size))
    return f"sort {word}", "".join(sorted(word))


TASK = Task(make, edited, size=8, sizes=range(4, 27))
