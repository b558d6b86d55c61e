"""A worker's own time: what its item took, less the time in which it only waited for a processor.

The clock on the wall runs on while a busy machine gives a worker nothing, and a verdict must not depend on that.
Linux counts for each thread the time on a processor and the time in a processor's queue (/proc/PID/schedstat); what
remains of the wall's time is sleep. Sleep is its own time too: an answer that sleeps or is deadlocked hangs.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass

_SPINS = 0.5  # of its own time on a processor: it computes, and does not wait


@dataclass(frozen=True)
class _Thread:
    """Seconds since it began. Asleep: it waits for something other than a processor or a disk."""

    cpu_s: float
    queued_s: float
    asleep: bool


class Clock:
    """Runs from when it is made. Counts the worker's living children and their threads: where one of them waits for a
    processor, so does the worker. What began and ended between two looks is not seen."""

    def __init__(self, pid: int):
        self._pid = pid
        self._started = self._seen = time.monotonic()
        self._threads = _family(pid)
        self.own_s = self._cpu_s = 0.0

    @property
    def wall_s(self) -> float:
        return time.monotonic() - self._started

    @property
    def spins(self) -> bool:
        return self._cpu_s >= _SPINS * self.own_s

    def look(self) -> float:
        """Own time until now, in seconds; to be asked now and then, since who is found waiting is taken to have waited
        since the last look."""
        threads, now = _family(self._pid), time.monotonic()
        past, self._seen = now - self._seen, now
        before, self._threads = self._threads, threads
        if not threads:  # no such file: not Linux's /proc. The wall's time is all there is
            self.own_s += past
            return self.own_s
        most_cpu = most_queued = 0.0
        for tid, thread in threads.items():
            then = before.get(tid, _Thread(0.0, 0.0, True))
            cpu_s = thread.cpu_s - then.cpu_s
            # Of a wait that still goes on, schedstat does not know.
            queued_s = thread.queued_s - then.queued_s if thread.asleep else past - cpu_s
            most_cpu, most_queued = max(most_cpu, cpu_s), max(most_queued, queued_s)
        self._cpu_s += min(most_cpu, past)
        self.own_s += min(max(most_cpu, past - most_queued), past)
        return self.own_s


def _family(pid: int) -> dict[int, _Thread]:
    """The threads of a process and of its descendants, by number."""
    found: dict[int, _Thread] = {}
    waiting = [pid]
    while waiting:
        process = waiting.pop()
        with contextlib.suppress(OSError, ValueError, IndexError):  # it has ended
            for tid in map(int, os.listdir(f"/proc/{process}/task")):
                folder = f"/proc/{process}/task/{tid}"
                cpu, queued = _read(f"{folder}/schedstat").split()[:2]
                state = _read(f"{folder}/stat").rpartition(")")[2].split()[0]
                if state not in "ZX":
                    found[tid] = _Thread(int(cpu) / 1e9, int(queued) / 1e9, state == "S")
                with contextlib.suppress(OSError):  # a kernel without that file
                    waiting += map(int, _read(f"{folder}/children").split())
    return found


def _read(path: str) -> str:
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read()
