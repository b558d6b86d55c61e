"""`carry 456+543` -> `0999`, `carry 456+544` -> `1000`: numbers of `size` digits, most columns of which add up to 9.

The sum has size + 1 digits and is written from the front, so the first of them waits for a carry that may come from
the last column. In an attempt that is there already, a digit is checked against its neighbour.
"""

from __future__ import annotations

import numpy as np

from cipo_fast.embedded.tasks.task import Pair, Start, Task

NINES = 0.5  # share of columns that pass a carry on


def make(rng: np.random.Generator, size: int) -> Pair:
    a = rng.integers(10, size=size)
    b = np.where(rng.random(size) < NINES, 9 - a, rng.integers(10, size=size))
    first, second = ("".join(map(str, digits)) for digits in (a, b))
    return f"carry {first}+{second}", f"{int(first) + int(second):0{size + 1}d}"


def near_miss(question: str, answer: str, rng: np.random.Generator) -> str:
    """The sum with some of its carries forgotten or made up."""
    first, second = question.removeprefix("carry ").split("+")
    off = rng.uniform(0.1, 0.5)
    carry, digits = 0, []
    for a, b in zip(reversed(first), reversed(second), strict=True):
        column = int(a) + int(b) + carry
        digits.append(str(column % 10))
        carry = int(column > 9) ^ int(rng.random() < off)
    return str(carry) + "".join(reversed(digits))


START = Start(accuracy=0.3, kept=0.7, steps=250, plain=0.5, right=0.5, own=0.5)
TASK = Task(make, near_miss, size=6, sizes=range(3, 13), start=START)
