"""One execution, from our side: its channel, its messages, its deadline."""

from __future__ import annotations

import itertools
import json
import select
import socket
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

from cipo_fast.verify.sandbox.inside.wire import Frames, TooLong, frame
from cipo_fast.verify.sandbox.nest import Lost as Lost
from cipo_fast.verify.sandbox.nest import Nest

GRACE_S = 5.0  # for the supervisor to see its own deadline and clean up; then the zygote kills it
_names = itertools.count()


class Execution:
    """Started at once. A context manager: when it is left, nothing of the execution runs any more.

    `report` is the supervisor's last word, None when there was none.
    """

    def __init__(self, nest: Nest, request: dict[str, Any]) -> None:
        self._nest, self._nonce, self._name = nest, request["nonce"], str(next(_names))
        self._deadline = time.monotonic() + request["limits"]["wall_s"] + GRACE_S
        self._frames, self._told = Frames(), deque[dict[str, Any]]()
        self.report: dict[str, Any] | None = None
        self._channel, theirs = socket.socketpair()
        try:
            nest.start(self._name, theirs, "numpy" in request["program"])
        except BaseException:
            self._channel.close()
            raise
        finally:
            theirs.close()
        self._channel.setblocking(False)
        self._send(json.dumps(request).encode())

    def __enter__(self) -> Execution:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    def messages(self) -> Iterator[dict[str, Any]]:
        """What the program tells, until the execution has ended. Raises Lost when the zygote went with it."""
        while True:
            while self._told:
                yield self._told.popleft()
            if self.report is not None or not self._receive():
                return

    def ask(self, text: str) -> dict[str, Any] | None:
        """Send a message and wait for the answer; None when the execution ended instead."""
        self._send(text.encode())
        return next(self.messages(), None)

    def send(self, text: str) -> None:
        self._send(text.encode())

    def cancel(self) -> None:
        """End it, whatever it does. Raises nothing."""
        if self._channel.fileno() < 0:
            return
        if self.report is None:
            self._hang_up()
        self._channel.close()

    # -- inside

    def _hang_up(self) -> None:
        """Half a close tells the supervisor; its end of the line closes when it is gone."""
        try:
            self._channel.shutdown(socket.SHUT_WR)
        except OSError:
            return
        if self._gone(2.0):
            return
        self._nest.kill(self._name)
        if not self._gone(5.0):
            self._nest.close()

    def _gone(self, seconds: float) -> bool:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self._wait(select.POLLIN, end):
                try:
                    if not self._channel.recv(1 << 16):
                        return True
                except OSError:
                    return True
        return False

    def _wait(self, event: int, end: float) -> bool:
        poll = select.poll()
        poll.register(self._channel, event)
        return bool(poll.poll(max(0.0, end - time.monotonic()) * 1000))

    def _send(self, payload: bytes) -> None:
        left = memoryview(frame(payload))
        while left:
            if not self._wait(select.POLLOUT, self._deadline):
                return  # `_receive` meets the deadline too
            try:
                left = left[self._channel.send(left) :]
            except BlockingIOError:
                continue
            except OSError:
                return  # gone: reading says so

    def _receive(self) -> bool:
        """Read once; False at the end."""
        if not self._wait(select.POLLIN, self._deadline):
            self._hang_up()
            self.report = {"outcome": "timeout", "detail": "more than its time by the clock", "code": -9, "stdout": ""}
            return False
        try:
            data = self._channel.recv(1 << 16)
        except BlockingIOError:
            return True
        except OSError:
            data = b""
        if not data:
            if not self._nest.alive():
                raise Lost(self._nest.close())
            return False
        self._take(data)
        return True

    def _take(self, data: bytes) -> None:
        try:
            frames = self._frames.feed(data)
        except TooLong as error:
            self.report = {"outcome": "output", "detail": str(error), "code": -9, "stdout": ""}
            return
        for message in frames:
            if message[:1] == b"e":
                self.report = json.loads(message[1:])
            else:
                told = _message(message[1:], self._nonce)
                if told is not None:
                    self._told.append(told)


def _message(payload: bytes, nonce: str) -> dict[str, Any] | None:
    """A message of the program; None when it is none of this execution's."""
    try:
        told = json.loads(payload)
    except (ValueError, RecursionError):
        return None
    return told if type(told) is dict and told.get("nonce") == nonce else None
