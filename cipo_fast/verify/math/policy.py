"""Choices that mathematics does not make: each with a default, set per data set by a row's `policy` object."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args, get_type_hints


@dataclass(frozen=True)
class MathPolicy:
    """What counts as equal where people differ.

    percent: `value`: 35% is 0.35 and not 35. `either`: the sign may also be left out or added (GSM8K).
    units: `gold`: when the gold has a unit, the answer has the same one or none; a unit that the gold lacks is not
        read. `required`: the answer must have the gold's. `ignore`: units are never read.
    rounding: `exact`: 0.33 is not 1/3. `gold_digits`: a decimal gold is met by what rounds to its written digits
        (Minerva). A gold that is no decimal is never met by a rounded decimal.
    tolerance: of a decimal gold, relative to the gold. 0: none.
    choices: `with_text`: a choice letter may be followed by its text, (C) 17. `letter`: the letter alone.
    ratio: `ratio`: 3:4 is a ratio, equal to 6:8, and not to 3/4. `fraction`: equal to 3/4, too.
    base: `required`: 1011_2 needs its subscript. `optional`: 1011 is the same.
    answer_line: without any box, a last line `Answer: 7` counts (DAPO's own prompt asks for it).
    """

    percent: Literal["value", "either"] = "value"
    units: Literal["gold", "required", "ignore"] = "gold"
    rounding: Literal["exact", "gold_digits"] = "exact"
    tolerance: float = 0.0
    choices: Literal["with_text", "letter"] = "with_text"
    ratio: Literal["ratio", "fraction"] = "ratio"
    base: Literal["required", "optional"] = "required"
    answer_line: bool = False


_DEFAULT = MathPolicy()
_TYPES = get_type_hints(MathPolicy)


def policy_of(row: Mapping[str, Any]) -> MathPolicy:
    """A row's policy. ValueError with one line for a field or a value that does not exist."""
    given = row.get("policy")
    if given is None or given == {}:
        return _DEFAULT
    if not isinstance(given, Mapping):
        raise ValueError("policy must be an object, such as {'percent': 'either'}")
    names = [field.name for field in fields(MathPolicy)]
    for name, value in given.items():
        if name not in names:
            raise ValueError(f"policy has no field {name!r}; it has {', '.join(names)}")
        _check(name, value)
    return MathPolicy(**given)


def _check(name: str, value: object) -> None:
    choices = get_args(_TYPES[name])
    if choices:
        if value not in choices:
            raise ValueError(f"policy.{name} must be one of {', '.join(choices)}, not {value!r}")
    elif _TYPES[name] is bool:
        if not isinstance(value, bool):
            raise ValueError(f"policy.{name} must be true or false, not {value!r}")
    elif isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ValueError(f"policy.{name} must be a number from 0 to below 1, not {value!r}")
