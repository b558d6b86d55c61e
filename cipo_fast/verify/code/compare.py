"""Whether what a program gave is what a test expects: values of a call, and text on standard output.

Both come from outside: `got` is decoded from the sandbox's canonical JSON and holds exact built-in types alone, so that
no method of the program's own is ever called here. `expected` is JSON of the row.
"""

from __future__ import annotations

import math
import re
from typing import Any

RELATIVE = 1e-6  # of the expected float
ABSOLUTE = 1e-9
ROUNDED_DIGITS = 5  # an expected float of so many digits after the point, and in all, may be a rounded one
EXACT_FLOATS = 2**53  # below it a float holds every integer
FLOAT = re.compile(r"[+-]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][+-]?\d+)?", re.ASCII)
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
LONGEST_NUMBER = 400  # characters: longer tokens are compared as text


def same_value(expected: Any, got: Any) -> bool:
    """Whether a returned value is the expected one.

    Types are exact, except where JSON or floats leave no choice: a tuple is the list that JSON made of it; a dict with
    int, float, bool or None keys is the object with those keys as JSON writes them; a float with an integer's value is
    that integer; an int is the float of its value; and floats are close (`close`)."""
    try:
        return _same(expected, got)
    except RecursionError:
        return False


def _same(expected: Any, got: Any) -> bool:
    if expected is None or isinstance(expected, bool | str):
        return type(got) is type(expected) and got == expected
    if isinstance(expected, int):
        return _same_int(expected, got)
    if isinstance(expected, float):
        return type(got) in (int, float) and close(expected, got, repr(expected))
    if isinstance(expected, list | tuple):
        many = type(got) in (list, tuple) and len(got) == len(expected)
        return many and all(_same(e, g) for e, g in zip(expected, got, strict=True))
    if isinstance(expected, dict):
        keyed = _keys_as_json(got) if type(got) is dict else None
        return (
            keyed is not None and keyed.keys() == expected.keys() and all(_same(expected[k], keyed[k]) for k in keyed)
        )
    return False


def _same_int(expected: int, got: Any) -> bool:
    if type(got) is float:
        return abs(expected) <= EXACT_FLOATS and got == expected
    return type(got) is int and got == expected


def _keys_as_json(got: dict[Any, Any]) -> dict[str, Any] | None:
    """The dict with the keys that JSON would write; None where two become one or one cannot be written."""
    words = {True: "true", False: "false", None: "null"}
    keyed: dict[str, Any] = {}
    for key, value in got.items():
        if type(key) is str:
            name = key
        elif key is None or type(key) is bool:
            name = words[key]
        elif type(key) in (int, float) and (type(key) is float or key.bit_length() < 1000):
            name = repr(key)
        else:
            return None
        if name in keyed:
            return None
        keyed[name] = value
    return keyed


def close(expected: float, got: float, literal: str) -> bool:
    """Whether `got` is the float `expected`, which stands in the row as `literal`: within 1e-6 of it, or 1e-9. Where
    that has at least five digits after its point and five significant ones, half a unit of the last one will do too:
    0.33333 is 1/3 as it is printed."""
    if not math.isfinite(expected):
        return expected == got or (math.isnan(expected) and type(got) is float and math.isnan(got))
    if type(got) is int and abs(got) > EXACT_FLOATS:
        return got == expected
    return math.isfinite(got) and abs(got - expected) <= max(RELATIVE * abs(expected), ABSOLUTE, _rounding(literal))


def _rounding(literal: str) -> float:
    """Half a unit of the last digit of a literal such as 0.33333; 0 where it has too few to be a rounded number."""
    whole, point, decimals = literal.partition(".")
    if not point or not decimals.isdecimal() or len(decimals) < ROUNDED_DIGITS:
        return 0.0
    if len((whole + decimals).lstrip("+-0")) < ROUNDED_DIGITS:
        return 0.0
    return 0.5 * 10.0 ** -min(len(decimals), 300) * (1 + 1e-9)


def same_output(expected: str, got: str) -> str:
    """ "" where the output is the expected one, else what differs, in a few words.

    Whitespace at the end of a line and empty lines at the end do not count. The number of lines must be the same, and
    in each the number of tokens; tokens are equal as text, or close where the expected one is written as a float."""
    wanted, given = _lines(expected), _lines(got)
    for number, (want, have) in enumerate(zip(wanted, given, strict=False), 1):
        if want != have and not _same_tokens(want.split(), have.split()):
            return f"line {number} is {have!r}"
    return "" if len(wanted) == len(given) else f"{len(given)} lines for {len(wanted)}"


def _lines(text: str) -> list[str]:
    lines = [line.rstrip() for line in text.replace("\r\n", "\n").split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def _same_tokens(wanted: list[str], given: list[str]) -> bool:
    return len(wanted) == len(given) and all(_same_token(w, g) for w, g in zip(wanted, given, strict=True))


def _same_token(want: str, have: str) -> bool:
    if want == have:
        return True
    if max(len(want), len(have)) > LONGEST_NUMBER or not FLOAT.fullmatch(want) or not NUMBER.fullmatch(have):
        return False
    return math.isfinite(float(want)) and close(float(want), float(have), want)
