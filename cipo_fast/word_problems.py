"""Arithmetic word problems made by seed, as JSON Lines: small enough for a model that two CPU cores can train.

    python -m cipo_fast.word_problems --out problems.jsonl [--n 2000] [--seed 0]

A row is {"id", "prompt", "answer", "source"}: one or two operations on small numbers, the answer a whole number above
0. All questions differ, and files of other seeds have others with few in common: `data.eval` beside `data.train` is
compared with it anyway. `source` names the kind, for figures of each.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from cipo_fast.errors import UserError, command, put

NAMES = ("Anna", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Henry", "Iris", "Jack", "Lena", "Omar")
THINGS = ("apples", "books", "cards", "coins", "cookies", "eggs", "flowers", "marbles", "pencils", "shells", "stamps")
HOLDERS = ("bags", "boxes", "baskets", "jars")
MOST = 20_000  # of the problems there are, what a file may hold

Draw = Callable[[int, int], int]  # a whole number from the first to the second, both included


def buy(draw: Draw, name: str, things: str, holders: str) -> tuple[str, int]:
    a, b = draw(2, 20), draw(2, 20)
    return f"{name} has {a} {things} and buys {b} more. How many {things} does {name} have now?", a + b


def give(draw: Draw, name: str, things: str, holders: str) -> tuple[str, int]:
    a = draw(5, 30)
    b = draw(2, a - 1)
    return f"{name} has {a} {things} and gives away {b}. How many {things} does {name} have left?", a - b


def hold(draw: Draw, name: str, things: str, holders: str) -> tuple[str, int]:
    a, b = draw(2, 9), draw(2, 9)
    return f"{name} has {a} {holders} with {b} {things} in each. How many {things} does {name} have?", a * b


def share(draw: Draw, name: str, things: str, holders: str) -> tuple[str, int]:
    a, b = draw(2, 9), draw(2, 9)
    return f"{name} puts {a * b} {things} into {a} {holders}, the same in each. How many are in one?", b


def buy_and_give(draw: Draw, name: str, things: str, holders: str) -> tuple[str, int]:
    a, b = draw(2, 20), draw(2, 20)
    c = draw(2, a + b - 1)
    return f"{name} has {a} {things}, buys {b} more and then gives away {c}. How many {things} are left?", a + b - c


def hold_and_buy(draw: Draw, name: str, things: str, holders: str) -> tuple[str, int]:
    a, b, c = draw(2, 9), draw(2, 9), draw(2, 20)
    asked = f"{name} has {a} {holders} with {b} {things} in each and buys {c} more. How many {things} is that in all?"
    return asked, a * b + c


KINDS = (buy, give, hold, share, buy_and_give, hold_and_buy)


def word_problems(n: int, seed: int) -> list[dict[str, str]]:
    """`n` rows, all different; the first ones are the same for every `n`."""
    rng = np.random.default_rng([seed, 2])
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < n:
        kind = KINDS[rng.integers(len(KINDS))]
        words = [str(rng.choice(of)) for of in (NAMES, THINGS, HOLDERS)]
        asked, answer = kind(lambda low, high: int(rng.integers(low, high + 1)), *words)
        source = kind.__name__.replace("_", " ")
        rows.setdefault(asked, {"id": f"word-{seed}-{len(rows)}", "prompt": asked, "answer": str(answer), "source": source})
    return list(rows.values())
