"""`trace 3b12c103` -> `2 31202332`: a tiny program, what its register holds at the end, and then its trace.

A digit adds to the register modulo 4, a letter sets it (a: 0, b: 1, ...). The answer comes first and its working after
it. One pass of a shallow model knows the answer when a letter stands near the end, and guesses when many additions
follow it; the trace goes from one total to the next. So an attempt is the serial computation that the layers lack:
whoever checks it reads the answer off its last character. `size` is the length of the program.
"""

from __future__ import annotations

import numpy as np

from cipo_fast.embedded.tasks.task import Pair, Start, Task

BASE = 4
LETTERS = "abcd"
LETTER_SHARE = 0.3


def make(rng: np.random.Generator, size: int) -> Pair:
    sets, operands = rng.random(size) < LETTER_SHARE, rng.integers(BASE, size=size).tolist()
    program = "".join(LETTERS[n] if is_set else str(n) for is_set, n in zip(sets, operands, strict=True))
    trace = run(program)
    return f"trace {program}", f"{trace[-1]} {trace}"


def run(program: str) -> str:
    """The register after each step, 0 before the first."""
    register, trace = 0, ""
    for step in program:
        register = LETTERS.index(step) if step in LETTERS else (register + int(step)) % BASE
        trace += str(register)
    return trace


def near_miss(question: str, answer: str, rng: np.random.Generator) -> str:
    """The right trace after a wrong answer."""
    wrong = (int(answer[0]) + int(rng.integers(1, BASE))) % BASE
    return f"{wrong}{answer[1:]}"


START = Start(accuracy=0.3, mended=0.3, steps=300, plain=0.8, right=0.5, own=0.5)
TASK = Task(make, near_miss, size=8, sizes=range(6, 10), start=START)
