"""The zygote's process, from our side."""

from __future__ import annotations

import array
import contextlib
import json
import select
import socket
import subprocess
import tempfile

from cipo_fast.verify.sandbox.tiers import Tier

START_S = 30.0


class Lost(Exception):
    """The zygote is gone, or does not answer. A fresh one can be tried."""


class Nest:
    """A running zygote. Raises Lost when it does not start."""

    def __init__(self, tier: Tier) -> None:
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed in close)
        command, environment = tier.command(theirs.fileno())
        try:
            self._process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._errors,
                pass_fds=[theirs.fileno()],
                cwd="/",
            )
        except OSError as error:
            self.control.close()
            self._errors.close()
            raise Lost(f"{command[0]} does not start ({error.strerror})") from error
        finally:
            theirs.close()
        try:
            ready = self._receive(START_S)
        except OSError:
            ready = b""
        if ready != b"ready":
            raise Lost(self.close())

    def _receive(self, seconds: float) -> bytes:
        poll = select.poll()
        poll.register(self.control, select.POLLIN)
        return self.control.recv(64) if poll.poll(seconds * 1000) else b""

    def start(self, name: str, channel: socket.socket, numpy: bool) -> None:
        """Ask for an execution whose end of the line is `channel`."""
        packet = json.dumps({"start": name, "numpy": numpy}).encode()
        descriptor = array.array("i", [channel.fileno()])
        try:
            self.control.sendmsg([packet], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptor)])
        except OSError as error:
            raise Lost(f"the zygote is gone ({error.strerror}); {self.close()}") from error

    def kill(self, name: str) -> None:
        with contextlib.suppress(OSError):
            self.control.send(json.dumps({"kill": name}).encode())

    def alive(self, wait_s: float = 0.2) -> bool:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(wait_s)
        return self._process.poll() is None

    def close(self) -> str:
        """End it and all its executions; what it said on standard error, in one line."""
        self.control.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        said = ""
        if not self._errors.closed:
            self._errors.seek(0)
            said = " ".join(self._errors.read()[-2000:].decode("utf-8", "replace").split("\n")).strip()
            self._errors.close()
        return said or f"exit code {self._process.returncode}"
