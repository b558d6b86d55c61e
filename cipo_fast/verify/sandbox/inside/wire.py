"""Frames on a stream: four bytes of length, then that many bytes. Used on both sides."""

from __future__ import annotations

import builtins

__builtins__ = {**vars(builtins)}  # type: ignore[assignment]  # of the functions below: a program may change the built-ins
MAX_FRAME = 6 << 20  # the longest value (values.MAX_CHARS) and what is around it


class TooLong(ValueError):
    """A frame is announced that is longer than any may be."""


def frame(payload: bytes) -> bytes:
    return len(payload).to_bytes(4, "big") + payload


class Frames:
    """Bytes in, frames out."""

    def __init__(self, longest: int = MAX_FRAME) -> None:
        self._buffer, self._longest = bytearray(), longest

    def feed(self, data: bytes) -> list[bytes]:
        """The frames that are complete with `data`. Raises TooLong."""
        self._buffer += data
        found = []
        while len(self._buffer) >= 4:
            length = int.from_bytes(self._buffer[:4], "big")
            if length > self._longest:
                raise TooLong(f"a message of {length} bytes")
            if len(self._buffer) < 4 + length:
                break
            found.append(bytes(self._buffer[4 : 4 + length]))
            del self._buffer[: 4 + length]
        return found
