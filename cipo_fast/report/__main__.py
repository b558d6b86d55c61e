"""What runs did, as one page that opens from the disk: no network, no server.

    python -m cipo_fast.report RUN [RUN ...] [--out report.html]

RUN is a run's folder, ended or not. Runs that differ in their seed alone are drawn as one curve with a band.

    --out FILE     where the page goes (default: report.html in the folder of a single RUN, else in this one)
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from cipo_fast.errors import UserError, command, put
from cipo_fast.report.page import write_page


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Exit codes: 0 done, 2 bad input (one line says what)."""
    return command(lambda: run(list(sys.argv[1:] if argv is None else argv)))


def run(args: list[str]) -> None:
    if not args or {"-h", "--help"} & set(args):
        put((__doc__ or "").strip())
        return
    folders, out = parse(args)
    try:
        size = write_page(folders, out)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror or error})") from None
    put(f"{out}: {size / 1e6:.1f} MB, open it in a browser")


def parse(args: Sequence[str]) -> tuple[list[Path], Path]:
    """(the runs' folders, where the page goes); raises UserError."""
    folders: list[Path] = []
    out: Path | None = None
    left = iter(args)
    for arg in left:
        if arg == "--out" or arg.startswith("--out="):
            value = next(left, "") if arg == "--out" else arg.removeprefix("--out=")
            if not value:
                raise UserError("--out: a file name is expected")
            out = Path(value)
        elif arg.startswith("-"):
            raise UserError(f"unknown option {arg}: expected runs' folders and --out FILE")
        else:
            folders.append(Path(arg))
    if not folders:
        raise UserError("a run's folder is expected, runs/NAME")
    default = folders[0] / "report.html" if len(folders) == 1 else Path("report.html")
    return folders, default if out is None else out


if __name__ == "__main__":
    sys.exit(main())
