"""rollouts/problems.jsonl: what the recorded rollouts are judged by, each problem's row once.

    {"problem": id, "source": ..., "row": {...}}

A row may hold megabytes of tests, so a line of step-N.jsonl has the problem's id alone. Where the row of an id is
another one since the run went on (checkpoint.allow_changes), it is written as a problem of its own, `id@2`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from cipo_fast.errors import UserError
from cipo_fast.records import Problem

FILE = "problems.jsonl"
_BETWEEN = b', "source": '  # ends the id: within JSON text no quote follows a space


class NoRows(UserError):
    """There is no problems.jsonl, so that no line can be judged."""


class RowWriter:
    """Appends the rows of problems that the file has not. Keeps a digest of each, and no row."""

    def __init__(self, folder: Path):
        self.path = folder / FILE
        self.digests: dict[str, bytes] | None = None  # by name; None: not yet read
        self.names: dict[str, str] = {}  # of problems, by id, that this process has written or found

    def write(self, problems: Iterable[Problem]) -> dict[str, str]:
        """{id: what rollouts call it} of `problems` and all before them; their rows are in the file on return."""
        new = [problem for problem in problems if problem.id not in self.names]
        if new:
            self.digests = self._whole_lines() if self.digests is None else self.digests
            with self.path.open("ab") as file:
                for problem in new:
                    rest = _rest(problem.source, problem.row)
                    name, found = self._name(problem.id, _digest(rest))
                    if not found:
                        file.write(b'{"problem": ' + json.dumps(name).encode() + _BETWEEN + rest + b"\n")
                    self.names[problem.id] = name
        return self.names

    def _name(self, problem: str, digest: bytes) -> tuple[str, bool]:
        """(the problem's name, whether the file has its row by that name)."""
        assert self.digests is not None
        name, number = problem, 1
        while self.digests.get(name, digest) != digest:
            number += 1
            name = f"{problem}@{number}"
        found = name in self.digests
        self.digests[name] = digest
        return name, found

    def _whole_lines(self) -> dict[str, bytes]:
        """What an earlier process wrote; a last line that was cut short is dropped."""
        digests: dict[str, bytes] = {}
        if self.path.exists():
            end = 0
            for start, line in _lines(self.path):
                end = start + len(line)
                entry = _entry(line)
                if entry is not None:
                    digests[entry[0]] = _digest(entry[1])
            os.truncate(self.path, end)
        return digests


class _Row(dict[str, Any]):
    """A dict that can be shared weakly."""

    __slots__ = ("__weakref__",)


class Rows:
    """The rows that the rollouts in `path` name. In memory: the offsets of all, the last one, and those in use."""

    def __init__(self, path: Path, checked: Callable[[dict[str, Any]], dict[str, Any]]):
        """`checked` is called once for a row that is read; what it raises, `row` raises."""
        inside = path.parent / "rollouts" / FILE  # of a run's rollouts.judged.jsonl
        self.path = inside if inside.is_file() else path.parent / FILE
        self.checked = checked
        self.offsets: dict[str, int] | None = None
        self.in_use: WeakValueDictionary[str, _Row] = WeakValueDictionary()
        self.last: _Row | None = None

    def row(self, name: str) -> tuple[dict[str, Any], int]:
        """(the row of a problem, the bytes that had to be read for it). Raises NoRows, UserError."""
        found, size = self.in_use.get(name), 0
        if found is None:
            line = self._line(name)
            try:
                row = dict(json.loads(line)["row"])
            except (ValueError, RecursionError, KeyError, TypeError):
                raise UserError(f"the row of problem {name!r} in {self.path} cannot be read") from None
            found, size = _Row(self.checked(row)), len(line)
            self.in_use[name] = found
        self.last = found
        return found, size

    def _line(self, name: str) -> bytes:
        try:
            if self.offsets is None:
                self.offsets = {}
                for start, line in _lines(self.path):
                    entry = _entry(line)
                    if entry is not None:
                        self.offsets[entry[0]] = start
            if name not in self.offsets:
                raise UserError(f"problem {name!r} is not in {self.path}")
            with self.path.open("rb") as file:
                file.seek(self.offsets[name])
                return file.readline()
        except OSError as error:
            raise NoRows(
                f"{self.path}: cannot be read ({error.strerror}): rollouts are judged by the rows in it; copy it there "
                "from the run's rollouts/"
            ) from None


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(offset, line) of all that end."""
    start = 0
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield start, line
            start += len(line)


def _entry(line: bytes) -> tuple[str, bytes] | None:
    """(name, the rest as `_rest` writes it) of a line; None: it is no problem's. The row is not parsed where the line
    is as it was written here."""
    head, between, rest = line.rstrip(b"\r\n").partition(_BETWEEN)
    with suppress(ValueError, RecursionError, KeyError, TypeError):
        if between and rest.endswith(b"}}"):
            return str(json.loads(head + b"}")["problem"]), rest
        record = json.loads(line)
        return str(record["problem"]), _rest(record.get("source"), dict(record["row"]))
    return None


def _rest(source: str | None, row: dict[str, Any]) -> bytes:
    """ASCII: half a character in a test cannot be written otherwise."""
    return f'{json.dumps(source)}, "row": {json.dumps(row)}}}'.encode()


def _digest(rest: bytes) -> bytes:
    return hashlib.blake2b(rest, digest_size=16).digest()
