"""One execution: start the program, feed it, keep its limits, end all it left behind, report.

The supervisor is process 1 of the execution's namespaces where there are any: the program cannot signal it, and when it
ends the kernel kills what is left. It relays messages between the program and our side and never reads them.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import tempfile
import time
from typing import Any

from . import lockdown, processes, program
from .wire import Frames, TooLong, frame

TICK_MS = 10
_CHUNK = 1 << 16
_ROOM = 256  # tasks beside those there were, for all executions of a uid: where the kernel cannot count each alone
MAX_TOLD = 64 << 20  # all messages of one execution


class Cancelled(Exception):
    """Our side is no longer interested."""


def supervise(channel: socket.socket, isolation: str, uid: int, scratch: str, others: int) -> None:
    """Read one request from `channel`, run it, write messages and the last report. `others`: tasks that the uid had
    already. Never raises Cancelled."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    namespaces = isolation == "namespaces"
    frames = Frames(longest=256 << 20)
    with contextlib.suppress(Cancelled, BrokenPipeError, ConnectionResetError):
        waiting = _first(channel, frames)
        request = json.loads(waiting[0])
        if namespaces:
            lockdown.furnish(uid, uid, request["limits"]["file_mib"] << 20)
            request |= {"folder": "/tmp", "tasks": request["limits"]["processes"] + 1}  # the supervisor is one
        else:
            lockdown.reap_descendants()
            tasks = others + _ROOM if isolation == "landlock" else 0
            request |= {"folder": tempfile.mkdtemp(dir=scratch), "tasks": tasks}
        lockdown.dumpable(False)
        try:
            report = Execution(channel, frames, request, isolation).run(waiting[1:])
        finally:
            if not namespaces:
                shutil.rmtree(request["folder"], ignore_errors=True)
        channel.sendall(report)  # the last thing: who reads it finds nothing left behind


def _first(channel: socket.socket, frames: Frames) -> list[bytes]:
    found: list[bytes] = []
    while not found:
        data = channel.recv(_CHUNK)
        if not data:
            raise Cancelled
        found = frames.feed(data)
    return found


class Execution:
    def __init__(self, channel: socket.socket, frames: Frames, request: dict[str, Any], isolation: str) -> None:
        self.channel, self.frames, self.request, self.isolation = channel, frames, request, isolation
        self.limits = request["limits"]
        self.output: dict[int, bytearray] = {}
        self.told, self.told_bytes = Frames(), 0
        self.pending: dict[int, bytearray] = {}  # what is still to be written, by descriptor
        self.done: tuple[str, str] | None = None  # outcome and detail, once decided

    def run(self, waiting: list[bytes]) -> bytes:
        """The frame of the report, which is still to be sent."""
        theirs, ours = self._pipes()
        self.started = time.monotonic()
        self.pid = os.fork()
        if self.pid == 0:
            program.main(self.request, theirs, self.isolation, self.channel.fileno(), ours)
        self.channel.sendall(frame(b"s"))  # from here on whatever happens is the program's doing
        for descriptor in theirs:
            os.close(descriptor)
        self._arrange(ours, waiting)
        watched = os.pidfd_open(self.pid)
        self.poll.register(watched, select.POLLIN)
        status = None
        while status is None and self.done is None:
            self._events(watched)
            status = self._status()
            self._check_limits()
        usage = self._end_all(status)
        self._drain()
        return self._report(status if status is not None else usage)

    def _pipes(self) -> tuple[list[int], list[int]]:
        """(theirs, ours) of: stdin, stdout, stderr, tell (the program's messages), ask (messages for it)."""
        theirs, ours = [], []
        for towards_program in (True, False, False, False, True):
            reader, writer = os.pipe()
            theirs.append(reader if towards_program else writer)
            ours.append(writer if towards_program else reader)
        return theirs, ours

    def _arrange(self, ours: list[int], waiting: list[bytes]) -> None:
        stdin, self.stdout, self.stderr, self.tell, self.ask = ours
        self.output = {self.stdout: bytearray(), self.stderr: bytearray()}
        self.pending = {stdin: bytearray(self.request.get("stdin", "").encode("utf-8", "surrogatepass"))}
        self.pending[self.ask] = bytearray(b"".join(frame(message) for message in waiting))
        self.poll = select.poll()
        for descriptor in ours:
            os.set_blocking(descriptor, False)
        for descriptor in (self.stdout, self.stderr, self.tell, self.channel.fileno()):
            self.poll.register(descriptor, select.POLLIN)
        for descriptor in (stdin, self.ask):
            self._write(descriptor)

    # -- events

    def _events(self, watched: int) -> None:
        for descriptor, event in self.poll.poll(TICK_MS):
            if descriptor in self.pending:
                self._write(descriptor)
            elif descriptor == self.channel.fileno():
                self._from_our_side()
            elif descriptor != watched and event:
                self._read(descriptor)

    def _from_our_side(self) -> None:
        data = self.channel.recv(_CHUNK)
        if not data:
            self._end_all(None)
            raise Cancelled
        if self.ask in self.pending:
            for message in self.frames.feed(data):
                self.pending[self.ask] += frame(message)
            self._write(self.ask)

    def _write(self, descriptor: int) -> None:
        """Write what the pipe takes; stdin is closed behind its last byte, `ask` stays open."""
        left = self.pending[descriptor]
        try:
            while left:
                del left[: os.write(descriptor, left[:_CHUNK])]
        except BlockingIOError:
            self.poll.register(descriptor, select.POLLOUT)
            return
        except BrokenPipeError:
            left.clear()
        with contextlib.suppress(KeyError):
            self.poll.unregister(descriptor)
        if descriptor != self.ask:
            os.close(descriptor)
            del self.pending[descriptor]

    def _read(self, descriptor: int) -> bool:
        """Take what is there; False when there is nothing (more)."""
        try:
            data = os.read(descriptor, _CHUNK)
        except BlockingIOError:
            return False
        if not data:
            self.poll.unregister(descriptor)
            return False
        if descriptor == self.tell:
            self._tell(data)
        else:
            self.output[descriptor] += data
            if sum(map(len, self.output.values())) > self.limits["output_kib"] << 10:
                self._decide("output", f"more than {self.limits['output_kib']} KiB of output")
                return False
        return True

    def _tell(self, data: bytes) -> None:
        self.told_bytes += len(data)
        try:
            if self.told_bytes > MAX_TOLD:
                raise TooLong(f"{self.told_bytes} bytes of messages")
            messages = self.told.feed(data)
        except TooLong as error:
            self._decide("output", str(error))
            return
        for message in messages:
            self.channel.sendall(frame(b"m" + message))

    # -- limits

    def _status(self) -> int | None:
        """Reap what ended; the program's own status once it did."""
        found = None
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    break
                if pid == self.pid:
                    found = status
        return found

    def _check_limits(self) -> None:
        elapsed = time.monotonic() - self.started
        if elapsed < 0.02 or self.done:
            return
        if elapsed > self.limits["wall_s"]:
            self._decide("timeout", f"more than {self.limits['wall_s']:g} s by the clock")
            return
        seen = processes.survey(self.isolation == "namespaces")
        if seen.cpu_s > self.limits["cpu_s"]:
            self._decide("timeout", f"more than {self.limits['cpu_s']:g} s of CPU time")
        elif seen.resident > self.limits["memory_mib"] << 20 and seen.exact() > self.limits["memory_mib"] << 20:
            self._decide("memory", f"more than {self.limits['memory_mib']} MiB of memory")
        elif self.isolation != "namespaces" and seen.threads > self.limits["processes"]:
            self._decide("processes", f"more than {self.limits['processes']} processes")

    def _decide(self, outcome: str, detail: str) -> None:
        self.done = self.done or (outcome, detail)

    # -- the end

    def _end_all(self, status: int | None) -> int:
        """Kill and reap everything that runs; the program's status."""
        found = 0 if status is None else status
        while True:
            processes.kill_all(self.isolation == "namespaces")
            try:
                pid, ended = os.waitpid(-1, 0)
                while pid:
                    found = ended if pid == self.pid else found
                    pid, ended = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return found

    def _drain(self) -> None:
        for descriptor in (self.tell, self.stdout, self.stderr):
            with contextlib.suppress(KeyError, OSError):
                while self._read(descriptor):
                    pass

    def _report(self, status: int) -> bytes:
        code = os.waitstatus_to_exitcode(status)
        outcome, detail = self.done or ("exit", "")
        if self.done is None and code in (-signal.SIGXCPU, -signal.SIGKILL) and self._cpu_spent():
            outcome, detail = "timeout", f"more than {self.limits['cpu_s']:g} s of CPU time"
        keep = self.limits["output_kib"] << 10
        report = {
            "outcome": outcome,
            "detail": detail,
            "code": code,
            "stdout": self.output[self.stdout][:keep].decode("utf-8", "replace"),
            "stderr": self.output[self.stderr][-4096:].decode("utf-8", "replace"),
        }
        return frame(b"e" + json.dumps(report).encode())

    def _cpu_spent(self) -> bool:
        times = os.times()
        return times.children_user + times.children_system >= self.limits["cpu_s"]
