"""Messages between the trainer and a worker: JSON behind its length, on a stream socket.

JSON escapes all that is not ASCII, so lone surrogates and NUL travel like any other character. A large row is encoded
once for all the answers that it judges.
"""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections import OrderedDict
from typing import Any

Message = dict[str, Any]
LARGE = 2**16  # bytes of a row that is kept as JSON
MOST_KEPT = 2**28  # bytes of all that are kept
_LENGTH = struct.Struct("!Q")


def pack(message: Message) -> bytes:
    """A message as bytes. Raises what json raises: TypeError, ValueError, RecursionError."""
    return b"".join(framed(json.dumps(message).encode("ascii")))


def framed(*parts: bytes) -> tuple[bytes, ...]:
    """The parts of a message's JSON, its length before them."""
    return (_LENGTH.pack(sum(map(len, parts))), *parts)


class RowEncoder:
    """Messages with a row, as parts that share the JSON of large ones. It is kept by the row's identity, for those rows
    that were used last: a row does not change once it has been sent. From any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[int, tuple[Message, bytes]] = OrderedDict()  # the row with it: its id stays its own
        self._size = 0

    def pack(self, row: Message, rest: Message) -> tuple[bytes, ...]:
        """{"row": row, **rest} as `framed` gives it; `rest` is not empty. Raises what json raises."""
        return framed(b'{"row": ', self._encoded(row), b", " + json.dumps(rest).encode("ascii")[1:])

    def _encoded(self, row: Message) -> bytes:
        with self._lock:
            found = self._kept.get(id(row))
            if found is not None:
                self._kept.move_to_end(id(row))
                return found[1]
            encoded = json.dumps(row).encode("ascii")
            if LARGE <= len(encoded) <= MOST_KEPT:
                self._kept[id(row)] = row, encoded
                self._size += len(encoded)
                while self._size > MOST_KEPT:
                    self._size -= len(self._kept.popitem(last=False)[1][1])
            return encoded


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
