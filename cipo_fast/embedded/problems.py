"""The embedded tasks: problems made by seed, answers known, nothing to download."""

from __future__ import annotations

import string

import numpy as np

from cipo_fast.records import Problem

TRAIN_SIZE = 8_000
SORT_LETTERS = 8


def embedded_problems(task: str, seed: int, n_held_out: int) -> tuple[list[Problem], list[Problem]]:
    """(train, held out) problems of `sort` or `add`, all different from each other."""
    rng = np.random.default_rng([seed, 0])
    if task == "sort":
        pairs = _sort_pairs(rng, TRAIN_SIZE + n_held_out)
    else:
        pairs = _add_pairs(rng)
        n_held_out = min(n_held_out, len(pairs) // 2)
    problems = [_problem(task, i, question, answer) for i, (question, answer) in enumerate(pairs)]
    return problems[n_held_out:], problems[:n_held_out]


def _sort_pairs(rng: np.random.Generator, n: int) -> list[tuple[str, str]]:
    """`sort qzkabfpm` -> `abfkmpqz`: letters drawn with replacement."""
    letters = np.array(list(string.ascii_lowercase))
    words: dict[str, None] = {}
    while len(words) < n:
        words["".join(rng.choice(letters, SORT_LETTERS))] = None
    return [(f"sort {word}", "".join(sorted(word))) for word in words]


def _add_pairs(rng: np.random.Generator) -> list[tuple[str, str]]:
    """`add 12+34` -> `46`: all 8,100 sums of two 2-digit numbers, shuffled."""
    return [
        (f"add {a}+{b}", str(a + b))
        for a, b in (divmod(int(i), 90) for i in rng.permutation(8100))
        for a, b in [(a + 10, b + 10)]
    ]


def _problem(task: str, i: int, question: str, answer: str) -> Problem:
    return Problem(f"{task}-{i}", ({"role": "user", "content": question},), answer, task)
