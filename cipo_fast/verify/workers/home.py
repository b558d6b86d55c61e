"""The trainer's side of the nursery: the process, its control socket, and what it has told."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from typing import Any

from cipo_fast.verify.workers.frames import Message

START_S = 120.0  # until it has loaded sympy
REPLY_S = 30.0  # a living one needs a millisecond
# Not `-m`: modules come from where the trainer's come from, whatever the folder it was started in.
_START = "import sys; fd, *sys.path = sys.argv[1:]; from cipo_fast.verify.workers.nursery import main; main(int(fd))"


class Home:
    """A running nursery. Its methods never block; OSError where it is gone or does not listen."""

    def __init__(self) -> None:
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        path = [os.path.abspath(entry) for entry in sys.path]
        with theirs, tempfile.TemporaryFile() as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _START, str(theirs.fileno()), *path],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl+C in the terminal is the trainer's to answer
            )
            self._errors = os.fdopen(os.dup(errors.fileno()), "rb")
        self.control.setblocking(False)
        self.ready = False
        self._unanswered = 0
        self._reply_due = time.monotonic() + START_S

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def stuck(self) -> bool:
        """It was asked something long ago, or does not get started."""
        return (self._unanswered > 0 or not self.ready) and time.monotonic() > self._reply_due

    def fork(self, worker: int, memory_mib: int, sock: socket.socket) -> None:
        self._ask({"fork": worker, "memory_mib": memory_mib}, sock)

    def kill(self, worker: int) -> None:
        self._ask({"kill": worker})

    def signal(self, what: str, worker: int) -> None:
        """stop or go."""
        self.control.send(json.dumps({what: worker}).encode())

    def heard(self) -> list[Message]:
        """What it has told since. EOFError when it has ended."""
        messages: list[Message] = []
        while True:
            try:
                packet = self.control.recv(1 << 16)
            except BlockingIOError:
                return messages
            except OSError as error:
                raise EOFError from error
            if not packet:
                if messages:
                    return messages  # the end is met again
                raise EOFError
            message = json.loads(packet)
            self.ready = self.ready or "ready" in message
            if "forked" in message or "killed" in message or "why" in message:
                self._unanswered -= 1
            self._reply_due = time.monotonic() + REPLY_S
            messages.append(message)

    def end(self, groups: list[int]) -> str:
        """Ends it at once, and its workers' process groups; what it said last. Its own end kills the workers, but not
        their children."""
        with contextlib.suppress(OSError):
            self._process.kill()
        self._process.wait()
        for group in groups:
            with contextlib.suppress(OSError):
                os.killpg(group, signal.SIGKILL)
        self.control.close()
        with self._errors:
            self._errors.seek(0)
            lines = self._errors.read().decode("utf-8", "replace").strip().splitlines()
        return lines[-1] if lines else f"it ended with code {self._process.returncode}"

    def leave(self) -> None:
        """Lets it end by itself, its workers first; waits for it."""
        self.control.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=10.0)
        self.end([])

    def _ask(self, message: dict[str, Any], sock: socket.socket | None = None) -> None:
        fds = [] if sock is None else [sock.fileno()]
        socket.send_fds(self.control, [json.dumps(message).encode()], fds)
        if self._unanswered == 0 and self.ready:
            self._reply_due = time.monotonic() + REPLY_S
        self._unanswered += 1
