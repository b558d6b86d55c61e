"""Math-Verify on what the comparators here cannot read: integrals, limits, notations of their own.

Its LaTeX configuration alone, on one box, gold first, and no time-outs: they need the main thread's signals, and the
worker is killed by its parent anyway.
"""

from __future__ import annotations

import logging
import re
from typing import Any

_LETTERS = re.compile(r"\\[A-Za-z]+|[A-Za-z]")
_SUBSCRIPT = re.compile(r"_\s*(?:\{[^{}]*\}|\w)")
_UNTOLD = re.compile(r"\\[bp]?mod\b|\\text|=|\\approx|\\equiv")
_LONGEST = 600  # characters: its parser is slow
_LAYOUT = {r"\frac", r"\cdot", r"\times", r"\left", r"\right", r"\sqrt"}


def math_verify_agrees(gold: str, answer: str) -> bool:
    """Whether Math-Verify holds two prepared texts for equal. It mixes up capitals and subscripts and lets equations
    decay into their right sides: a pair that differs there is not asked about."""
    if _UNTOLD.search(gold) or _UNTOLD.search(answer):
        return False
    if max(len(gold), len(answer)) > _LONGEST or "\\" not in gold or _names(gold) != _names(answer):
        return False
    import math_verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it warns that there are no time-outs
    settings = [math_verify.LatexExtractionConfig()]
    read: list[Any] = []
    for text in (gold, answer):
        found = math_verify.parse(f"\\boxed{{{text}}}", settings, parsing_timeout=None)
        if not found or isinstance(found[0], str):
            return False
        read.append(found[0])
    return bool(math_verify.verify(read[0], read[1], timeout_seconds=None))


def _names(text: str) -> tuple[set[str], list[str]]:
    """The letters and commands of a text, without those of layout, and its subscripts."""
    return set(_LETTERS.findall(text)) - _LAYOUT, sorted(part.strip("_{} ") for part in _SUBSCRIPT.findall(text))
