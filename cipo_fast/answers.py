"""Answers that are to be judged, read from JSON Lines: a file of them, or the rollouts of a run.

A line of a file is a row (see verify/) and its `response`. A line of `rollouts/step-*.jsonl` is a rollout, with its
text, the name of its problem (whose row is in problems.jsonl) and, if it was an anchor, its corrections. What cannot be
judged is a line with an `error`, never an exception.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from cipo_fast.config import DataConfig
from cipo_fast.errors import UserError
from cipo_fast.recorded_rows import NoRows, Rows
from cipo_fast.verify.judging import check_row

ADDED = ("verdict", "why", "seconds", "fault")  # what judging adds to a record
FAULTS = ("bad line", "not judged")  # of a record without a verdict; once written as its `error`
BEFORE = "verdict_before"  # what becomes of an earlier `verdict`
_BOM = b"\xef\xbb\xbf"
_SHOWN = 200  # characters of a JSON error
MAX_LINE = 256 << 20  # bytes


@dataclass(frozen=True)
class Answer:
    """One answer. `index` is that of a correction of the line's rollout; None: the line's own answer. `before` is what
    the line says of it already: right, wrong, unparsable, timeout, `not right` (a reward of 0), or nothing."""

    row: dict[str, Any]
    response: str
    index: int | None = None
    before: str | None = None
    truncated: bool = False


@dataclass(frozen=True)
class Line:
    """A line of input. `record` is what it says ({"line": its text} where that is no JSON object), `error` what is
    wrong with it."""

    where: str
    text: str
    record: dict[str, Any]
    answers: list[Answer] = field(default_factory=list)
    error: str = ""
    size: int = 0  # bytes
    row_size: int = 0  # bytes of the row that was read for it, and is not yet in use

    @property
    def source(self) -> str:
        row = self.answers[0].row if self.answers else {}
        found = self.record.get("source") or row.get("source")
        return found if isinstance(found, str) else ""


def files_of(path: Path) -> tuple[list[Path], bool]:
    """(the files to read, whether they are a run's): a JSON Lines file, a run's folder or its `rollouts/`."""
    if path.is_dir():
        folder = path / "rollouts" if (path / "rollouts").is_dir() else path
        files = sorted(folder.glob("step-*.jsonl"))
        if not files:
            raise UserError(f"{path}: no rollouts/step-*.jsonl in it; name a run's folder or a JSON Lines file")
        return files, True
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    return [path], False


def read_lines(files: list[Path], of_a_run: bool, data: DataConfig | None = None) -> Iterator[Line]:
    """The lines in order, blank ones left out. `data` has the verifier of rows that name none, and a math policy that
    lies under theirs. Raises UserError where a file cannot be read, or rollouts have no problems.jsonl."""
    settings = data or DataConfig()
    rows = Rows(files[0], lambda row: _checked(row, settings)) if files else None
    return (with_answers(line, of_a_run, settings, rows) for line in read_records(files))


def read_records(files: list[Path]) -> Iterator[Line]:
    """The lines as they stand, without answers."""
    for path in files:
        try:
            with path.open("rb") as file:
                for number, (line, size) in enumerate(_lines(file), 1):
                    line = line.removeprefix(_BOM) if number == 1 else line
                    if size > MAX_LINE:
                        yield _too_long(line, f"{path}:{number}", size)
                    elif line.strip():
                        yield read_record(line, f"{path}:{number}")
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _lines(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Each line and its size; of one that is longer than MAX_LINE only the beginning."""
    while line := file.readline(MAX_LINE + 1):
        size, last = len(line), line
        if size > MAX_LINE:
            line = line[:_SHOWN]
            while last and not last.endswith(b"\n"):
                last = file.readline(1 << 20)
                size += len(last)
        yield line, size


def _too_long(line: bytes, where: str, size: int) -> Line:
    text = line.rstrip(b"\r\n").decode("utf-8", "replace")
    return Line(
        where, text, {"line": text}, error=f"a line of {size:,} bytes: at most {MAX_LINE:,} are read", size=size
    )


def read_record(line: bytes, where: str) -> Line:
    """Bytes that are not UTF-8 become U+FFFD, which is how such an answer is judged."""
    text = line.rstrip(b"\r\n").decode("utf-8", "replace")
    try:
        record = json.loads(text)
    except (ValueError, RecursionError, MemoryError) as error:
        return Line(
            where, text, {"line": text}, error=f"cannot be read as JSON ({str(error)[:_SHOWN]})", size=len(line)
        )
    if not isinstance(record, dict):
        return Line(where, text, {"line": text}, error="not a JSON object", size=len(line))
    return Line(where, text, record, size=len(line))


def with_answers(line: Line, of_a_run: bool, data: DataConfig, rows: Rows | None = None) -> Line:
    """A line with its answers, or with what is wrong with them. `rows`: those of rollouts. Raises NoRows."""
    record = line.record
    if line.error:
        return line
    try:
        if rows and "text" in record and "response" not in record and (of_a_run or "policy_version" in record):
            row, row_size = rows.row(_text(record, "problem"))
            return replace(line, answers=_rollout(record, row), row_size=row_size)
        return replace(line, answers=[_answer(record, line.text, data)])
    except NoRows:
        raise
    except UserError as error:
        return replace(line, error=str(error))


def plain(record: dict[str, Any]) -> dict[str, Any]:
    """A record without what judging adds: the same for a line and for what was written of it. A row's own `error`, a
    tolerance, stays."""
    kept = {key: value for key, value in record.items() if key not in (*ADDED, BEFORE)}
    if "verdict" in record and record["verdict"] is None and kept.get("error") in FAULTS:
        del kept["error"]
    if isinstance(kept.get("corrections"), list):
        kept["corrections"] = [plain(c) if isinstance(c, dict) else c for c in kept["corrections"]]
    return kept


def _answer(record: dict[str, Any], text: str, data: DataConfig) -> Answer:
    row = {key: value for key, value in plain(record).items() if key != "response"}
    to_a_function = ":" in str(row.get("verifier") or data.verifier)  # which gets the row as it stands
    if type(row.get("answer")) in (int, float) and not to_a_function:
        typed = json.loads(text, parse_int=str, parse_float=str, parse_constant=str)
        row |= {"answer": typed["answer"]}  # with all its digits, as data for training has it
    return Answer(_checked(row, data), _text(record, "response"), before=_before(record))


def _rollout(record: dict[str, Any], row: dict[str, Any]) -> list[Answer]:
    """The rollout, then its corrections."""
    corrections = record.get("corrections") or []
    if not isinstance(corrections, list) or not all(isinstance(c, dict) for c in corrections):
        raise UserError("field 'corrections' is not a list of objects")
    answers = [Answer(row, _text(record, "text"), None, _before(record), bool(record.get("truncated")))]
    for i, c in enumerate(corrections):
        answers.append(Answer(row, _text(c, "text", f"corrections[{i}]."), i, _before(c), bool(c.get("truncated"))))
    return answers


def _checked(row: dict[str, Any], data: DataConfig) -> dict[str, Any]:
    if row.get("verifier") is None:
        if data.verifier is None:
            raise UserError("no field 'verifier': exact, math, code or path/to/file.py:function")
        row = {**row, "verifier": data.verifier}
    if row["verifier"] == "math" and data.math and isinstance(row.get("policy", {}), dict):
        row = {**row, "policy": {**data.math, **row.get("policy", {})}}
    if not isinstance(row["verifier"], str):
        raise UserError("field 'verifier' is not text")
    try:
        wrong = check_row(row)
    except Exception as error:  # a row that nobody foresaw must not cost the others
        wrong = f"the row cannot be read ({type(error).__name__}: {str(error)[:_SHOWN]})"
    if wrong:
        raise UserError(wrong)
    return row


def _text(record: dict[str, Any], key: str, inside: str = "") -> str:
    value = record.get(key)
    if value is None:
        raise UserError(f"no field '{inside}{key}'")
    if not isinstance(value, str):
        raise UserError(f"field '{inside}{key}' is not text")
    return value.encode("utf-8", "surrogatepass").decode("utf-8", "replace")


def _before(record: dict[str, Any]) -> str | None:
    if isinstance(record.get("verdict"), str):
        return str(record["verdict"])
    reward = record.get("reward")
    if isinstance(reward, bool) or not isinstance(reward, int | float):
        return None
    return "right" if reward == 1 else "not right"
