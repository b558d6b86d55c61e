"""Plain values as JSON text and back, by exact type. Used on both sides: the program's process encodes, ours decodes.

JSON has its own null, booleans, strings, lists, floats and integers below 2**63. Everything else is an object with one
key: {"t": [...]} tuple, {"s": [...]} set, {"z": [...]} frozenset, {"d": [[key, value], ...]} dict, {"b": hex} bytes,
{"c": [re, im]} complex, {"f": "nan" | "inf" | "-inf"}, {"i": hex} a large integer (hex is read in linear time, and
Python's limit of 4,300 decimal digits does not concern it).

Counter, defaultdict and OrderedDict count as dict, a namedtuple as tuple, numpy's scalars and arrays as what `tolist()`
makes of them: all of them equal these in Python. Any other type, a subclass of int or str for instance, is refused: an
object with an `__eq__` of its own must never meet an expected value.
"""

from __future__ import annotations

import builtins
import json
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from math import isfinite
from typing import Any

__builtins__ = {**vars(builtins)}  # type: ignore[assignment]  # of the functions below: a program may change the built-ins
MAX_DEPTH = 100
MAX_NODES = 1_000_000
MAX_CHARS = 4 << 20
MAX_COLLISIONS = 64  # keys with one hash: what a program returns must not make us build a set in quadratic time
_SMALL = 1 << 63
_DICTS = (dict, Counter, defaultdict, OrderedDict)


class NotPlain(ValueError):
    """The value cannot cross; the message says why, e.g. "a generator, not a plain value"."""


def encode(value: Any) -> str:
    """JSON text of a plain value. Raises NotPlain."""
    try:
        text = json_of(_Encoder().plain(value, 0))
    except RecursionError:
        raise NotPlain("a value nested too deeply") from None
    if len(text) > MAX_CHARS:
        raise NotPlain("a value that is too large")
    return text


def decode(text: str) -> Any:
    """The value of JSON text that `encode` may have written; whatever else it is raises NotPlain, in bounded time."""
    if len(text) > MAX_CHARS:
        raise NotPlain("a value that is too large")
    try:
        return restore(parsed(text))
    except (ValueError, TypeError, RecursionError, MemoryError, OverflowError) as error:
        raise NotPlain(str(error) if isinstance(error, NotPlain) else "a value that cannot be read") from None


class _Encoder:
    def __init__(self) -> None:
        self.nodes, self.chars = 0, 0

    def plain(self, value: Any, depth: int) -> Any:
        """`value` as what json can write. Counts what it visits: a list that holds itself ends too."""
        self.nodes += 1
        if depth > MAX_DEPTH:
            raise NotPlain("a value nested too deeply")
        if self.nodes > MAX_NODES or self.chars > MAX_CHARS:
            raise NotPlain("a value that is too large")
        kind = type(value)
        if value is None or kind is bool:
            return value
        if kind is int:
            return value if -_SMALL < value < _SMALL else self._text("i", format(value, "x"))
        if kind is float:
            return value if isfinite(value) else {"f": repr(value)}
        if kind is str:
            self.chars += len(value)
            return value
        if kind is list:
            return self._all(value, depth)
        return self._tagged(value, kind, depth)

    def _all(self, items: Any, depth: int) -> list[Any]:
        return [self.plain(item, depth + 1) for item in items]

    def _text(self, tag: str, text: str) -> dict[str, str]:
        self.chars += len(text)
        return {tag: text}

    def _tagged(self, value: Any, kind: type, depth: int) -> Any:
        if kind is tuple:
            return {"t": self._all(value, depth)}
        if kind in (set, frozenset):
            return {"s" if kind is set else "z": sorted(self._all(value, depth), key=json_of)}
        if kind in _DICTS:
            pairs = dict.items(value)
            return {"d": [[self.plain(key, depth + 1), self.plain(item, depth + 1)] for key, item in pairs]}
        if kind is bytes:
            return self._text("b", value.hex())
        if kind is complex:
            return {"c": [self.plain(value.real, depth), self.plain(value.imag, depth)]}
        if kind.__bases__ == (tuple,) and type(getattr(kind, "_fields", None)) is tuple:
            return {"t": self._all(tuple.__iter__(value), depth)}
        return self._numpy(value, kind, depth)

    def _numpy(self, value: Any, kind: type, depth: int) -> Any:
        """Scalars and arrays of numpy, if the program loaded it; refuses the rest."""
        import sys

        numpy = sys.modules.get("numpy")
        if numpy is not None and (kind is numpy.ndarray or (issubclass(kind, numpy.generic) and _of_numpy(kind))):
            made = value.tolist()
            if type(made) is not kind:  # a longdouble stays itself
                return self.plain(made, depth + 1)
        name = str(getattr(kind, "__name__", "object"))[:80]
        raise NotPlain(f"a value of type {name}, not a plain value")


def _of_numpy(kind: type) -> bool:
    return str(kind.__module__).split(".")[0] == "numpy"


def _refuse(word: str) -> Any:
    raise NotPlain(f"{word} is not JSON")


def _integer(digits: str) -> int:
    if len(digits) > 20:
        raise NotPlain("an integer that is too long")
    return int(digits)


def _writer() -> Callable[[Any], str]:
    """JSON without spaces, by parts that a program's changes to the module json do not reach."""
    make = json.encoder.c_make_encoder  # type: ignore[attr-defined]
    if make is None:
        return json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode
    write = make(None, _refuse, json.encoder.encode_basestring_ascii, None, ":", ",", False, False, False)
    return lambda value: "".join(write(value, 0))


json_of = _writer()
_scan = json.JSONDecoder(parse_constant=_refuse, parse_int=_integer).scan_once  # type: ignore[attr-defined]


def parsed(text: str) -> Any:
    """What JSON without space around it says. Raises ValueError."""
    try:
        found, end = _scan(text, 0)
    except StopIteration:
        raise ValueError("no JSON") from None
    if end != len(text):
        raise ValueError("more than one JSON value")
    return found


def restore(plain: Any) -> Any:
    """The value behind parsed JSON with tags. Raises NotPlain, ValueError or TypeError on anything else."""
    if type(plain) is list:
        return [restore(item) for item in plain]
    if type(plain) is not dict:
        return plain
    if len(plain) != 1:
        raise NotPlain("an object with other than one tag")
    [(tag, inside)] = plain.items()
    if tag not in _READERS:
        raise NotPlain("an unknown tag")
    return _READERS[tag](inside)


def _items(inside: Any) -> list[Any]:
    if type(inside) is not list:
        raise NotPlain("a tag without its list")
    return [restore(item) for item in inside]


def _keys(items: list[Any]) -> list[Any]:
    """`items`, all hashable, few of them with one hash."""
    times = Counter(hash(item) for item in items)
    if times and max(times.values()) > MAX_COLLISIONS:
        raise NotPlain("keys whose hashes collide")
    return items


def _dict(inside: Any) -> dict[Any, Any]:
    pairs = _items(inside)
    if any(type(pair) is not list or len(pair) != 2 for pair in pairs):
        raise NotPlain("a dict that is no list of pairs")
    _keys([pair[0] for pair in pairs])
    return {key: value for key, value in pairs}  # noqa: C416 (dict(pairs) would take any two-element thing)


def _complex(inside: Any) -> complex:
    real, imaginary = _items(inside)
    if type(real) is not float or type(imaginary) is not float:
        raise NotPlain("a complex number without two floats")
    return complex(real, imaginary)


def _float(inside: Any) -> float:
    if inside not in ("nan", "inf", "-inf"):
        raise NotPlain("an unknown float")
    return float(inside)


_READERS = {
    "t": lambda inside: tuple(_items(inside)),
    "s": lambda inside: set(_keys(_items(inside))),
    "z": lambda inside: frozenset(_keys(_items(inside))),
    "d": _dict,
    "b": bytes.fromhex,
    "c": _complex,
    "f": _float,
    "i": lambda inside: int(inside, 16),
}
