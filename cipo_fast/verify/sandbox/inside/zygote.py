"""The process that programs are forked from: it has loaded what they need, and never runs any of them itself.

It gets one packet an execution, with the execution's channel (a socket) attached, and forks a supervisor that knows
nothing but that channel. It ends when our side does.
"""

from __future__ import annotations

import array
import contextlib
import gc
import json
import os
import resource
import select
import shutil
import signal
import socket
import sys
import time
from typing import Any

from . import lockdown, processes, supervisor, usual


def main(settings: dict[str, Any]) -> None:
    """`settings`: control (descriptor), isolation, uid (to become, when started by root), site (where numpy is)."""
    if _restart_with_stack(settings):
        return
    lockdown.die_with_parent()
    if settings["isolation"] == "namespaces" and settings["mount_proc"]:
        lockdown.mount_proc()
    if settings["isolation"] == "landlock":
        from . import landlock

        landlock.load(settings["sandlock"], settings["readable"])
    if settings["become"]:
        lockdown.become(settings["become"])
        lockdown.die_with_parent()  # changing the uid forgets it
        lockdown.dumpable(True)  # the new uid must write its children's uid maps
    if not os.access(os.__file__, os.R_OK):
        raise SystemExit(f"uid {os.getuid()} cannot read {os.path.dirname(os.__file__)}: use a Python that others can read")
    for path in settings["site"]:
        sys.path.append(path)
    usual.load()
    zygote = Zygote(settings)
    zygote.serve()
    zygote.end()


def _restart_with_stack(settings: dict[str, Any]) -> bool:
    """Room for a deep stack is laid out when a process starts: start again with the limit raised."""
    soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
    wanted = lockdown.STACK if hard == resource.RLIM_INFINITY else min(hard, lockdown.STACK)
    if soft == wanted:
        return False
    resource.setrlimit(resource.RLIMIT_STACK, (wanted, hard))
    os.set_inheritable(settings["control"], True)
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


class Zygote:
    def __init__(self, settings: dict[str, Any]) -> None:
        self.isolation, self.uid, self.scratch = settings["isolation"], os.getuid(), settings["scratch"]
        self.others = processes.of_uid(self.uid)
        self.control = socket.socket(fileno=settings["control"])
        self.control.set_inheritable(False)
        self.running: dict[str, int] = {}  # execution -> its supervisor's pid
        wake, self.wake = os.pipe()
        os.set_blocking(self.wake, False)
        os.set_blocking(wake, False)
        self.woken = wake
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self.wake)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who started us

    def serve(self) -> None:
        gc.collect()
        gc.freeze()
        self.control.send(b"ready")
        poll = select.poll()
        poll.register(self.control, select.POLLIN)
        poll.register(self.woken, select.POLLIN)
        while True:
            for descriptor, _ in poll.poll():
                if descriptor == self.woken:
                    with contextlib.suppress(BlockingIOError):
                        os.read(self.woken, 4096)
                elif not self._packet():
                    return
            self._reap()

    def _packet(self) -> bool:
        """Start or kill an execution; False when our side is gone."""
        space = socket.CMSG_SPACE(array.array("i").itemsize)
        data, ancillary, _, _ = self.control.recvmsg(4096, space)
        if not data:
            return False
        packet = json.loads(data)
        if "kill" in packet:
            with contextlib.suppress(KeyError, ProcessLookupError):
                os.kill(self.running[packet["kill"]], signal.SIGKILL)
            return True
        if packet["numpy"] and "numpy" not in sys.modules:
            self._load_numpy()
        descriptors = array.array("i")
        for _, _, content in ancillary:
            descriptors.frombytes(content)
        self._start(packet["start"], descriptors[0])
        return True

    def _load_numpy(self) -> None:
        with contextlib.suppress(ImportError):
            __import__("numpy")
        gc.collect()
        gc.freeze()

    def _start(self, name: str, channel: int) -> None:
        pid = lockdown.clone_into_namespaces() if self.isolation == "namespaces" else os.fork()
        if pid == 0:
            try:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                if self.isolation != "namespaces":
                    lockdown.die_with_parent()
                for descriptor in (self.control.fileno(), self.wake, self.woken):
                    os.close(descriptor)
                with socket.socket(fileno=channel) as ours:
                    supervisor.supervise(ours, self.isolation, self.uid, self.scratch, self.others)
            except BaseException:
                with contextlib.suppress(BaseException):
                    sys.excepthook(*sys.exc_info())
                    sys.stderr.flush()
            finally:
                os._exit(0)
        os.close(channel)
        self.running[name] = pid

    def end(self) -> None:
        """Our side is gone, and the supervisors see it too: wait for them, and remove what they wrote to."""
        if self.isolation == "namespaces":
            return  # the kernel ends and forgets it all
        until = time.monotonic() + 5
        while self.running and time.monotonic() < until:
            time.sleep(0.01)
            self._reap()
        for pid in self.running.values():
            os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.scratch, ignore_errors=True)

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, _ = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return
                self.running = {name: other for name, other in self.running.items() if other != pid}
