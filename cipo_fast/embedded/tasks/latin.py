"""`latin 1.3. .4.2 ...`: a 4x4 Latin square with `size` blanks; the answer has their digits, in reading order.

There may be several right answers, and verifiers.py judges. What is wrong is local: a digit twice in a row or a column.
"""

from __future__ import annotations

import functools
import itertools

import numpy as np

from cipo_fast.embedded.tasks.task import Pair, Start, Task
from cipo_fast.embedded.verifiers import SIDE


@functools.cache
def squares() -> list[str]:
    """All 576, 16 digits in reading order."""
    rows = ["".join(row) for row in itertools.permutations("1234")]
    found = [""]
    for _ in range(SIDE):
        found = [
            square + row
            for square in found
            for row in rows
            if all(digit not in square[i::SIDE] for i, digit in enumerate(row))
        ]
    return found


def make(rng: np.random.Generator, size: int) -> Pair:
    full = squares()[rng.integers(len(squares()))]
    blank = sorted(rng.permutation(SIDE * SIDE)[:size].tolist())
    shown = "".join("." if i in blank else digit for i, digit in enumerate(full))
    rows = " ".join(shown[i : i + SIDE] for i in range(0, SIDE * SIDE, SIDE))
    return f"latin {rows}", "".join(full[i] for i in blank)


def near_miss(question: str, answer: str, rng: np.random.Generator) -> str:
    """One to three of the digits drawn anew."""
    digits = list(answer)
    for place in rng.permutation(len(digits))[: rng.integers(1, 4)]:
        digits[place] = str(rng.integers(1, SIDE + 1))
    return "".join(digits)


START = Start(accuracy=0.3, kept=0.7, steps=200, plain=0.5, right=0.5, own=0.5)
TASK = Task(make, near_miss, size=8, sizes=range(5, 12), verifier="latin", start=START)
