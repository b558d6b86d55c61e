"""Inputs that are like a test's inputs and are not those: renamed, and fresh.

A renaming is a bijection on object constants (letters, labels): the idea of isomorphic perturbation testing, arXiv
2604.15149. Fresh inputs keep what a task may rely on, as far as values show it: types, lengths, signs, order where
there is one, distinctness, and whole numbers that may be a length or an index. Whether an input is one that the task
allows, only its reference solution can say: gaming.py drops what that refuses.
"""

from __future__ import annotations

import ast
import random
import re
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

Args = list[Any]  # positional arguments of one call
LONE_NUMBER = re.compile(r"(?<![\w.])-?\d{1,4000}(?![\w.])")
MAX_SUITE = 200_000  # characters of an assert suite that is read


@dataclass(frozen=True)
class Renaming:
    """A bijection, applied to values of any nesting."""

    letters: dict[int, str]
    labels: dict[int, int]

    def __call__(self, value: Any) -> Any:
        return mapped(value, self._leaf)

    def _leaf(self, value: Any) -> Any:
        if isinstance(value, str):
            return value.translate(self.letters)
        return self.labels.get(value, value) if type(value) is int else value


def renamings(inputs: list[Any], rng: random.Random) -> list[Renaming]:
    """Letters among themselves (vowels or not, small and capital alike), and node labels: the whole numbers inside
    lists of lists, among themselves. None where there is nothing to rename."""
    found = []
    if any(isinstance(leaf, str) and any(c in string.ascii_letters for c in leaf) for leaf in leaves(inputs)):
        shuffled = _derangement(string.ascii_lowercase, rng)
        table = {ord(a): b for a, b in zip(string.ascii_lowercase, shuffled, strict=True)}
        table |= {ord(a.upper()): b.upper() for a, b in zip(string.ascii_lowercase, shuffled, strict=True)}
        found.append(Renaming(table, {}))
    labels = sorted({n for pair in _inner_lists(inputs) for n in pair if type(n) is int})
    if len(labels) > 1:
        found.append(Renaming({}, dict(zip(labels, _derangement(labels, rng), strict=True))))
    return found


def fresh(inputs: list[Args], rng: random.Random) -> Iterator[Args]:
    """Without end: arguments near those of a test, or with one of another test's in the same place."""
    if not inputs:
        return
    while True:
        args = rng.choice(inputs)
        others = [other for other in inputs if len(other) == len(args) and other is not args]
        if others and len(args) > 1 and rng.random() < 0.3:
            place, other = rng.randrange(len(args)), rng.choice(others)
            yield [*args[:place], other[place], *args[place + 1 :]]
            continue
        lengths = [len(part) for part in args if isinstance(part, str | list | tuple | dict)]
        yield [_near(part, max(lengths, default=-1), rng) for part in args]


def fresh_stdin(inputs: list[str], rng: random.Random) -> Iterator[str]:
    """Without end. Of several lines the first is kept: it mostly holds sizes; numbers in others change places, or, in
    an input of one line, their value."""
    if not inputs:
        return
    while True:
        lines = rng.choice(inputs).split("\n")
        if sum(bool(line.strip()) for line in lines) == 1:
            yield "\n".join(LONE_NUMBER.sub(lambda match: str(_number(int(match[0]), rng)), line) for line in lines)
        else:
            yield "\n".join([lines[0], *(_shuffled_line(line, rng) for line in lines[1:])])


def suite_inputs(suite: str) -> list[Args]:
    """Arguments of the calls `candidate(...)` in an assert suite that are plain values."""
    if len(suite) > MAX_SUITE:
        return []
    try:
        tree = ast.parse(suite)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    found: list[Args] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "candidate" and not node.keywords:
            try:
                args = [ast.literal_eval(arg) for arg in node.args]
            except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
                continue
            if args and args not in found:
                found.append(args)
    return found


def leaves(value: Any) -> Iterator[Any]:
    """Everything that is no container, keys of objects among it."""
    if isinstance(value, list | tuple | set | frozenset):
        for part in value:
            yield from leaves(part)
    elif isinstance(value, dict):
        for key, part in value.items():
            yield key
            yield from leaves(part)
    else:
        yield value


def mapped(value: Any, leaf: Callable[[Any], Any]) -> Any:
    """The value with `leaf` of every leaf; containers stay what they are."""
    if isinstance(value, list | tuple | set | frozenset):
        return type(value)(mapped(part, leaf) for part in value)
    if isinstance(value, dict):
        return {leaf(key): mapped(part, leaf) for key, part in value.items()}
    return leaf(value)


def _inner_lists(value: Any, depth: int = 0) -> Iterator[list[Any] | tuple[Any, ...]]:
    """Lists inside a list that is itself an argument: edges, rows. `value` holds the argument lists."""
    if isinstance(value, list | tuple):
        if depth >= 3:
            yield value
        for part in value:
            yield from _inner_lists(part, depth + 1)


def _derangement(items: Any, rng: random.Random) -> list[Any]:
    """A rotation of a random order, as a map of `items`: none stays where it is."""
    order = list(items)
    rng.shuffle(order)
    after = dict(zip(order, order[1:] + order[:1], strict=True))
    return [after[item] for item in items]


def _near(value: Any, longest: int, rng: random.Random) -> Any:
    """A value of the same kind. `longest`: length of the longest argument; a number up to it may be an index."""
    if type(value) is int:
        return value if 0 <= value <= longest else _number(value, rng)
    if type(value) is float:
        return round(value * rng.uniform(0.8, 1.2), 3)
    if isinstance(value, str):
        return _near_text(value, rng)
    if isinstance(value, list | tuple):
        return type(value)(_near_list(list(value), longest, rng))
    if isinstance(value, dict):
        parts = list(value.values())
        rng.shuffle(parts)
        return dict(zip(value, parts, strict=True))
    return value


def _near_list(value: list[Any], longest: int, rng: random.Random) -> list[Any]:
    numbers = all(type(part) is int for part in value)
    if numbers and any(part < 0 or part > max(longest, 1) for part in value):
        found = [_number(part, rng) for part in value]
        if len(set(value)) < len(value) or len(set(found)) == len(found):
            return _in_order_of(value, found, rng)
    if any(isinstance(part, str) for part in value):
        return _in_order_of(value, [_near(part, longest, rng) for part in value], rng)
    return _in_order_of(value, list(value), rng)


def _in_order_of(value: list[Any], found: list[Any], rng: random.Random) -> list[Any]:
    """Sorted as `value` is, or shuffled."""
    try:
        if value == sorted(value):
            return sorted(found)
        if value == sorted(value, reverse=True):
            return sorted(found, reverse=True)
    except TypeError:
        pass
    rng.shuffle(found)
    return found


def _near_text(value: str, rng: random.Random) -> str:
    """The same characters in another order, where they are letters and spaces alone: anything else may be a grammar."""
    if not re.fullmatch(r"[A-Za-z ]{2,}", value) or value != value.strip():
        return value
    if " " in value:
        words = value.split(" ")
        rng.shuffle(words)
        return " ".join(words)
    letters = list(value)
    rng.shuffle(letters)
    return "".join(letters)


def _number(value: int, rng: random.Random) -> int:
    """Near, of the same sign, not the same; 0 stays."""
    if value == 0:
        return 0
    reach = max(2, abs(value) // 4)
    found = abs(value) + rng.choice([-1, 1]) * rng.randint(1, reach)
    found = found if found > 0 else abs(value) + rng.randint(1, reach)
    return found if value > 0 else -found


def _shuffled_line(line: str, rng: random.Random) -> str:
    words = line.split(" ")
    if len(words) > 2 and all(re.fullmatch(r"-?\d+", word) for word in words):
        return " ".join(map(str, _in_order_of([int(w) for w in words], [int(w) for w in words], rng)))
    return line
