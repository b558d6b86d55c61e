"""Errors whose message is all a user needs, and how every command ends with them: one line and an exit code."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import traceback
from collections.abc import Callable

# Control characters, and what turns the direction of text around: a terminal would obey them.
_UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


class Ending(Exception):
    """What ends a command: one line on standard error, and an exit code."""

    word, exit_code = "stopped", 1
    told = False  # another rank prints it

    @property
    def line(self) -> str:
        return f"{self.word}: {self}"


class UserError(Ending):
    """Bad input: one line that says what, where and what to do. The command prints it and exits with code 2."""

    word, exit_code = "error", 2


class TrainingStopped(Ending):
    """The run cannot go on (three non-finite steps in a row, say). State is saved; exits with code 1."""


class PolicyBroken(TrainingStopped):
    """The weights are not fit to be saved: the newest checkpoint is the state to go on from."""


class RankFailure(TrainingStopped):
    """An exception that nobody foresaw, told on every rank; on the rank that met it, it is the `__cause__`."""


class Preempted(Ending):
    """A signal asked for the run's end. State is saved; exits with code 75, EX_TEMPFAIL of sysexits.h: "try again"."""

    exit_code = 75

    @property
    def line(self) -> str:
        return f"stopped by {self}; the same command goes on"


class EngineFailure(Exception):
    """The engine did not do what it was asked. A fresh one with the same weights can be asked again."""


def command(body: Callable[[], None], interrupted: str = "interrupted") -> int:
    """Run a command and return its exit code: 0, or 1 and 2 with one line on standard error for the errors above, or
    130 with the line `interrupted`. An error that another rank has `told` (distributed.py) is not printed again."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # what a terminal or a pipe cannot take becomes a question mark
    if isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr.reconfigure(errors="backslashreplace")
    try:
        body()
    except Ending as error:
        if isinstance(error, TrainingStopped) and error.__cause__ is not None:  # what nobody foresaw
            traceback.print_exception(error.__cause__)
        if not error.told:
            note(error.line)
        return error.exit_code
    except KeyboardInterrupt as error:
        if not getattr(error, "told", False):
            note(interrupted)
        return 130
    return 0


def note(text: str) -> None:
    """One line on standard error, if anybody can read it."""
    with contextlib.suppress(OSError, ValueError):
        print(visible(" ".join(text.split("\n"))), file=sys.stderr, flush=True)


def put(text: str) -> None:
    """Text on standard output; a reader that went away (`| head`) is no error, a full disk ends in a note."""
    try:
        print(text, flush=True)
    except OSError as error:
        stop_printing()
        if not isinstance(error, BrokenPipeError):
            note(f"standard output cannot be written ({error.strerror})")


def stop_printing() -> None:
    """Standard output has no reader any more: what is still printed goes nowhere."""
    with contextlib.suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


def visible(text: str) -> str:
    """Foreign text as one line that a terminal prints and does not obey: control characters as escapes."""
    return _UNSEEN.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)
