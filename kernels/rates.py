"""How fast a device does what training consists of: measured where device_rates.json has it, else assumed."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

# By torch.cuda.get_device_name(), written by bench/gpu/tree_attention.py; "default" is for all other devices.
RATES_FILE = Path(__file__).with_name("device_rates.json")


@dataclass(frozen=True)
class DeviceRates:
    """TFLOP/s in bf16. Attention, at head dim D = 128: 4 D FLOPs a visible pair and query head, 10 D backward."""

    linear: float  # a decoder layer without its attention, forward and backward, 6 FLOPs a weight and token
    attention: dict[str, dict[str, float]]  # back-end of tree attention -> {"forward", "backward"}
    fastest: str  # of these back-ends, forward and backward together
    rows: dict[str, float]  # {"forward", "backward"} of causal rows by the fastest attention, what trees compete with
    source: str  # script, date, versions; or that nothing was measured

    @property
    def attention_rate(self) -> float:
        """Of the fastest back-end, forward and backward together."""
        return both_directions(**self.attention[self.fastest])

    @property
    def rows_rate(self) -> float:
        """Of rows, forward and backward together."""
        return both_directions(**self.rows)


def both_directions(forward: float, backward: float) -> float:
    """TFLOP/s of attention forward and backward, from those of each: 4 parts of the FLOPs and 10."""
    return (4 + 10) / (4 / forward + 10 / backward)


@cache
def device_rates(device: torch.device | None = None) -> DeviceRates:
    """The rates of `device`; None is the GPU in use, if there is one. Read once a process."""
    table = json.loads(RATES_FILE.read_text(encoding="utf-8"))
    on_gpu = torch.cuda.is_available() if device is None else device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else "default"
    return DeviceRates(**table.get(name, table["default"]))


@torch.compiler.assume_constant_result
def fastest_attention(device: torch.device) -> str:
    """The back-end of tree attention that is fastest on `device`, a GPU."""
    return device_rates(device).fastest
