"""results.md and results.json, from the files of a grid's runs alone."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cipo_fast.errors import UserError
from cipo_fast.experiment.grid import Grid, GridRun, changed_settings, common_settings, said
from cipo_fast.experiment.results import RESAMPLES, Estimate, Point, RunResult, differences, estimates, read_run
from cipo_fast.provenance import recorded

MARKDOWN, JSON = "results.md", "results.json"
BEYOND = 0.02  # of a budget of tokens: evaluations are apart by more than answers' lengths vary
LABELS = {
    "t1": "T=1", "wrong_to_right": "wrong>right", "right_to_wrong": "right>wrong", "correction_gap": "gap",
    "after_check_1": "after 1 check", "after_check_2": "2 checks", "after_check_3": "3 checks",
    "check_gain": "gain by a check",
}  # fmt: skip
SIGNED = ("correction_gap", "check_gain")


@dataclass(frozen=True)
class Row:
    """An arm of a table: an evaluation of each of its runs."""

    arm: str
    seeds: tuple[int, ...]
    points: tuple[Point, ...]
    figures: dict[str, Estimate]
    against: dict[str, Estimate]  # minus the control, over the seeds that both have; {} for the control itself


@dataclass(frozen=True)
class Report:
    """All that is written down."""

    grid: Grid
    arms: dict[str, list[RunResult]]  # runs that have ended, by seed
    unfinished: list[GridRun]
    step: int  # of the first table
    budget: int  # tokens sampled, of the second
    before: list[Row]
    equal_steps: list[Row]
    equal_tokens: list[Row]

    @property
    def columns(self) -> dict[str, str]:
        """{figure: label} of the tables."""
        names = [name for row in self.equal_steps for name in row.figures]
        ks = sorted({int(name.removeprefix("pass_at_")) for name in names if name.startswith("pass_at_")})
        shown = [k for k in ks if k >= 8] or ks[-1:]
        first, *others = LABELS
        labels = {first: LABELS[first]} | {f"pass_at_{k}": f"pass@{k}" for k in shown}
        return {name: label for name, label in {**labels, **{o: LABELS[o] for o in others}}.items() if name in names}


def make_report(grid: Grid) -> Report:
    """Raises UserError where no arm has a run that has ended, or its files are not what a run writes."""
    arms = {arm: [read_run(run) for run in grid.of(arm) if run.finished] for arm in grid.experiment.arms}
    arms = {arm: results for arm, results in arms.items() if results}
    if not arms:
        raise UserError(f"{grid.out}: no run has ended yet, so there is nothing to report")
    results = [result for found in arms.values() for result in found]
    common = set.intersection(*({point.step for point in result.points} for result in results))
    step = max(common)
    budget = min(result.points[-1].sampled for result in results)
    control = grid.experiment.control
    return Report(
        grid,
        arms,
        [run for run in grid.runs if not run.finished],
        step,
        budget,
        _starts(_compare(arms, control, lambda result: result.points[0])),
        _compare(arms, control, lambda result: result.at(step)),
        _compare(arms, control, lambda result: result.within(budget * (1 + BEYOND))),
    )


def _compare(arms: dict[str, list[RunResult]], control: str, choose: Callable[[RunResult], Point]) -> list[Row]:
    points = {arm: {r.run.seed: choose(r) for r in results} for arm, results in arms.items()}
    samples = {arm: {r.run.seed: r.sample(choose(r)) for r in results} for arm, results in arms.items()}
    rows = []
    for arm, of_seed in samples.items():
        both = [seed for seed in of_seed if seed in samples.get(control, {})]
        against = {}
        if arm != control and both:
            against = differences([of_seed[s] for s in both], [samples[control][s] for s in both])
        rows.append(Row(arm, tuple(of_seed), tuple(points[arm].values()), estimates(list(of_seed.values())), against))
    return rows


def _starts(rows: list[Row]) -> list[Row]:
    """Arms that begin alike (the same figures before training, seed by seed) once, as the first of them."""
    found: dict[str, Row] = {}
    for row in rows:
        found.setdefault(repr((row.seeds, sorted((name, e.seeds) for name, e in row.figures.items()))), row)
    return list(found.values())


def write_report(report: Report) -> None:
    """results.md and results.json; raises UserError where they cannot be written."""
    from cipo_fast.experiment.plots import draw

    out = report.grid.out
    try:
        plots = draw(report, out)
        (out / JSON).write_text(json.dumps(as_json(report), indent=1) + "\n", encoding="utf-8")
        (out / MARKDOWN).write_text(as_markdown(report, plots), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{out}: the report cannot be written ({error})") from None


def publish(out: Path, folder: Path) -> None:
    """Copy the report, its data and its plots, and no samples; raises UserError."""
    if not (out / MARKDOWN).exists():
        raise UserError(f"{out / MARKDOWN}: there is no report yet: --report writes it")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in (out / MARKDOWN, out / JSON, *sorted(out.glob("*.png"))):
            shutil.copyfile(path, folder / path.name)
    except OSError as error:
        raise UserError(f"--publish {folder}: cannot be written ({error})") from None


# -------------------------------------------------------------------------------------------------------------- JSON


def as_json(report: Report) -> dict[str, Any]:
    experiment = report.grid.experiment
    return {
        "name": experiment.name,
        "about": experiment.about,
        "control": experiment.control,
        "begun": recorded(report.grid.out),
        "unfinished": [run.name for run in report.unfinished],
        "before": [_row(row) for row in report.before],
        "equal_steps": {"step": report.step, "arms": [_row(row) for row in report.equal_steps]},
        "equal_tokens": {"budget": report.budget, "arms": [_row(row) for row in report.equal_tokens]},
        "curves": {
            arm: {result.run.seed: [asdict(point) for point in result.points] for result in results}
            for arm, results in report.arms.items()
        },
        "settings": {arm: _said_from_here(results[0].run) for arm, results in report.arms.items()},
    }


def _row(row: Row) -> dict[str, Any]:
    return {
        "arm": row.arm,
        "seeds": row.seeds,
        "spent": [{key: value for key, value in asdict(point).items() if key != "figures"} for point in row.points],
        "figures": {name: asdict(estimate) for name, estimate in row.figures.items()},
        "minus_control": {name: asdict(estimate) for name, estimate in row.against.items()},
    }


# ---------------------------------------------------------------------------------------------------------- Markdown


def as_markdown(report: Report, plots: Sequence[Path]) -> str:
    experiment = report.grid.experiment
    parts = [
        f"# {experiment.name}",
        experiment.about,
        *_provenance(report),
        f"## At equal steps ({report.step})",
        _table(report, [*report.before, *report.equal_steps]),
        *_differences(report, report.equal_steps),
        f"## At equal sampled tokens ({_count(report.budget)})",
        "The budget is what the thriftiest run had sampled at the end, rollouts and corrections. Each run is shown at "
        f"its last evaluation within it (or beyond it by {BEYOND:.0%} at most).",
        _table(report, [*report.before, *report.equal_tokens]),
        *_differences(report, report.equal_tokens),
        *(f"![{path.stem.replace('-', ' ')}]({path.name})" for path in plots),
        "## How to read it",
        _explained(report),
        "## Settings",
        *_settings(report),
    ]
    return "\n\n".join(parts) + "\n"


def _provenance(report: Report) -> Iterator[str]:
    grid, begun = report.grid, recorded(report.grid.out)
    seeds = ", ".join(str(seed) for seed in grid.experiment.seeds)
    lines = [f"- Seeds {seeds}; the control is {grid.experiment.control}."]
    for found in {json.dumps(one): one for one in begun}.values():
        gpu = f", {found['gpu']}" if found["gpu"] else ""
        where = f"{_many(found['cores'], 'core')} of {found['cpu']}{gpu}"
        lines.append(
            f"- `{found['command']}`: {found['date']}, {_many(found['jobs'], 'run')} at once on {where}, "
            f"torch {found['torch']}, commit {found['commit'] or 'unknown'}."
        )
    written = ["python", "-m", "cipo_fast.experiment", grid.name, "--out", str(grid.out), "--report"]
    lines.append(f"- Written by `{shlex.join(written)}`.")
    yield "\n".join(lines)
    if report.unfinished:
        names = ", ".join(run.name for run in report.unfinished)
        yield f"**Not in it, since they have not ended: {names}.**"


def _table(report: Report, rows: list[Row]) -> str:
    head = ["", *report.columns.values(), "step", "sampled tokens", "trained tokens", "FLOPs", "s"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for row in rows:
        before = row in report.before
        name = row.arm if not before else "before" if len(report.before) == 1 else f"before ({row.arm})"
        cells = [_estimate(row.figures.get(column), column in SIGNED) for column in report.columns]
        spent = [""] * 5 if before else _spent(row.points)
        lines.append([name, *cells, *spent])
    return _lines(lines)


def _spent(points: Sequence[Point]) -> list[str]:
    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    steps = sorted({point.step for point in points})
    return [
        str(steps[0]) if len(steps) == 1 else f"{steps[0]}-{steps[-1]}",
        _count(mean([point.sampled for point in points])),
        _count(mean([point.trained for point in points])),
        f"{mean([point.flops for point in points]):.2e}",
        f"{mean([point.seconds for point in points]):.0f}",
    ]


def _differences(report: Report, rows: list[Row]) -> Iterator[str]:
    compared = [row for row in rows if row.against]
    if not compared:
        return
    yield (
        f"Minus {report.grid.experiment.control}, on the same seeds and problems; below the interval each seed's "
        "own difference:"
    )
    head = ["", *report.columns.values()]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for row in compared:
        cells = []
        for column in report.columns:
            found = row.against.get(column)
            own = " ".join(_number(value, True) for value in found.seeds) if found else ""
            cells.append(f"{_estimate(found, True)}<br>{own}")
        lines.append([row.arm, *cells])
    yield _lines(lines)


def _explained(report: Report) -> str:
    seeds = len(report.grid.experiment.seeds)
    few = (
        f"**With {_many(seeds, 'seed')} it is too narrow for what another seed would do**, hence the seeds' "
        "own differences.\n"
    )
    return (
        "Each figure is the mean over seeds [95% interval], a hierarchical percentile bootstrap: seeds are drawn with "
        f"replacement, and in each the held-out problems, {RESAMPLES:,} times. Differences are paired: a draw takes "
        f"the same seeds and problems from both arms. {few}\n"
        "- T=1: share of right answers sampled at temperature 1; pass@k: one of k is right.\n"
        "- wrong>right, right>wrong: what a check of the answer makes of wrong and of right attempts; gap: wrong>right "
        "minus the problem's other attempts, what trying again gives.\n"
        "- after 1, 2, 3 checks: accuracy when the answer is checked once, and that answer again.\n"
        "- sampled tokens: of all answers in training, rollouts and corrections. trained tokens: through the forward "
        "and backward pass, shared ones once. FLOPs: of sampling (one forward pass of every token that an engine with "
        "a perfect prefix cache computes) and of training (forward and backward). s: seconds of training. Evaluation "
        "is in none of them."
    )


def _settings(report: Report) -> Iterator[str]:
    """What differs from the defaults: in all arms, then an arm's own."""
    given = {arm: _said_from_here(results[0].run) for arm, results in report.arms.items()}
    everywhere = common_settings(given)
    lines = [f"- all: `{said(everywhere)}`"]
    for arm, settings in given.items():
        own = {key: value for key, value in settings.items() if key not in everywhere}
        lines.append(f"- {arm}: {f'`{said(own)}`' if own else 'nothing more'}")
    yield "What differs from the defaults of cipo_fast/config/:"
    yield "\n".join(lines)


def _said_from_here(run: GridRun) -> dict[str, Any]:
    """Its changed settings, files below this folder as ./file: another machine has them elsewhere."""
    text = json.dumps(changed_settings(run)).replace(json.dumps(f"{Path.cwd()}/")[1:-1], "./")
    return dict(json.loads(text))


def _lines(rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _estimate(found: Estimate | None, signed: bool) -> str:
    if found is None or found.value is None:
        return "-"
    return f"{_number(found.value, signed)}<br>[{_number(found.low, signed)}, {_number(found.high, signed)}]"


def _number(value: float | None, signed: bool) -> str:
    """.479, or +.479; 1 stays 1.000."""
    if value is None:
        return "-"
    text = f"{value:+.3f}" if signed else f"{value:.3f}"
    return text.replace("0.", ".", 1) if abs(value) < 0.9995 else text


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count > 1)}"


def _count(value: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.1f}{unit}"
    return f"{value:.0f}"
