"""What was run, when and on what: a line of OUT/runner.jsonl each time the grid is begun or gone on with."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

from cipo_fast.errors import UserError

FILE = "runner.jsonl"
TIMEOUT_S = 30.0  # nvidia-smi may hang on a broken driver


def record(out: Path, command: str, jobs: int) -> None:
    found = {"date": time.strftime("%Y-%m-%d"), "command": command, "jobs": jobs, **machine(), "commit": commit()}
    with (out / FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(found) + "\n")


def recorded(out: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in (out / FILE).read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        return []
    except ValueError as error:
        raise UserError(f"{out / FILE}: cannot be read ({error})") from None


def machine() -> dict[str, Any]:
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": _said("nvidia-smi", "--query-gpu=name", "--format=csv,noheader"),
        "torch": importlib.metadata.version("torch"),
    }


def software() -> dict[str, str]:
    """Versions of what a run is computed with."""
    found = {"cipo_fast": "cipo-fast", "torch": "torch", "transformers": "transformers"}
    return {"python": platform.python_version()} | {name: _version(of) for name, of in found.items()}


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
        return "unknown"


def commit() -> str | None:
    """Of the checkout that this is part of, marked where files differ from it; of the kernels too, where those are
    imported from another one."""
    ours, kernels = (_described(package) for package in ("cipo_fast", "cipo_kernels"))
    return ours if kernels == ours else f"{ours or 'unknown'}, kernels of {kernels or 'an unknown one'}"


def _described(package: str) -> str | None:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = next(iter(spec.submodule_search_locations))
    return _said("git", "-C", folder, "describe", "--always", "--abbrev=12", "--dirty=, changed")


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _said(*command: str) -> str | None:
    """What a command prints, in one line; None where there is no such command, or it fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return ", ".join(done.stdout.split("\n")[:-1]) or None if done.returncode == 0 else None
