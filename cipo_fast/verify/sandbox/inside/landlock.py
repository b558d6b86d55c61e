"""Landlock by way of sandlock: what a process may read and write, and that it signals nobody outside.

The library is loaded in the zygote and used by the process that is about to become the program.
"""

from __future__ import annotations

import os
import sys
from typing import Any

_loaded: dict[str, Any] = {}


def load(folder: str, readable: list[str]) -> None:
    """Before root becomes somebody else: the library may lie where only root gets."""
    sys.path.append(folder)
    import sandlock

    sys.path.remove(folder)
    _loaded["sandlock"] = sandlock
    _loaded["readable"] = [path for path in readable if os.path.exists(path)]


def confine(folder: str) -> None:
    """From here on the calling process reads `readable` and its own /proc entries, and writes `folder` alone."""
    sandlock = _loaded["sandlock"]
    policy = sandlock.Sandbox(fs_readable=[*_loaded["readable"], f"/proc/{os.getpid()}"], fs_writable=[folder])
    sandlock.confine(policy)
