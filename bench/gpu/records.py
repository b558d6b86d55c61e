"""What the scripts here write and table.py reads. Without torch."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

LIMIT_S = 170  # no case of a script begins later; run_all.sh ends the script at 200 s
BACKENDS = ("triton", "flash")  # of tree attention, what `auto` chooses from
OURS = (*BACKENDS, "flash_fa3", "flash_fa4")
ROWS = ("varlen", "varlen_fa3", "varlen_fa4", "cudnn")


def write(files: Iterable[Path], value: object) -> None:
    """As JSON, each file whole at any time: a script may be killed in the middle."""
    for file in files:
        new = file.with_suffix(".tmp")
        new.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        os.replace(new, file)


def step_ratios(records: Iterable[dict[str, Any]]) -> dict[str, float]:
    """By R and back-end: time of a layer's step with the fastest rows over that with trees, of those that ran."""
    ms = {(r["R"], r["implementation"]): r["ms"] for r in records if r["case"] == "layer" and "error" not in r}
    ratios = {}
    for (R, name), trees in ms.items():
        rows = {other: ms[R, other] for other in ROWS if (R, other) in ms}
        if name in OURS and rows:
            fastest = min(rows, key=lambda other: rows[other])
            ratios[f"{R} {name} against {fastest}"] = rows[fastest] / trees
    return ratios
