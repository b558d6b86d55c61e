"""results.json and results.md of an evaluation, and the paired comparison of two."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cipo_fast.errors import visible
from cipo_fast.evaluation.figures import Difference, Figure, Paired, figures, paired
from cipo_fast.evaluation.records import read_records

Evaluation = dict[str, float | None]
REPORTS = ("results.json", "results.md")


@dataclass(frozen=True)
class Results:
    """What results.json holds. `sources` has each source's figures, where there are several. `tokens` were sampled, in
    `seconds` of all the processes that worked on it; `answers` were judged, `failed` could not be."""

    model: str
    settings: dict[str, Any]
    figures: dict[str, Figure]
    sources: dict[str, dict[str, Figure]]
    tokens: int
    seconds: float
    answers: int
    failed: int

    @property
    def values(self) -> Evaluation:
        """A row of numbers: what a run records."""
        found: Evaluation = {name: figure.value for name, figure in self.figures.items()}
        return found | ({"answers": self.answers, "failed": self.failed} if self.failed else {})


def results_of(folder: Path, settings: dict[str, Any]) -> Results:
    """Everything follows from samples.jsonl."""
    records = read_records(folder)
    names = sorted({record.source for record in records})
    by_source = {name: figures([r for r in records if r.source == name]) for name in names} if len(names) > 1 else {}
    answers = [answer for record in records for answer in record.answers]
    return Results(
        model=str(settings.get("model", "")),
        settings=settings,
        figures=figures(records),
        sources=by_source,
        tokens=sum(answer.tokens for answer in answers),
        seconds=sum(record.seconds for record in records),
        answers=len(answers),
        failed=sum(record.failed for record in records),
    )


def write_report(folder: Path, results: Results) -> None:
    """results.json and results.md. Raises OSError."""
    _write(folder / REPORTS[0], json.dumps(asdict(results), indent=1, ensure_ascii=False))
    s = results.settings
    lines = [
        f"# {_cell(results.model)}",
        "",
        f"{s['problems']} problems, {s['n']} answers each at T={s['temperature']:g}, {s['checked']} of them checked in "
        f"{s['checks']} rounds, at most {s['max_tokens']} tokens an answer, seed {s['seed']}. {results.answers:,} "
        f"answers, {results.tokens:,} tokens, {results.seconds:.0f} s; {results.failed} answers could not be judged. "
        "Intervals: 95%, bootstrap over problems.",
        "",
        *_table(results.figures),
    ]
    for source, found in results.sources.items():
        lines += ["", f"## {_cell(source)}", "", *_table(found)]
    _write(folder / REPORTS[1], "\n".join(lines) + "\n")


def compare(a: Path, b: Path) -> Paired:
    """The paired comparison of two evaluations' folders, written into the second as compared-with-A.json and .md.
    Raises UserError, OSError."""
    found = paired(read_records(a), read_records(b))
    name = f"compared-with-{a.resolve().parent.parent.name}-{a.resolve().name}"
    _write(b / f"{name}.json", json.dumps({"a": str(a), "b": str(b), **asdict(found)}, indent=1))
    lines = [f"# {_cell(str(b))} against {_cell(str(a))}", "", left_out(found), "", *_apart(found.differences)]
    for source, differences in found.sources.items():
        lines += ["", f"## {_cell(source)}", "", *_apart(differences)]
    _write(b / f"{name}.md", "\n".join(lines) + "\n")
    return found


def _apart(differences: dict[str, Difference]) -> list[str]:
    rows = [(label, number(d.a), number(d.b), number(d.value, "+.3f"), interval(d)) for label, d in differences.items()]
    return _markdown(("", "a", "b", "b - a", "95%"), rows)


def left_out(found: Paired) -> str:
    """How many problems are compared, and how many are not."""
    first, second = found.left_out
    return f"{found.problems} problems in both; {first} only in the first and {second} only in the second are left out"


def interval(found: Figure | Difference) -> str:
    if found.low is None or found.high is None:
        return "-"
    form = ".3f" if isinstance(found, Figure) else "+.3f"
    return f"{found.low:{form}} to {found.high:{form}}"


def number(value: float | None, form: str = ".3f") -> str:
    return "-" if value is None else format(value, form)


def _table(found: dict[str, Figure]) -> list[str]:
    rows = [(name, number(f.value), interval(f), f"{f.count:.0f}") for name, f in found.items()]
    return _markdown(("", "value", "95%", "of"), rows)


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = "|---|" + "---:|" * (len(header) - 1)
    return [f"| {' | '.join(header)} |", rule, *(f"| {' | '.join(map(_cell, row))} |" for row in rows)]


def _cell(text: str) -> str:
    """Foreign text that ends no cell and no line, and that a terminal does not obey."""
    return visible(" ".join(text.replace("|", "\\|").split()))


def _write(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8", errors="backslashreplace")
    part.rename(path)
