"""Problems from a JSON Lines file: one object a line, in our form, TRL's or verl's.

    ours, TRL   {"prompt": text or messages, "answer": text or number}     `messages` may stand for `prompt`
    verl        {"prompt": messages, "reward_model": {"style": "rule", "ground_truth": text or number}}

TRL's `solution` and a plain `ground_truth` may stand for `answer`; verl's `data_source` becomes the problem's source.
What could be read in two ways is refused. Only `\\n` and `\\r\\n` end a line; U+2028, U+0085 and the like are text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cipo_fast.errors import UserError
from cipo_fast.records import Message, Problem, blank

MAX_DIGITS = 4300  # what Python itself converts; a longer number was hardly meant as one
ROLES = ("system", "user", "assistant")
# What other programs' rows have beside prompt or messages, to be shown to the model with it.
SHOWN = (
    *("system", "system_prompt", "tools", "functions", "documents", "chat_template_kwargs"),
    *("image", "images", "video", "videos", "audio", "audios"),
)
_BOM = b"\xef\xbb\xbf"
_NOT_JSON_LINES = {
    b"\x1f\x8b": "is gzip: unpack it",
    b"\x28\xb5\x2f\xfd": "is zstd: unpack it",
    b"PK\x03\x04": "is a zip archive: unpack it",
    b"PAR1": "is Parquet: convert it to JSON Lines",
    b"ARROW1": "is Arrow: convert it to JSON Lines",
    b"version https://git-lfs": "is a git-lfs pointer, not the file: run `git lfs pull`",
    b"\xff\xfe": "is UTF-16, not UTF-8: save it as UTF-8",
    b"\xfe\xff": "is UTF-16, not UTF-8: save it as UTF-8",
    b"{\0": "is UTF-16, not UTF-8: save it as UTF-8",
    b"\0{": "is UTF-16, not UTF-8: save it as UTF-8",
}


class Number(str):
    """A JSON number as typed: 42.0 stays 42.0, and no digit is lost."""


class _Repeated(Exception):
    """An object has a key twice."""


def quiet(line: str) -> None:
    """Says nothing."""


def read_problems(path: Path, say: Callable[[str], None] = quiet) -> list[Problem]:
    """All problems of `path`; a bad line is a UserError naming file, line and field.

    Ids are unique: a missing one comes from the line number, a repeated one gets it added. `say` hears, with counts,
    of rows that a user may have meant otherwise.
    """
    problems: list[Problem] = []
    ids: set[str] = set()
    notes: dict[str, list[str]] = {}
    for number, line in enumerate(_read(path).split(b"\n"), 1):
        if not line.strip(b" \t\r"):
            continue
        where = f"{path}:{number}"
        record = _object(line.removeprefix(_BOM), where)
        answer = _answer(record, where)
        if isinstance(answer, Number) and not answer.lstrip("-").isdigit():
            kind = "the answer is a number with a fraction or an exponent: right is what has the same characters"
            notes.setdefault(kind, []).append(f"{where}: {answer}")
        if "\r\n" in answer:
            notes.setdefault("the answer has CRLF line ends: compared as LF", []).append(where)
        identity = _identity(record, where) or f"{path.stem}-{number}"
        if identity in ids:
            notes.setdefault("an earlier row has the same id: the line number is added", []).append(where)
            identity = f"{identity}@{number}"
        ids.add(identity)
        source = record.get("data_source")
        source = _text(source, where, "data_source") if isinstance(source, str) else path.name
        problems.append(Problem(identity, _messages(record, where), str(answer), source, where))
    if not problems:
        raise UserError(
            f"{path}: no problems in it; expected one JSON object a line with prompt or messages, and answer"
        )
    for note, found in notes.items():
        say(f"{path}: in {len(found)} of {len(problems)} rows {note} (first: {found[0]})")
    return problems


def _read(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    for start, what in _NOT_JSON_LINES.items():
        if content.startswith(start):
            raise UserError(f"{path}: {what}")
    return content


def _object(line: bytes, where: str) -> dict[str, Any]:
    """The line's object; numbers in it are `Number`s, so that floats are NaN and infinities alone."""
    try:
        record = json.loads(
            line.decode(), parse_int=Number, parse_float=Number, parse_constant=float, object_pairs_hook=_unique
        )
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text at byte {error.start + 1} of the line") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON: {error.msg} at column {error.colno}; expected one object a line") from None
    except RecursionError:
        raise UserError(f"{where}: nested too deeply") from None
    except _Repeated as error:
        raise UserError(f"{where}: field {str(error)!r} stands there twice") from None
    if not isinstance(record, dict):
        kind = "number" if isinstance(record, Number | float) else type(record).__name__
        raise UserError(f"{where}: expected an object, got {kind}")
    return record


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _Repeated(next(key for key in keys if keys.count(key) > 1))
    return found


# ----------------------------------------------------------------------------------------------------------- answer


def _answer(record: dict[str, Any], where: str) -> str:
    """The text of a right answer. Several fields may hold it where they agree."""
    given = {key: record[key] for key in ("answer", "solution", "ground_truth") if record.get(key) is not None}
    model = record.get("reward_model")
    if isinstance(model, dict) and model.get("ground_truth") is not None:
        if model.get("style", "rule") != "rule":
            raise UserError(f"{where}: field 'reward_model.style' is {model['style']!r}: only 'rule' can be verified")
        given["reward_model.ground_truth"] = model["ground_truth"]
    if not given:
        raise UserError(
            f"{where}: field 'answer' is missing (or 'solution', 'ground_truth', 'reward_model.ground_truth')"
        )
    answers = {field: _answer_text(value, where, field) for field, value in given.items()}
    if len({answer.strip() for answer in answers.values()}) > 1:
        raise UserError(f"{where}: fields {' and '.join(map(repr, answers))} differ: keep the one that is the answer")
    return next(iter(answers.values()))


def _answer_text(value: Any, where: str, field: str) -> str:
    if isinstance(value, float):
        name = str(value).replace("nan", "NaN").replace("inf", "Infinity")
        raise UserError(f"{where}: field {field!r} is {name}: not a number to answer")
    if isinstance(value, Number):
        if len(value) > MAX_DIGITS:
            raise UserError(f"{where}: field {field!r} is a number of {len(value)} digits: give it as text")
        if not value.lstrip("-").isdigit() and math.isinf(float(value)):
            raise UserError(f"{where}: field {field!r} is {value}, beyond any float: give it as text")
        return value
    if not isinstance(value, str):
        raise UserError(f"{where}: field {field!r} is neither text nor a number")
    if blank(_text(value, where, field)):
        raise UserError(f"{where}: field {field!r} is blank: an empty completion would be right")
    return value


# --------------------------------------------------------------------------------------------------------- question


def _messages(record: dict[str, Any], where: str) -> tuple[Message, ...]:
    given = [field for field in ("prompt", "messages") if record.get(field) is not None]
    if not given:
        raise UserError(f"{where}: field 'prompt' is missing (or give 'messages')")
    if len(given) > 1:
        raise UserError(f"{where}: both 'prompt' and 'messages' are given: keep one of them")
    (field,) = given
    for more in SHOWN:
        if record.get(more):
            raise UserError(f"{where}: field {more!r} is beside {field!r}: it would not be shown")
    asked = record[field]
    if field == "prompt" and isinstance(asked, str) and not isinstance(asked, Number):
        asked = [{"role": "user", "content": asked}]
    good = (
        isinstance(asked, list)
        and asked
        and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in asked)
    )
    if not good or asked[-1]["role"] != "user":
        text = "text or " if field == "prompt" else ""
        raise UserError(
            f"{where}: field {field!r} must be {text}a list of objects with role and content, the last from the user"
        )
    as_text = isinstance(record[field], str)
    return tuple(_message(m, where, field if as_text else f"{field}[{i}]", as_text) for i, m in enumerate(asked))


def _message(message: dict[str, Any], where: str, field: str, as_text: bool) -> Message:
    if message["role"] not in ROLES:
        raise UserError(f"{where}: field '{field}.role' is {message['role']!r}: expected one of {', '.join(ROLES)}")
    more = [key for key, value in message.items() if key not in ("role", "content") and value not in (None, [], {})]
    if more:
        raise UserError(f"{where}: field '{field}.{more[0]}' is beside role and content: it would not be shown")
    at = field if as_text else f"{field}.content"
    content = message["content"]
    if isinstance(content, list) and content and all(_is_text_part(part) for part in content):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str) or isinstance(content, Number):
        raise UserError(f"{where}: field {at!r} is not text")
    if blank(_text(content, where, at)):
        raise UserError(f"{where}: field {at!r} is blank")
    return Message(role=message["role"], content=_text(content, where, at))


def _is_text_part(part: Any) -> bool:
    """OpenAI's form of a content that may also hold images."""
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


# ------------------------------------------------------------------------------------------------------------- text


def _identity(record: dict[str, Any], where: str) -> str | None:
    value = record.get("id")
    if value is None:
        return None
    if not isinstance(value, str):
        raise UserError(f"{where}: field 'id' is neither text nor a number")
    return str(_text(value, where, "id")).strip() or None


def _text(value: str, where: str, field: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        lone = value[error.start].encode("unicode_escape").decode()
        raise UserError(
            f"{where}: field {field!r} holds a lone surrogate ({lone}), which is half a character"
        ) from None
    return value
