"""Launch configurations of a kernel tried one by one, for `--sweep` of the scripts here."""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import triton
from cipo_kernels.launch_configs import CONFIGS_FILE, device_key, launch_configs
from records import write
from torch import Tensor


def sweep(
    kernel: str,
    candidates: Sequence[dict[str, int]],
    run: Callable[[], Sequence[Tensor]],
    milliseconds: Callable[[Callable[[], object]], float],
    device: str,
) -> Iterator[dict]:
    """One line a candidate: its time, or why it has none. The default is the first of them, what the others' results of
    `run` are compared with; the fastest is then the configuration of `device` in launch_configs()."""
    configs = launch_configs().setdefault(device_key(torch.device(device)), {})
    configs.pop(kernel, None)
    expected, times = run(), []
    for fields in ({}, *candidates):
        configs[kernel] = fields
        line: dict = {"what": "sweep", "kernel": kernel, "config": fields}
        try:
            line["ok"] = all(map(same, run(), expected))  # compiles, too
            if line["ok"]:
                line["ms"] = milliseconds(run)
                times.append((line["ms"], fields))
        except Exception as error:  # too much shared memory, for one
            line["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        yield line
    configs[kernel] = min(times, key=lambda of: of[0])[1] if times else {}
    yield {"what": "fastest", "kernel": kernel, "config": configs[kernel]}


def same(found: Tensor, expected: Tensor) -> bool:
    """Row by row, to the rounding of bf16: tiles add up in other orders. A row that is next to nothing, to a part in
    10^6 of the largest."""
    found, expected = (x.double().reshape(len(x), -1) for x in (found, expected))
    size = expected.norm(dim=1)
    return bool(((found - expected).norm(dim=1) <= 2**-7 * size + 1e-6 * size.max()).all())


def save(script: str, device: str, folder: str | None, smoke: bool) -> None:
    """launch_configs(), and where they come from, to the package's file, unless it is a smoke test, and to `folder`.
    After each kernel: the next one's sweep may be cut."""
    configs = launch_configs()
    source = f"{time.strftime('%F')}, torch {torch.__version__}, triton {triton.__version__}"
    configs[device_key(torch.device(device))].setdefault("source", {})[script] = source
    write([*([] if smoke else [CONFIGS_FILE]), *([Path(folder) / CONFIGS_FILE.name] if folder else [])], configs)
