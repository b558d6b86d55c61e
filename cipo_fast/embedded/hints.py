"""Hints for the toy: `python -m cipo_fast.embedded.hints ROWS.jsonl OUT.jsonl [--shown]`.

ROWS are own-form rows with a prompt and an answer, such as the train.jsonl that an embedded run leaves under
`warm_start/`. A hint narrows the search, as NudgeRL's strategies do, and is not the answer: it tells a quarter of it,
its beginning or its end. OUT has the rows with a field `hints`; with --shown the rows twice over, bare and with one
hint in the prompt, for a warm start: a model that has never seen a hint cannot read one.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cipo_fast.errors import UserError, command
from cipo_fast.tasks.fields import plain, text_field
from cipo_fast.tasks.jsonl import read_lines


def hints_of(answer: str) -> list[str]:
    """Of `abfkmpqz`: `begins ab`, `ends qz`."""
    told = max(1, len(answer) // 4)
    return [f"begins {answer[:told]}", f"ends {answer[-told:]}"]


def with_hints(rows: Path, shown: bool) -> Iterator[dict[str, Any]]:
    """Raises UserError, naming file, row and field."""
    for number, where, row in read_lines(rows):
        prompt, hints = text_field(row, where, "prompt"), hints_of(text_field(row, where, "answer"))
        row = plain(row, where, "row")
        if shown:
            name = str(row.get("id", number))
            yield row
            yield {**row, "id": f"{name}-hinted", "prompt": f"{prompt}\n\n{hints[number % 2]}"}
        else:
            yield {**row, "hints": hints}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m cipo_fast.embedded.hints", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("rows", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--shown", action="store_true", help="rows for a warm start: bare, and with a hint in the prompt"
    )
    options = parser.parse_args(argv)

    def write() -> None:
        if not options.rows.is_file():
            raise UserError(f"no file {options.rows}")
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in with_hints(options.rows, options.shown))
        try:
            options.out.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"{options.out}: cannot be written: {error.strerror}") from None

    return command(write)


if __name__ == "__main__":
    sys.exit(main())
