"""`subset 3519274 14` -> `392`: 3 of `size` different digits with a given sum, in any order.

There are several right answers, and verifiers.py judges. A near miss is off by a residual: exchange one term.
"""

from __future__ import annotations

import numpy as np

from cipo_fast.embedded.tasks.task import Pair, Start, Task
from cipo_fast.embedded.verifiers import CHOSEN


def make(rng: np.random.Generator, size: int) -> Pair:
    digits = rng.permutation(10)[:size]
    chosen = rng.choice(digits, CHOSEN, replace=False)
    return f"subset {''.join(map(str, digits))} {chosen.sum()}", "".join(map(str, chosen))


def near_miss(question: str, answer: str, rng: np.random.Generator) -> str:
    """One term exchanged for a digit that is not in the answer."""
    others = [c for c in question.split(" ")[1] if c not in answer]
    place = rng.integers(CHOSEN)
    return answer[:place] + others[rng.integers(len(others))] + answer[place + 1 :]


START = Start(accuracy=0.3, kept=0.8, steps=450, plain=0.5, right=0.5, own=0.5)
TASK = Task(make, near_miss, size=7, sizes=range(6, 10), verifier="subset", start=START)
