"""The zygote's process, from our side."""

from __future__ import annotations

import array
import contextlib
import json
import os
import select
import shutil
import socket
import subprocess
import tempfile

from cipo_fast.verify.sandbox.tiers import NOBODY, Tier

START_S = 30.0


class Lost(Exception):
    """The zygote is gone, or does not answer. A fresh one can be tried."""


class Nest:
    """A running zygote. Raises Lost when it does not start."""

    def __init__(self, tier: Tier) -> None:
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed in close)
        self._scratch = "" if tier.kind == "bubblewrap" else _scratch(tier)
        command, environment = tier.command(theirs.fileno(), self._scratch)
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
        """End it and all its executions; the last line of what it said on standard error."""
        self.control.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        if self._scratch:
            shutil.rmtree(self._scratch, ignore_errors=True)
        said = ""
        if not self._errors.closed:
            self._errors.seek(0)
            said = self._errors.read()[-2000:].decode("utf-8", "replace").strip().rpartition("\n")[2]
            self._errors.close()
        return said or f"exit code {self._process.returncode}"


def _scratch(tier: Tier) -> str:
    """A folder for the files of programs that have no /tmp of their own."""
    folder = tempfile.mkdtemp(prefix="cipo-sandbox-")
    if os.geteuid() == 0 and tier.kind != "none":
        os.chown(folder, NOBODY, NOBODY)
    return folder
