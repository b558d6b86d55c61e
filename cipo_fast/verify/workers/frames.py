"""Messages between the trainer and a worker: JSON behind its length, on a stream socket.

JSON escapes all that is not ASCII, so lone surrogates and NUL travel like any other character.
"""

from __future__ import annotations

import json
import socket
import struct
from typing import Any

Message = dict[str, Any]
_LENGTH = struct.Struct("!Q")


def pack(message: Message) -> bytes:
    """A message as bytes. Raises what json raises: TypeError, ValueError, RecursionError."""
    body = json.dumps(message).encode("ascii")
    return _LENGTH.pack(len(body)) + body


def receive(sock: socket.socket) -> Message | None:
    """The next message of a blocking socket; None where the other side is gone."""
    head = _exactly(sock, _LENGTH.size)
    body = _exactly(sock, _LENGTH.unpack(head)[0]) if head else None
    return None if body is None else json.loads(body)


def _exactly(sock: socket.socket, size: int) -> bytes | None:
    data = bytearray()
    while len(data) < size:
        part = sock.recv(min(size - len(data), 1 << 20))
        if not part:
            return None
        data += part
    return bytes(data)


class Inbox:
    """Bytes as they arrive -> whole messages."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> list[Message]:
        """Raises ValueError on what is no message."""
        self._data += data
        found = []
        while len(self._data) >= _LENGTH.size:
            end = _LENGTH.size + _LENGTH.unpack_from(self._data)[0]
            if len(self._data) < end:
                break
            message = json.loads(self._data[_LENGTH.size : end])
            if not isinstance(message, dict):
                raise ValueError("not a message")
            found.append(message)
            del self._data[:end]
        return found
