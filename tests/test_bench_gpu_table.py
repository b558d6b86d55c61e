"""The GPU table of docs/performance.md: from the files of bench/results/ where there are any, else "predicted"."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import records
import table

ROOT = Path(__file__).parents[1]


def test_the_page_is_not_stale() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench/gpu/table.py")], capture_output=True, text=True, timeout=100, check=True
    )
    page = table.PAGE.read_text(encoding="utf-8")
    assert f"{table.BEGIN}\n{done.stdout}{table.END}" in page, "python bench/gpu/table.py --write"
    is_measured = any((ROOT / "bench/results").glob("*.json"))
    assert done.stdout.startswith("**Measured**" if is_measured else "**Predicted** for an H100; no GPU has run")


def test_results_take_the_place_of_predictions(tmp_path: Path) -> None:
    """The newest of a device counts; of a run that was cut, what it had measured: whole lines, layers."""
    machine = {"what": "machine", "device": "H100", "date": "2027-01-02"}
    line = {"what": "time", "method": "logits", "n": 16384, "width": 2560, "vocab": 151936, "of_floor": 0.8123}
    old = tmp_path / "H100-2027-01-01-fused_loss.json"
    old.write_text(json.dumps(machine) + "\n" + json.dumps(line | {"of_floor": 0.1}) + "\n")
    (tmp_path / "H100-2027-01-02-fused_loss.json").write_text(
        "\n".join(map(json.dumps, (machine, line, line | {"n": 8192}, line | {"method": "eager"}))) + '\n{"what": "ti'
    )
    layer = {"case": "layer", "R": 2048, "device": "H100", "date": "2027-01-03"}
    ms = {"linear": 40.0, "varlen": 180.0, "varlen_fa3": 142.42, "triton": 100.0}
    layers = [layer | {"implementation": name, "ms": x} for name, x in ms.items()]
    failed = layer | {"implementation": "flash", "error": "RuntimeError: no"}
    (tmp_path / "H100-2027-01-03-tree_attention.json").write_text(json.dumps([*layers, failed]))
    (tmp_path / "H100-2027-01-03-fused_loss_sweep.json").write_text(json.dumps(machine) + "\n")
    assert table.table(tmp_path).splitlines() == [
        "**Measured**, H100:", "", "| | |", "|---|---:|",
        "| loss, V0: H = 2560, N = 16,384, 2027-01-02 | 0.81 of the bare GEMMs |",
        "| a layer's step, trees on `triton`, answers of 2,048, 2027-01-03 | 1.42 times `varlen_fa3` |",
    ]  # fmt: skip


def test_a_file_is_whole_whenever_its_writer_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "device_rates.json"
    records.write([file], {"default": 1})
    whole = Path.write_text

    def killed(path: Path, text: str, encoding: str) -> None:
        whole(path, text[:5], encoding)
        raise SystemExit

    monkeypatch.setattr(Path, "write_text", killed)
    with pytest.raises(SystemExit):
        records.write([file], {"default": 2})
    assert json.loads(file.read_text()) == {"default": 1}
