"""Verifiers of the embedded tasks that have many right answers: functions of (response, row), as a user's own are.

They run in workers, loaded by path (cipo_fast/verify/user.py). A row holds the `prompt`; no answer is needed to judge.
"""

from __future__ import annotations

from typing import Any

SIDE = 4  # of a Latin square
CHOSEN = 3  # terms of a subset


def subset(response: str, row: dict[str, Any]) -> bool:
    """`subset 3519274 14`: 3 of the digits with that sum, in any order, each as often as it is there at most."""
    _, digits, total = row["prompt"].split(" ")
    chosen = response.strip()
    if len(chosen) != CHOSEN or not _digits(chosen):
        return False
    return all(chosen.count(c) <= digits.count(c) for c in chosen) and sum(map(int, chosen)) == int(total)


def latin(response: str, row: dict[str, Any]) -> bool:
    """`latin 1.3. .4.2 ...`: digits for the blanks, in reading order, so that every row and column has 1 to 4 once."""
    grid = row["prompt"].removeprefix("latin ").replace(" ", "")
    filling = response.strip()
    if len(filling) != grid.count(".") or not _digits(filling):
        return False
    found = iter(filling)
    cells = [next(found) if cell == "." else cell for cell in grid]
    lines = [cells[i : i + SIDE] for i in range(0, SIDE * SIDE, SIDE)] + [cells[i::SIDE] for i in range(SIDE)]
    return all(sorted(line) == ["1", "2", "3", "4"] for line in lines)


def _digits(text: str) -> bool:
    """ASCII digits alone: isdigit takes other scripts' and superscripts."""
    return text.isascii() and text.isdigit()
