"""The processes of one execution, as its supervisor sees them in /proc."""

from __future__ import annotations

import contextlib
import os
import signal
from dataclasses import dataclass, field

_PAGE, _TICKS = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_CLK_TCK")


@dataclass
class Survey:
    """What the processes use together; `cpu_s` with those that were reaped."""

    cpu_s: float = 0.0
    resident: int = 0  # bytes; pages that processes share count for each
    threads: int = 0
    pids: list[int] = field(default_factory=list)

    def exact(self) -> int:
        """Bytes, shared pages counted once: dear, asked only when `resident` is above a limit."""
        return sum(_proportional(pid) for pid in self.pids)


def ours(namespaces: bool) -> list[int]:
    """In a pid namespace everybody but process 1; elsewhere the descendants of the calling process."""
    if namespaces:
        return [int(name) for name in os.listdir("/proc") if name.isdigit() and name != "1"]
    found, ahead = [], [os.getpid()]
    while ahead:
        for child in _children(ahead.pop()):
            found.append(child)
            ahead.append(child)
    return found


def _children(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children", encoding="latin-1") as file:
                found += map(int, file.read().split())
    return found


def survey(namespaces: bool) -> Survey:
    """A process gives itself any name, of bytes that are no text too: each byte is a character here."""
    times = os.times()
    seen = Survey(cpu_s=times.children_user + times.children_system)
    for pid in ours(namespaces):
        with contextlib.suppress(OSError, ValueError, IndexError):
            with open(f"/proc/{pid}/stat", encoding="latin-1") as file:
                fields = file.read().rpartition(")")[2].split()
            seen.cpu_s += (int(fields[11]) + int(fields[12])) / _TICKS
            seen.threads += int(fields[17])
            seen.resident += int(fields[21]) * _PAGE
            seen.pids.append(pid)
    return seen


def _proportional(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/smaps_rollup", encoding="latin-1") as file:
            return sum(int(line.split()[1]) << 10 for line in file if line.startswith("Pss:"))
    except OSError:
        pass
    # It hides its maps: the upper bound.
    with contextlib.suppress(OSError), open(f"/proc/{pid}/statm", encoding="latin-1") as file:
        return int(file.read().split()[1]) * _PAGE
    return 0


def kill_all(namespaces: bool) -> None:
    """SIGKILL to everybody; in a pid namespace at once, elsewhere stopped first so that none forks away."""
    if namespaces:
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)
        return
    for _ in range(3):
        for pid in ours(False):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)


def of_uid(uid: int) -> int:
    """Tasks of a uid on this machine, as far as /proc shows them."""
    count = 0
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if name.isdigit() and os.stat(f"/proc/{name}").st_uid == uid:
                count += len(os.listdir(f"/proc/{name}/task"))
    return count
