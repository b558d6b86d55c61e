"""python -m cipo_fast.tasks check FILE [FILE ...] [--eval FILE ...] [key=value ...]

What is in JSON Lines, Parquet or hub data sets: problems a source and verifier, lengths, repeated questions, questions
that are held out too, and golds that do not verify against themselves. Settings are those of a run, such as
data.format=gsm8k or data.verifier=math. Exit code 0: nothing is wrong; 1: golds do not verify, or questions are held
out too; 2: bad input.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from cipo_fast.config import OVERRIDE
from cipo_fast.config.settings import from_system
from cipo_fast.errors import UserError, command, note, put


def main(argv: Sequence[str] | None = None) -> int:
    args = [from_system(arg, f"argument {arg!r}") for arg in (sys.argv[1:] if argv is None else argv)]
    found = 0

    def body() -> None:
        nonlocal found
        if not args or args[0] in ("-h", "--help"):
            put(__doc__ or "")
            return
        if args[0] != "check":
            raise UserError(f"{args[0]}: expected `check FILE [FILE ...] [--eval FILE ...] [key=value ...]`")
        files, held_out, overrides = _parsed(args[1:])
        from cipo_fast.tasks.check import check

        found = check(files, held_out, overrides, note)

    return command(body, "interrupted") or found


def _parsed(args: list[str]) -> tuple[list[str], list[str], list[str]]:
    """(files, files after --eval, settings)."""
    files: list[str] = []
    held_out: list[str] = []
    overrides: list[str] = []
    into = files
    for arg in args:
        if arg == "--eval":
            into = held_out
        elif arg.startswith("-"):
            raise UserError(f"unknown option {arg}: expected files, --eval and key.path=value")
        else:
            (overrides if OVERRIDE.match(arg) else into).append(arg)
    if not files:
        raise UserError("check: name a file, or hub:OWNER/NAME")
    if into is held_out and not held_out:
        raise UserError("--eval: name a file of held-out problems")
    return files, held_out, overrides


if __name__ == "__main__":
    sys.exit(main())
