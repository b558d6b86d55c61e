"""Reads what a run has left, whatever state it is in: what is torn or of another format is named, and left out."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MOST_BYTES = 2**26  # that are read of one file of lines: the page shows a sample of them


class Files:
    """The files of a run's folder. `skipped` names what could not be read, a line each."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.skipped: list[str] = []

    def skip(self, name: str, why: str) -> None:
        self.skipped.append(f"{name}: {why}")

    def text(self, name: str) -> str | None:
        """None where there is no such file, which is no fault; or where it cannot be read."""
        try:
            return (self.folder / name).read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return None
        except OSError as error:
            self.skip(name, f"cannot be read ({error.strerror})")
            return None

    def json(self, name: str) -> dict[str, Any]:
        """{} where there is none, or no object."""
        text = self.text(name)
        if text is None:
            return {}
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            self.skip(name, "torn, no whole JSON")
            return {}
        if not isinstance(found, dict):
            self.skip(name, "of another format, no JSON object")
            return {}
        return found

    def lines(self, name: str, most: int = MOST_BYTES) -> Iterator[dict[str, Any]]:
        """The objects of a file of JSON lines, of its first `most` bytes. Bad lines are counted and named once."""
        bad: list[int] = []
        size = 0
        try:
            with (self.folder / name).open("rb") as file:
                for number, line in enumerate(file, 1):
                    size += len(line)
                    if size > most:
                        self.skip(name, f"read up to line {number - 1} alone, {most >> 20} MiB")
                        break
                    found = _object(line)
                    if found is not None:
                        yield found
                    elif line.strip():
                        bad.append(number)
        except FileNotFoundError:
            return
        except OSError as error:
            self.skip(name, f"cannot be read ({error.strerror})")
        if bad:
            many = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
            self.skip(name, f"line {bad[0]}{many} torn, no whole JSON object")

    def of_format(self, pattern: str) -> list[str]:
        """Names of the files that match, relative to the folder, in order."""
        return sorted(path.relative_to(self.folder).as_posix() for path in self.folder.glob(pattern))


def number(value: Any) -> float | None:
    """A finite number with five digits, what a chart can show; None for all else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        value = float(value)
    except OverflowError:
        return None
    return float(f"{value:.5g}") if math.isfinite(value) else None


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line.decode("utf-8", errors="surrogateescape"))
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
