"""Arithmetic word problems made by seed, as JSON Lines: small enough for a model that two CPU cores can train.

    python -m cipo_fast.word_problems --out problems.jsonl [--n 1000] [--seed 0]

A row is {"id", "messages", "answer", "data_source"}: one operation on small numbers, the answer a whole number above 0.
Every question comes after two turns that show how to answer, an equation with the result in a box: a small model
does as it is shown, not as it is told. `data_source` names the kind of problem, for figures of each.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cipo_fast.errors import UserError, command, put

NAMES = ("Anna", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Henry", "Iris", "Jack", "Lena", "Omar")
THINGS = ("apples", "books", "cards", "coins", "cookies", "eggs", "flowers", "marbles", "pencils", "shells", "stamps")
MOST = 10_000  # of the 24,000 or so problems that there are

Draw = Callable[[int, int], int]  # a whole number from the first to the second, both included


def buy(draw: Draw, name: str, things: str) -> tuple[str, str, int]:
    """(question, term, result), the same below."""
    a, b = draw(2, 9), draw(2, 9)
    return f"{name} has {a} {things} and buys {b} more. How many {things} does {name} have now?", f"{a} + {b}", a + b


def give(draw: Draw, name: str, things: str) -> tuple[str, str, int]:
    a = draw(3, 9)
    b = draw(1, a - 1)
    return f"{name} has {a} {things} and gives away {b}. How many {things} are left?", f"{a} - {b}", a - b


KINDS = (buy, give)
# One of each kind, the same before every question; neither names nor things of theirs are asked about.
SHOWN = ((give, "Mia", "nuts", (9, 2)), (buy, "Tom", "cups", (5, 8)))


def shown() -> list[dict[str, str]]:
    turns = []
    for kind, name, things, numbers in SHOWN:
        asked, term, result = kind(_given(numbers), name, things)
        turns += [{"role": "user", "content": asked}]
        turns += [{"role": "assistant", "content": f"{term} = \\boxed{{{result}}}"}]
    return turns


def _given(numbers: Sequence[int]) -> Draw:
    left = iter(numbers)
    return lambda low, high: next(left)


def word_problems(n: int, seed: int) -> list[dict[str, Any]]:
    """`n` rows, all different; the first ones are the same for every `n`."""
    rng = np.random.default_rng([seed, 2])
    rows: dict[str, dict[str, Any]] = {}
    while len(rows) < n:
        kind = KINDS[rng.integers(len(KINDS))]
        name, things = str(rng.choice(NAMES)), str(rng.choice(THINGS))
        asked, _, result = kind(lambda low, high: int(rng.integers(low, high + 1)), name, things)
        messages = [*shown(), {"role": "user", "content": asked}]
        row = {"id": f"word-{seed}-{len(rows)}", "messages": messages, "answer": str(result)}
        rows.setdefault(asked, {**row, "data_source": kind.__name__})
    return list(rows.values())


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Exit code 2 where the file cannot be written, with one line."""
    about = (__doc__ or "").split(":")[0]
    parser = argparse.ArgumentParser(prog="python -m cipo_fast.word_problems", description=about)
    parser.add_argument("--out", type=Path, required=True, help="the file to write")
    parser.add_argument("--n", type=int, default=1000, help=f"rows, at most {MOST:,} (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other problems (default: 0)")
    args = parser.parse_args(argv)
    return command(lambda: write(args.out, args.n, args.seed))


def write(out: Path, n: int, seed: int) -> None:
    if not 1 <= n <= MOST:
        raise UserError(f"--n {n}: expected 1 to {MOST:,} problems")
    if seed < 0:
        raise UserError(f"--seed {seed}: expected a number from 0 on")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("".join(json.dumps(row) + "\n" for row in word_problems(n, seed)), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}") from None
    put(f"{n:,} problems in {out}")


if __name__ == "__main__":
    sys.exit(main())
