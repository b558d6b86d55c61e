"""Signals that ask a run to end: the step ends, everything is saved, the exit code says so.

The handler takes a note and does no more, so nothing is torn: a checkpoint being written, a collective that the other
ranks are in. The loop asks for notes where it can stop (`check`), and all ranks answer alike, whichever was signalled.
"""

from __future__ import annotations

import os
import signal
import time
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from cipo_fast.distributed import starts_first
from cipo_fast.errors import Preempted

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
AGAIN_S = 1.0  # one Ctrl-C may come twice, from the terminal and from torchrun


class StopSignals:
    """While open, SIGNALS are noted, but for those that were ignored (nohup, a shell's background jobs). A second
    Ctrl-C raises KeyboardInterrupt at once."""

    def __init__(self) -> None:
        self.received = 0
        self.since = 0.0
        self.before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        self.before = {s: handler for s in SIGNALS if (handler := signal.getsignal(s)) is not signal.SIG_IGN}
        self.install()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def install(self) -> None:
        """Again after an engine has been started in this process: it may have handlers of its own."""
        for number in self.before:
            signal.signal(number, self._note)

    def check(self) -> None:
        """Raises Preempted on every rank if one has been signalled. A collective."""
        received = torch.tensor(self.received)
        if dist.get_world_size() > 1:
            dist.all_reduce(received, dist.ReduceOp.MAX)
        if received:
            raise Preempted(signal.Signals(int(received)).name)

    def _note(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self.received and number == signal.SIGINT and now - self.since > AGAIN_S:
            raise KeyboardInterrupt
        if not self.received:
            self.received, self.since = number, now
            if starts_first():  # no print: it may be what the signal came into
                os.write(2, b"asked to stop: the step ends, then all is saved (Ctrl-C again ends at once)\n")
