"""What a row's fields hold, read with errors that name file, line and field; and what an adapter makes of a row."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from cipo_fast.errors import UserError
from cipo_fast.records import Message, blank

Record = dict[str, Any]  # a row as it stands in its file, its numbers as typed

MAX_DIGITS = 4300  # what Python itself converts; a longer number was hardly meant as one


class Number(str):
    """A JSON number as typed: 42.0 stays 42.0, and no digit is lost."""


class Unusable(Exception):
    """A row that its data set is known to have and that nobody can verify: dropped and counted. Its text says why."""


@dataclass(frozen=True)
class Draft:
    """A row as its format reads it. `verifier` is what the format, or the row itself, asks for; `once` says that its
    data set repeats rows, which count once."""

    messages: tuple[Message, ...]
    verifier: str
    answer: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)
    policy: Mapping[str, Any] = field(default_factory=dict)
    id: str | None = None
    source: str | None = None
    once: bool = False


def user_turn(text: str) -> tuple[Message, ...]:
    return (Message(role="user", content=text),)


def text_field(record: Record, where: str, *names: str) -> str:
    """The text of the one of `names` that is there; they must agree where several are."""
    found = {name: record[name] for name in names if record.get(name) is not None}
    if not found:
        others = f" (or {', '.join(map(repr, names[1:]))})" if len(names) > 1 else ""
        raise UserError(f"{where}: field {names[0]!r} is missing{others}")
    texts = {name: as_text(value, where, name) for name, value in found.items()}
    if len({text.strip() for text in texts.values()}) > 1:
        raise UserError(f"{where}: fields {' and '.join(map(repr, texts))} differ: keep the one that is meant")
    return next(iter(texts.values()))


def as_text(value: Any, where: str, name: str) -> str:
    if not isinstance(value, str) or isinstance(value, Number):
        raise UserError(f"{where}: field {name!r} is not text")
    if blank(whole_text(value, where, name)):
        raise UserError(f"{where}: field {name!r} is blank")
    return value


def whole_text(value: str, where: str, name: str) -> str:
    """`value`, refused where it holds half a character."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        lone = value[error.start].encode("unicode_escape").decode()
        raise UserError(f"{where}: field {name!r} holds a lone surrogate ({lone}), which is half a character") from None
    return value


def answer_text(value: Any, where: str, name: str) -> str:
    """The text of a right answer, a number as typed (a `Number`)."""
    if isinstance(value, float):
        shown = str(value).replace("nan", "NaN").replace("inf", "Infinity")
        raise UserError(f"{where}: field {name!r} is {shown}: not a number to answer")
    if isinstance(value, Number):
        if len(value) > MAX_DIGITS:
            raise UserError(f"{where}: field {name!r} is a number of {len(value)} digits: give it as text")
        if not value.lstrip("-").isdigit() and math.isinf(float(value)):
            raise UserError(f"{where}: field {name!r} is {value}, beyond any float: give it as text")
        return value
    if not isinstance(value, str):
        raise UserError(f"{where}: field {name!r} is neither text nor a number")
    if blank(whole_text(value, where, name)):
        raise UserError(f"{where}: field {name!r} is blank: an empty completion would be right")
    return value


def number_text(number: str) -> str:
    """A number without what its column's type gave it: 27.0 is 27, 1e3 is 1000; 0.5 stays. For math alone."""
    value = Decimal(number)
    return str(int(value)) if abs(value) < 10**30 and value == value.to_integral_value() else str(number)


def identity(record: Record, where: str, *names: str) -> str | None:
    for name in names or ("id",):
        value = record.get(name)
        if value is None:
            continue
        if not isinstance(value, str):
            raise UserError(f"{where}: field {name!r} is neither text nor a number")
        return str(whole_text(value, where, name)).strip() or None
    return None


def list_field(record: Record, where: str, name: str) -> list[Any]:
    value = record.get(name)
    if value is None:
        raise UserError(f"{where}: field {name!r} is missing")
    if not isinstance(value, list):
        raise UserError(f"{where}: field {name!r} is not a list")
    if not value:
        raise UserError(f"{where}: field {name!r} is an empty list")
    return value


def hints_field(record: Record, where: str) -> tuple[str, ...]:
    """The texts of field `hints`, which a row of any form may have."""
    value = record.get("hints")
    if value is not None and not isinstance(value, list):
        raise UserError(f"{where}: field 'hints' is not a list of texts")
    return tuple(as_text(hint, where, f"hints[{i}]") for i, hint in enumerate(value or ()))


def plain(value: Any, where: str, name: str) -> Any:
    """`value` with its numbers as int and float, as a verifier takes it."""
    if isinstance(value, Number):
        if len(value) > MAX_DIGITS:
            raise UserError(f"{where}: field {name!r} has a number of {len(value)} digits")
        return int(value) if value.lstrip("-").isdigit() else float(value)
    if isinstance(value, str):
        return whole_text(value, where, name)
    if isinstance(value, list):
        return [plain(item, where, name) for item in value]
    if isinstance(value, dict):
        return {whole_text(key, where, name): plain(item, where, name) for key, item in value.items()}
    if value is None or isinstance(value, bool | int | float):
        return value
    raise UserError(f"{where}: field {name!r} holds {type(value).__name__}, which JSON has not")
