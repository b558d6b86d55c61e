"""LiveCodeBench's private tests: JSON, or base64(zlib(pickle(JSON text))).

A pickle is a program, and running one that names a class can do anything. A pickled text needs five opcodes, so nothing
is run here: the opcodes are read, the text among them is taken, and every other one, a class first of all, is refused.
"""

from __future__ import annotations

import base64
import binascii
import json
import pickletools
import zlib
from typing import Any

from cipo_fast.errors import UserError

MOST_BYTES = 2**29  # of one problem's tests, unpacked: the largest that are known have about 100 MB
_TEXTS = {"UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}
_BESIDE = {"PROTO", "FRAME", "MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT", "STOP"}


def unpacked(text: str, where: str, name: str) -> Any:
    """The JSON value in `text`, packed or not; raises UserError."""
    if text.lstrip()[:1] in ("[", "{"):
        return _from_json(text, where, name)
    try:
        stream = zlib.decompressobj()
        content = stream.decompress(base64.b64decode(text, validate=True), MOST_BYTES)
        if not stream.eof:
            raise ValueError(f"it is cut off, or has more than {MOST_BYTES:,} bytes unpacked")
    except (binascii.Error, zlib.error, ValueError) as error:
        raise UserError(f"{where}: field {name!r} is neither JSON nor base64 of zlib of a pickle: {error}") from None
    return _from_json(_pickled_text(content, where, name), where, name)


def _pickled_text(content: bytes, where: str, name: str) -> str:
    found: list[str] = []
    try:
        for opcode, argument, _ in pickletools.genops(content):
            if opcode.name in _TEXTS:
                found.append(str(argument))
            elif opcode.name not in _BESIDE:
                raise ValueError(f"it holds {opcode.name}, and may hold one text alone")
    except Exception as error:  # broken opcodes raise what they like
        raise UserError(
            f"{where}: field {name!r}: its pickle is refused: {' '.join(str(error).split())[:200]}"
        ) from None
    if len(found) != 1:
        raise UserError(
            f"{where}: field {name!r}: its pickle is refused: it holds {len(found)} texts, and may hold one"
        )
    return found[0]


def _from_json(text: str, where: str, name: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: field {name!r} is not JSON: {error}") from None
