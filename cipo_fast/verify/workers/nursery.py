"""Where workers are born and die: a small process that never loads torch, forks workers, kills and reaps them.

A worker is forked here and not in the trainer, which has threads and a GPU. Here is its parent, so here it is killed:
until its parent has reaped it, no other process can have its number.

On the control socket, one JSON object a packet:
    {"fork": id, "memory_mib"} with the worker's socket  ->  {"forked": id, "pid"}, later {"ended": id, "status"}
    {"kill": id}                                         ->  {"killed": id}
    {"stop": id}, {"go": id}                                 no reply
Before all: {"ready"}. When the trainer is gone the socket ends, and with it every worker and the nursery.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import selectors
import signal
import socket
import tempfile
import time
from typing import NoReturn

from cipo_fast.verify.workers.worker import Worker

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
GRACE_S = 0.5  # for workers to close what they have, when the trainer is gone
LARGEST_PACKET = 1 << 16
_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "go": signal.SIGCONT}


class Nursery:
    def __init__(self, control: socket.socket):
        self._control = control
        self._workers: dict[int, int] = {}  # pid -> id
        self._trainer = os.getppid()

    def run(self) -> None:
        """Returns when the trainer is gone and every worker is dead."""
        wake, wake_write = socket.socketpair()
        wake.setblocking(False)
        wake_write.setblocking(False)
        signal.signal(signal.SIGCHLD, _woken)
        signal.set_wakeup_fd(wake_write.fileno(), warn_on_full_buffer=False)
        with selectors.DefaultSelector() as selector:
            selector.register(self._control, selectors.EVENT_READ)
            selector.register(wake, selectors.EVENT_READ)
            self._tell({"ready": True})
            while os.getppid() == self._trainer:  # a fork of the trainer may keep the socket open
                ready = [key.fileobj for key, _ in selector.select(timeout=1.0)]
                if wake in ready:
                    with contextlib.suppress(BlockingIOError):
                        wake.recv(4096)
                if self._control in ready and not self._obey():
                    break
                self._reap()
        self._end()

    def _obey(self) -> bool:
        """False: the trainer is gone."""
        try:
            packet, fds, _, _ = socket.recv_fds(self._control, LARGEST_PACKET, 1)
        except OSError:
            return False
        if not packet:
            return False
        message = json.loads(packet)
        if "fork" in message:
            self._fork(message["fork"], message["memory_mib"], fds[0])
            os.close(fds[0])
            return True
        (what, worker) = next(iter(message.items()))
        pid = next((pid for pid, known in self._workers.items() if known == worker), 0)
        if pid:
            _signal_group(pid, _SIGNALS[what])
        if what == "kill":
            self._tell({"killed": worker})
        return True

    def _fork(self, worker: int, memory_mib: int, fd: int) -> None:
        try:
            pid = os.fork()
        except OSError as error:
            self._tell({"ended": worker, "status": 0, "why": f"no worker can be forked: {error.strerror}"})
            return
        if pid == 0:
            self._become_worker(fd, memory_mib)
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)  # the child does it too: whoever is first
        self._workers[pid] = worker
        self._tell({"forked": worker, "pid": pid})

    def _become_worker(self, fd: int, memory_mib: int) -> NoReturn:
        try:
            nursery = os.getppid()
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            os.setpgid(0, 0)
            _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != nursery:
                os._exit(0)
            self._control.close()
            os.dup2(1, 2)  # what a worker prints, nobody reads
            Worker(socket.socket(fileno=fd), memory_mib).serve()
        finally:
            os._exit(0)  # also past threads that a user's function left

    def _reap(self) -> None:
        """Bury who has died: first what is left of a worker's group, while its number is still its own."""
        while True:
            try:
                dead = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                break
            if dead is None:
                break
            worker = self._workers.pop(dead.si_pid, None)
            if worker is not None:
                _signal_group(dead.si_pid, signal.SIGKILL)
            status = os.waitstatus_to_exitcode(os.waitpid(dead.si_pid, 0)[1])
            if worker is not None:
                self._tell({"ended": worker, "status": status})
        self._kill_orphans()

    def _kill_orphans(self) -> None:
        """Children that are no workers: what a worker's descendants left when they died, in a group of their own.
        They come here since the nursery is a subreaper."""
        for pid in _children():
            if pid not in self._workers:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)

    def _end(self) -> None:
        until = time.monotonic() + GRACE_S
        while self._workers and time.monotonic() < until:
            self._reap()
            time.sleep(0.01)
        for pid in self._workers:
            _signal_group(pid, signal.SIGKILL)
        until = time.monotonic() + 5.0
        while time.monotonic() < until and _children():
            self._reap()
            time.sleep(0.01)

    def _tell(self, message: dict[str, object]) -> None:
        with contextlib.suppress(OSError):  # the trainer is gone: the next read says so
            self._control.send(json.dumps(message).encode())


def _woken(*_: object) -> None:
    """SIGCHLD needs a handler for its byte to be written to the wake-up socket."""


def _signal_group(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(OSError):
        os.killpg(pid, number)
    with contextlib.suppress(OSError):
        os.kill(pid, number)


def _children() -> list[int]:
    """Process numbers of all children, dead ones among them."""
    try:
        with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as file:
            return [int(pid) for pid in file.read().split()]
    except OSError:  # a kernel without that file
        return [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if _parent(pid) == os.getpid()]


def _parent(pid: int) -> int | None:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return int(file.read().rpartition(")")[2].split()[1])
    except (OSError, IndexError, ValueError):
        return None


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None).prctl(option, ctypes.c_ulong(value), 0, 0, 0)


def preload() -> None:
    """What every worker needs, loaded and warmed once. A part that fails is loaded, and fails, in a worker, with a
    line that says so."""
    with contextlib.suppress(Exception):
        from cipo_fast.verify import math as math
        from cipo_fast.verify.math.fallback import math_verify_agrees

        math_verify_agrees("\\sqrt{8}", "2\\sqrt{2}")  # the parser's tables are built by its first use
    with contextlib.suppress(ImportError):
        from cipo_fast.verify import code as code
        from cipo_fast.verify import sandbox as sandbox
    gc.collect()
    gc.freeze()  # workers share these pages


def main(fd: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the trainer decides
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    preload()
    with tempfile.TemporaryDirectory(prefix="cipo-judges-") as folder:  # what killed workers leave in it goes with it
        os.chmod(folder, 0o711)  # a sandbox's user must get through
        os.environ["TMPDIR"] = tempfile.tempdir = folder
        Nursery(socket.socket(fileno=fd)).run()
