"""Programs that contain the tests: their inputs or outputs as literals, where no solution would have them."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterator
from typing import Any

MIN_TEXT, MIN_DIGITS, MIN_ITEMS = 6, 4, 3  # what is shorter may be there by chance


def literals_of(program: str) -> set[str]:
    """Distinctive constants of a program in one form: long texts and numbers, and lists of constants. Docstrings are
    none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(program)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return set()
    shown = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant | ast.List | ast.Tuple | ast.Set | ast.Dict) and id(node) not in shown:
            try:
                found |= distinctive(ast.literal_eval(node))
            except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
                continue
    return found


def distinctive(value: Any) -> set[str]:
    """The value, if it says enough, and what inside it does."""
    return set(_distinctive(value))


def literals_in_tests(row: dict[str, Any], inputs: list[Any]) -> set[str]:
    """Those of a row's tests: arguments, stdin, and what is expected of them."""
    found: set[str] = set()
    for args in inputs:
        found |= distinctive(args)
    tests = row.get("tests")
    for test in tests if isinstance(tests, list) else ():
        if isinstance(test, dict):
            for key in ("args", "kwargs", "expected", "stdin", "stdout"):
                value = test.get(key)
                found |= distinctive(value.strip() if isinstance(value, str) else value)
    return found


def _distinctive(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        if len(value.strip()) >= MIN_TEXT:
            yield value.strip()
    elif type(value) is int:
        digits = str(abs(value)) if abs(value) < 10**4000 else ""
        if len(digits) >= MIN_DIGITS and not re.fullmatch(r"10*7?|9+", digits) and abs(value) & (abs(value) - 1):
            yield digits  # no power of ten or two, no modulus such as 1000000007
    elif isinstance(value, list | tuple | set | frozenset):
        parts = list(value) if isinstance(value, list | tuple) else sorted(value, key=repr)
        if len(parts) >= MIN_ITEMS and not all(isinstance(part, str) and len(part) < 2 for part in parts):
            yield repr(parts)
        for part in parts:
            yield from _distinctive(part)
    elif isinstance(value, dict):
        for part in (*value, *value.values()):
            yield from _distinctive(part)
