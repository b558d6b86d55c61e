"""Which tiles, warps and stages a kernel runs with on a device: measured where launch_configs.json has it."""

import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

# Device name -> kernel -> the fields of its configuration that differ. `--sweep` of the scripts in bench/gpu writes it.
CONFIGS_FILE = Path(__file__).with_name("launch_configs.json")

Config = TypeVar("Config", bound=NamedTuple)


@cache
def launch_configs() -> dict[str, Any]:
    """The file, read once a process."""
    return json.loads(CONFIGS_FILE.read_text(encoding="utf-8"))


def device_key(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def launch_config(kernel: str, default: Config, device: torch.device) -> Config:
    """`default`, with what was measured to be fastest for this kernel on this device in place of its own.

    Raises ValueError for an entry that is no object of positive integers under the names of integer fields.
    """
    name = device_key(device)
    of_device = launch_configs().get(name, {})
    entry = of_device.get(kernel, {}) if isinstance(of_device, dict) else of_device
    known = [field for field, value in default._asdict().items() if type(value) is int]
    if not isinstance(entry, dict) or any(k not in known or type(v) is not int or v < 1 for k, v in entry.items()):
        expected = f"positive integers for some of {', '.join(known)}"
        raise ValueError(f"{CONFIGS_FILE}: {kernel} of {name!r} is {json.dumps(entry)}, expected {expected}")
    return default._replace(**entry)
