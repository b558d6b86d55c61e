"""The GPU table of docs/performance.md, from what the scripts here left in bench/results/: `python bench/gpu/table.py`.

A row is what a reader asks first: how near to its floor, and how much faster than what else trains. Of each device the
newest file of a script counts. Where no GPU has run anything, the same rows as predicted for an H100, and headed so.
`--write` puts it between that page's two marks; a test fails when it is stale.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from records import ROWS, step_ratios

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- bench/gpu/table.py -->", "<!-- end -->"
LOSS = {"logits": "loss, V0", "exp": "loss, V1", "log_probs": "log-probs"}
N, WIDTHS = 16384, (2560, 4096)
TREES, R = ("triton", "flash_fa3"), (2048, 4096, 8192)


def table(results: Path = RESULTS) -> str:
    devices = measured(results)
    parts = [_part(f"**Measured**, {device}", rows) for device, rows in devices.items()]
    return "\n\n".join(parts or [_part("**Predicted** for an H100; no GPU has run these kernels yet", predicted())])


def _part(heading: str, rows: dict[str, str]) -> str:
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join((f"{heading}:\n", "| | |", "|---|---:|", *lines))


def measured(results: Path) -> dict[str, dict[str, str]]:
    """Device and date -> rows."""
    found: dict[str, dict[str, str]] = {}
    newest: dict[tuple[str, str], list[dict]] = {}
    for path in sorted(results.glob("*.json")):  # by date within a device
        lines = _records(path)
        script = path.stem.rpartition("-")[2]
        if lines and script in ("fused_loss", "tree_attention"):
            newest[lines[0]["device"], script] = lines
    for (device, script), lines in newest.items():
        rows = _loss_rows(lines) if script == "fused_loss" else _attention_rows(lines)
        found.setdefault(device, {}).update({f"{name}, {lines[0]['date']}": value for name, value in rows})
    return {device: rows for device, rows in found.items() if rows}


def _records(path: Path) -> list[dict]:
    """Of a JSON array, or of lines, the last of which may be torn."""
    text = path.read_text(encoding="utf-8")
    if text.startswith("["):
        return json.loads(text)
    lines = []
    for line in text.splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def _loss_rows(lines: list[dict]) -> Iterator[tuple[str, str]]:
    for line in lines:
        if line.get("what") == "time" and line["method"] in LOSS and line["n"] == N and "of_floor" in line:
            yield _loss_name(line["method"], line["width"]), f"{line['of_floor']:.2f} of the bare GEMMs"


def _loss_name(method: str, width: int) -> str:
    return f"{LOSS[method]}: H = {width}, N = {N:,}"


def _attention_rows(lines: list[dict]) -> Iterator[tuple[str, str]]:
    for name, ratio in step_ratios(lines).items():
        length, ours, _, rows = name.split(" ")
        yield f"a layer's step, trees on `{ours}`, answers of {int(length):,}", f"{ratio:.2f} times `{rows}`"


def predicted() -> dict[str, str]:
    import fused_loss as loss
    import tree_attention as attention

    rows = {}
    for method in LOSS:
        for width in WIDTHS:
            floor = (1 if method == "log_probs" else 3) * 2 * N * width * loss.VOCAB / 790e9  # ms
            own = loss.expected_ms(method, N, width, "H100")
            rows[_loss_name(method, width)] = f"{floor / own:.2f} of the bare GEMMs"
    for ours in TREES:
        for length in R:
            job = attention.Job(R=length, **attention.REAL["tree"])
            known = [name for name in ROWS if name in attention.PREDICTED]
            ms = {name: attention.predict_layer(attention.REAL, job, name) for name in known}
            rows_name = min(ms, key=lambda name: ms[name])
            ratio = ms[rows_name] / attention.predict_layer(attention.REAL, job, ours)
            rows[f"a layer's step, trees on `{ours}`, answers of {length:,}"] = f"{ratio:.2f} times `{rows_name}`"
    return rows


def main() -> None:
    text = table()
    if "--write" not in sys.argv[1:]:
        print(text)
        return
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
