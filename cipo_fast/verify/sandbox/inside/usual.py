"""Names that LeetCode's own editor gives to a program, and LiveCodeBench's runner too: a program that is called by a
function may use them without an import. Programs that read stdin get none."""

from __future__ import annotations

import importlib
from typing import Any

MODULES = (
    "bisect", "collections", "copy", "datetime", "fractions", "functools", "heapq", "io", "itertools", "json", "math",
    "operator", "os", "random", "re", "statistics", "string", "sys", "time", "typing", "dataclasses", "enum", "decimal",
    "contextlib", "inspect", "threading", "traceback", "types", "abc", "array", "textwrap", "hashlib", "queue",
)  # fmt: skip
_MODULES = ("bisect", "collections", "copy", "datetime", "functools", "heapq", "itertools", "math", "operator")
_MODULES += ("random", "re", "statistics", "string", "sys", "json", "typing")
_NAMES = {
    "typing": ("Any", "Callable", "Dict", "FrozenSet", "Iterable", "Iterator", "List", "Optional", "Set", "Tuple")
    + ("Union", "Deque", "DefaultDict", "Counter", "Sequence", "Generator"),
    "collections": ("Counter", "OrderedDict", "defaultdict", "deque", "namedtuple"),
    "functools": ("cache", "cmp_to_key", "lru_cache", "partial", "reduce"),
    "heapq": ("heapify", "heappop", "heappush", "heappushpop", "heapreplace", "nlargest", "nsmallest", "merge"),
    "bisect": ("bisect", "bisect_left", "bisect_right", "insort", "insort_left", "insort_right"),
    "itertools": ("accumulate", "chain", "combinations", "combinations_with_replacement", "count", "cycle", "groupby")
    + ("pairwise", "permutations", "product", "repeat", "starmap", "takewhile", "zip_longest"),
    "math": ("ceil", "comb", "factorial", "floor", "gcd", "inf", "isqrt", "lcm", "log2", "perm", "sqrt"),
}

_given: dict[str, Any] = {}


def load() -> None:
    """Import them all, once, before anything is forked."""
    for name in MODULES:
        importlib.import_module(name)
    for name in _MODULES:
        _given[name] = importlib.import_module(name)
    for module, wanted in _NAMES.items():
        _given.update({name: getattr(importlib.import_module(module), name) for name in wanted})
    _given["bisect"] = importlib.import_module("bisect")


def give(names: dict[str, Any]) -> None:
    """Put them into a program's namespace, before it runs."""
    names.update(_given)
