"""Where rows come from: JSON Lines, Parquet, a data set of the hub. Each gives (number, where, record), its numbers as
typed, one batch in memory at a time."""

from __future__ import annotations

import datetime
import decimal
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from cipo_fast.errors import UserError
from cipo_fast.tasks.fields import Number, Record
from cipo_fast.tasks.jsonl import read_lines

Source = Path | str
Role = Literal["train", "eval"]
INSTALL = "pip install cipo-fast[hub]"


def read_source(source: Source, role: Role = "train") -> Iterator[tuple[int, str, Record]]:
    """The rows of a file or a hub data set; raises UserError."""
    if isinstance(source, str):
        from cipo_fast.tasks.hub import hub_rows  # its package is optional

        yield from numbered(hub_rows(source, role), source)
    elif source.suffix.lower() in (".parquet", ".pq"):
        yield from numbered(_parquet_rows(source), str(source))
    else:
        yield from read_lines(source)


def stem(source: Source) -> str:
    """What the ids of a source's rows begin with."""
    return source.stem if isinstance(source, Path) else source.removeprefix("hub:").split(":")[0].split("/")[-1]


def name_of(source: Source) -> str:
    """What its figures are called."""
    return source.name if isinstance(source, Path) else source.removeprefix("hub:")


def count_rows(source: Source) -> int | None:
    """How many rows a file has at most; None where only reading it would tell."""
    if isinstance(source, str):
        return None
    if source.suffix.lower() in (".parquet", ".pq"):
        return int(_parquet(source).metadata.num_rows)
    with source.open("rb") as file:
        return sum(bool(line.strip()) for line in file)


def numbered(rows: Iterator[dict[str, Any]], name: str) -> Iterator[tuple[int, str, Record]]:
    for number, row in enumerate(rows, 1):
        where = f"{name}: row {number}"
        yield number, where, {key: _as_typed(value, where, key) for key, value in row.items()}


def _as_typed(value: Any, where: str, name: str) -> Any:
    """A column's value as JSON would have given it."""
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, int):
        return Number(value)
    if isinstance(value, float):
        return Number(repr(value)) if value - value == 0 else value
    if isinstance(value, list | tuple):
        return [_as_typed(item, where, name) for item in value]
    if isinstance(value, dict):
        return {str(key): _as_typed(item, where, name) for key, item in value.items()}
    if isinstance(value, decimal.Decimal) and value.is_finite():
        return Number(value)
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return str(value)
    if isinstance(value, bytes):
        return value  # an image beside the text; refused where a field that is read holds it
    raise UserError(f"{where}: field {name!r} is a {type(value).__name__}, which no row has")


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    file = _parquet(path)
    try:
        for batch in file.iter_batches(batch_size=1024):
            yield from batch.to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's own errors are subclasses of these
        raise UserError(f"{path}: no readable Parquet: {' '.join(str(error).split())[:200]}") from None


def _parquet(path: Path) -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: Parquet needs pyarrow: {INSTALL}, or convert it to JSON Lines") from None
    try:
        return pyarrow.parquet.ParquetFile(os.fspath(path))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no readable Parquet: {' '.join(str(error).split())[:200]}") from None
