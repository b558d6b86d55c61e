"""All runs as one JSON document, and the document as one page that needs no server and no network."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Sequence
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

from cipo_fast.report.problems import changes, compare, first_and_last
from cipo_fast.report.rollouts import sample_rollouts
from cipo_fast.report.run import read_run

FORMAT = 1  # of the document
ROLLOUTS, PROBLEMS = 2_800_000, 900_000  # bytes of the page for what was written, over all runs: below 5 MB in all
LIBRARY = {"name": "uPlot", "version": "1.6.32", "licence": "MIT"}
# In a <script> of JSON only `<` can end or open anything; the others are for whoever copies it elsewhere.
_INERT = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}


def write_page(folders: Sequence[Path], out: Path) -> int:
    """Write the report of these runs and return its size in bytes. Raises UserError for a folder without a run, OSError
    where `out` cannot be written."""
    page = html(document(folders))
    part = out.with_name(f"{out.name}.part")
    part.write_bytes(page)
    os.replace(part, out)
    return len(page)


def document(folders: Sequence[Path]) -> dict[str, Any]:
    """What the page shows, plain JSON."""
    runs, evaluated = [], []
    for i, folder in enumerate(folders):
        run, files = read_run(folder)
        found = first_and_last(files, [point["step"] for point in run["evaluations"]])
        run["changes"] = changes(found)
        run["rollouts"] = sample_rollouts(files, ROLLOUTS // len(folders))
        evaluated.append((i, files, found))
        runs.append(run)
    compared = compare(evaluated, PROBLEMS)
    for run, (_, files, _) in zip(runs, evaluated, strict=True):
        run["skipped"] = list(dict.fromkeys(files.skipped))
    _name_apart(runs)
    return {
        "format": FORMAT,
        "made": time.strftime("%Y-%m-%d %H:%M"),
        "runs": runs,
        "arms": arms(runs),
        "compare": compared,
        "library": LIBRARY,
    }


def arms(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """[{name, runs}]: runs that differ in their seed alone are one arm, drawn as a mean with a band."""
    found: dict[str, list[int]] = {}
    for i, run in enumerate(runs):
        found.setdefault(run.pop("arm"), []).append(i)
    return [{"name": _arm_name([runs[i]["name"] for i in members]), "runs": members} for members in found.values()]


def _arm_name(names: Sequence[str]) -> str:
    if len(names) == 1:
        return names[0]
    first, last = min(names), max(names)  # what these two share, all share
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    common = re.sub(r"[-_. ]*(s|seed)?[-_. ]*$", "", first[:same])
    return common or names[0]


def _name_apart(runs: Sequence[dict[str, Any]]) -> None:
    names = [run["name"] for run in runs]
    for run in runs:
        if names.count(run["name"]) > 1:
            run["name"] = f"{run['name']} ({run['folder']})"


def html(found: dict[str, Any]) -> bytes:
    """The page, UTF-8. Data is JSON that no parser of HTML takes for anything else; a lone surrogate is an escape."""
    text = json.dumps(found, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character, escape in _INERT.items():
        text = text.replace(character, escape)
    library = _static("uplot/LICENSE")
    parts = {
        "@STYLE@": _static("uplot/uPlot.min.css") + _static("report.css"),
        "@LICENCE@": library.replace("&", "&amp;").replace("<", "&lt;"),
        "@LIBRARY@": _static("uplot/uPlot.iife.min.js"),
        "@SCRIPT@": _static("report.js"),
        "@DATA@": text,  # last: what it holds is never looked at again
    }
    page = _static("report.html")
    for place, content in parts.items():
        page = page.replace(place, content, 1)
    return page.encode("utf-8", errors="backslashreplace")


def _static(name: str) -> str:
    return (package_files("cipo_fast.report") / "static" / name).read_text(encoding="utf-8")
