"""The GPU table of docs/performance.md: from the files of bench/results/ where there are any, else "predicted"."""

import json
import subprocess
import sys
from pathlib import Path

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
    """The newest of a device counts; a file that was cut in the middle of a line has its whole lines."""
    machine = {"what": "machine", "device": "H100", "date": "2027-01-02"}
    line = {"what": "time", "method": "logits", "n": 16384, "width": 2560, "vocab": 151936, "of_floor": 0.8123}
    old = tmp_path / "H100-2027-01-01-fused_loss.json"
    old.write_text(json.dumps(machine) + "\n" + json.dumps(line | {"of_floor": 0.1}) + "\n")
    (tmp_path / "H100-2027-01-02-fused_loss.json").write_text(
        "\n".join(map(json.dumps, (machine, line, line | {"n": 8192}, line | {"method": "eager"}))) + '\n{"what": "ti'
    )
    summary = {"case": "summary", "device": "H100", "date": "2027-01-03", "rows_over_trees": {}}
    summary["rows_over_trees"]["2048 triton against varlen_fa3"] = 1.4242
    (tmp_path / "H100-2027-01-03-tree_attention.json").write_text(json.dumps([summary]))
    (tmp_path / "H100-2027-01-03-fused_loss_sweep.json").write_text(json.dumps(machine) + "\n")
    assert table.table(tmp_path).splitlines() == [
        "**Measured**, H100:", "", "| | |", "|---|---:|",
        "| loss, V0: H = 2560, N = 16,384, 2027-01-02 | 0.81 of the bare GEMMs |",
        "| a layer's step, trees on `triton`, answers of 2,048, 2027-01-03 | 1.42 times `varlen_fa3` |",
    ]  # fmt: skip
