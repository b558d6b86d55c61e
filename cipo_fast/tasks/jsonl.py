"""JSON Lines: one object a line, its numbers as typed. Only `\\n` and `\\r\\n` end a line; U+2028, U+0085 and the like
are text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cipo_fast.errors import UserError
from cipo_fast.tasks.fields import Number, Record

_BOM = b"\xef\xbb\xbf"
_NOT_JSON_LINES = {
    b"\x1f\x8b": "is gzip: unpack it",
    b"\x28\xb5\x2f\xfd": "is zstd: unpack it",
    b"PK\x03\x04": "is a zip archive: unpack it",
    b"PAR1": "is Parquet: name it .parquet, or convert it to JSON Lines",
    b"ARROW1": "is Arrow: convert it to JSON Lines",
    b"version https://git-lfs": "is a git-lfs pointer, not the file: run `git lfs pull`",
    b"\xff\xfe": "is UTF-16, not UTF-8: save it as UTF-8",
    b"\xfe\xff": "is UTF-16, not UTF-8: save it as UTF-8",
    b"{\0": "is UTF-16, not UTF-8: save it as UTF-8",
    b"\0{": "is UTF-16, not UTF-8: save it as UTF-8",
}


class _Repeated(Exception):
    """An object has a key twice."""


def read_lines(path: Path) -> Iterator[tuple[int, str, Record]]:
    """(line number, `path:line`, object) of every line that is not blank, one line in memory at a time; a bad one is a
    UserError naming file, line and column."""
    try:
        with path.open("rb") as file:
            _refuse_other_kinds(path, file.read(64))
            file.seek(0)
            for number, line in enumerate(file, 1):
                if line.strip(b" \t\r\n"):
                    where = f"{path}:{number}"
                    yield number, where, _object(line.removeprefix(_BOM).removesuffix(b"\n"), where)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _refuse_other_kinds(path: Path, start: bytes) -> None:
    for magic, what in _NOT_JSON_LINES.items():
        if start.startswith(magic):
            raise UserError(f"{path}: {what}")


def _object(line: bytes, where: str) -> Record:
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
