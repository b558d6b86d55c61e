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
    """Seconds since it began. State, as in /proc: S asleep, R running or in the queue, T stopped."""

    cpu_s: float
    queued_s: float
    state: str


class Clock:
    """Runs from when it is made. Counts the worker's living children and their threads: where one of them waits for a
    processor, so does the worker. What began and ended between two looks is not seen."""

    def __init__(self, pid: int):
        self._pid = pid
        self._started = self._since = time.monotonic()
        self._threads = _family(pid)  # as they were then
        self._past_own_s = self._past_cpu_s = 0.0  # until then
        self.own_s = self._cpu_s = 0.0

    @property
    def wall_s(self) -> float:
        return time.monotonic() - self._started

    @property
    def spins(self) -> bool:
        return self._cpu_s >= _SPINS * self.own_s

    def look(self) -> float:
        """Own time until now, in seconds. While a thread is in the queue schedstat does not know for how long: until it
        is seen asleep, only its time on a processor counts."""
        threads, now = _family(self._pid), time.monotonic()
        span_s = now - self._since
        if not threads:  # no such file: not Linux's /proc. The wall's time is all there is
            self.own_s = self._past_own_s + span_s
            return self.own_s
        most_cpu = most_queued = 0.0
        for tid, thread in threads.items():
            then = self._threads.get(tid, _Thread(0.0, 0.0, "S"))
            cpu_s = thread.cpu_s - then.cpu_s
            queued_s = thread.queued_s - then.queued_s if thread.state == "S" else span_s - cpu_s
            most_cpu, most_queued = max(most_cpu, cpu_s), max(most_queued, queued_s)
        self._cpu_s = self._past_cpu_s + min(most_cpu, span_s)
        self.own_s = self._past_own_s + min(max(most_cpu, span_s - most_queued), span_s)
        states = {thread.state for thread in threads.values()}
        if states == {"S"} or "T" in states:  # nothing is left open, or what was stopped did not sleep
            self._past_own_s, self._past_cpu_s = self.own_s, self._cpu_s
            self._since, self._threads = now, threads
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
                state = _read(f"{folder}/stat").rpartition(")")[2].split()[0]
                cpu, queued = _read(f"{folder}/schedstat").split()[:2]
                if state not in "ZX":
                    found[tid] = _Thread(int(cpu) / 1e9, int(queued) / 1e9, state)
                with contextlib.suppress(OSError):  # a kernel without that file
                    waiting += map(int, _read(f"{folder}/children").split())
    return found


def _read(path: str) -> str:
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read()
