"""One run: what ran, what it took, and its curves."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from cipo_fast.alarms import CAUSES
from cipo_fast.config import Config, load_config
from cipo_fast.config.config import flat, flat_settings
from cipo_fast.errors import UserError
from cipo_fast.report.files import Files, number
from cipo_fast.view import PHASES

Row = dict[str, Any]
Point = dict[str, Any]

# Settings that make no run another one: they stay out of the table, and runs that differ in them alone are seeds of one
# arm.
ITS_OWN = ("run.", "data.date", "checkpoint.")
# metrics.jsonl -> charts of page.js; the first one of several that a run has.
KEYS = (
    "rollout/accuracy", "correction/wrong_to_right", "correction/right_to_wrong", "correction/retention",
    "correction/gap", "correction/verbatim_copy", "replay/rho", "replay/retention", "replay/target",
    "anchors/right", "anchors/right_wanted", "anchors/wrong", "anchors/wrong_wanted", "anchors/dropped",
    "rollout/all_entropy", "correction/all_entropy", "rollout/entropy", "correction/entropy",
    "rollout/length", "correction/length", "rollout/truncated", "correction/truncated",
    "rollout/ratio_max", "correction/ratio_max", "rollout/clip_fraction", "correction/clip_fraction",
    "rollout/approx_kl", "correction/approx_kl", "rollout/sampler_gap", "correction/sampler_gap",
    "rollout/mismatch_kl", "correction/mismatch_kl", "rollout/mismatch_outside", "correction/mismatch_outside",
    "grad/norm", "loss/total", "optim/lr", "rollout/no_variance", "correction/no_variance",
    "verify/right", "verify/wrong", "verify/unparsable", "verify/timeout", "tokens/saved",
    *(f"time/{phase}_s" for phase in PHASES), "time/step_s",
)  # fmt: skip


def read_run(folder: Path) -> tuple[dict[str, Any], Files]:
    """(what the page shows of a run, but for its rollouts and problems; its files). Raises UserError for a folder that
    holds no run."""
    files = Files(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; a run's folder is expected, runs/NAME")
    if not any((folder / name).is_file() for name in ("config.yaml", "metrics.jsonl")):
        raise UserError(f"{folder}: holds no run, neither config.yaml nor metrics.jsonl")
    settings = read_settings(files)
    rows = read_metrics(files)
    evaluations = read_evaluations(files)
    summary = files.json("summary.json")
    run = {
        "name": str(settings.get("run.name") or folder.resolve().name),
        "folder": folder.as_posix(),
        "seed": settings.get("seed"),
        "arm": arm_of(settings),
        "about": about(settings, files, rows, summary),
        "settings": changed(settings),
        "cost": cost(rows),
        "phases": phases(rows),
        "alarms": alarms(rows),
        "evaluations": evaluations,
        "others": other_evaluations(files),
        "curves": curves(rows, most=600),
    }
    return run, files


def read_settings(files: Files) -> dict[str, Any]:
    """Those it last went on with, as recorded, flat; of any version, so nothing is checked."""
    later = [name for name in files.of_format("config-from-step-*.yaml") if re.search(r"-\d+\.yaml$", name)]
    name = max(later, key=lambda name: int(re.findall(r"\d+", name)[-1]), default="config.yaml")
    text = files.text(name)
    try:
        found = yaml.safe_load(text) if text is not None else {}
    except yaml.YAMLError:
        files.skip(name, "torn, no whole YAML")
        return {}
    if not isinstance(found, dict):
        files.skip(name, "of another format, no settings")
        return {}
    return flat_settings(found)


def changed(settings: dict[str, Any]) -> list[list[Any]]:
    """[key, value, default] where they differ; of the embedded model, its recipe's defaults. A key that this version
    has not is one of an older run's."""
    defaults = flat(load_config([], []) if settings.get("model.path", "embedded") == "embedded" else Config())
    return [
        [key, _said(value), _said(defaults[key]) if key in defaults else "not a setting of this version"]
        for key, value in settings.items()
        if not key.startswith(ITS_OWN) and (key not in defaults or _said(defaults[key]) != _said(value))
    ]


def arm_of(settings: dict[str, Any]) -> str:
    """Equal for runs that differ in the seed alone."""
    return repr(sorted((k, _said(v)) for k, v in settings.items() if not k.startswith(ITS_OWN) and k != "seed"))


def about(settings: dict[str, Any], files: Files, rows: Sequence[Row], summary: Row) -> list[list[str]]:
    """[what, value] of what ran."""
    started = list(files.lines("started.jsonl"))
    newest = started[-1] if started else {}
    steps = settings.get("train.steps")
    done = rows[-1]["step"] if rows else 0
    state = "ended" if summary else "has not ended: the files hold what it wrote so far"
    of = settings.get("data.train") or f"{settings.get('data.task')} (embedded)"
    found: list[list[Any]] = [
        ["model", settings.get("model.path")],
        ["training data", of],
        ["held out", settings.get("data.eval") or "of the same data"],
        ["engine", settings.get("rollout.engine")],
        ["seed", settings.get("seed")],
        ["steps", f"{done:,} of {steps:,}, {state}" if isinstance(steps, int) else f"{done:,}, {state}"],
        ["started", newest.get("date")],
        ["ranks", newest.get("ranks")],
        ["machine", ", ".join(str(newest[k]) for k in ("gpu", "cpu") if newest.get(k)) or None],
        ["versions", ", ".join(f"{k} {newest[k]}" for k in _VERSIONS if newest.get(k)) or None],
        ["commit", newest.get("commit")],
    ]
    if len(started) > 1:
        found.append(["gone on", f"{len(started) - 1} times, the last after step {newest.get('step')}"])
    return [[what, _said(value)] for what, value in found if value is not None]


_VERSIONS = ("cipo_fast", "torch", "transformers", "python")


def read_metrics(files: Files) -> list[Row]:
    """In order of steps; of a step that is there twice, the last."""
    found: dict[int, Row] = {}
    older = 0
    for row in files.lines("metrics.jsonl"):
        if isinstance(row.get("step"), int):
            found[row["step"]] = row
        else:
            older += 1
    if older:
        files.skip("metrics.jsonl", f"{older} lines of another format, without a step")
    return [found[step] for step in sorted(found)]


def read_evaluations(files: Files) -> list[Point]:
    """{step, sampled, seconds, figures: {name: [value, low, high]}} of each evaluation, intervals where its folder has
    them."""
    found: dict[int, Point] = {}
    for row in files.lines("eval.jsonl"):
        step = row.get("step")
        if not isinstance(step, int):
            files.skip("eval.jsonl", "a line of another format, without a step")
            continue
        values = {key[5:]: number(value) for key, value in row.items() if key.startswith("eval/")}
        figures = files.json(f"evaluations/step-{step:05d}/results.json").get("figures")
        found[step] = {
            "step": step,
            "sampled": number(row.get("tokens/sampled")),
            "seconds": number(row.get("seconds")),
            "figures": {name: [v, *_interval(figures, name)] for name, v in values.items() if v is not None},
        }
    return [found[step] for step in sorted(found)]


def other_evaluations(files: Files) -> list[dict[str, Any]]:
    """{name, figures as above} of those that `python -m cipo_fast.evaluate` has left in the run's folder."""
    names = [name.split("/")[1] for name in files.of_format("evaluations/*/results.json")]
    found = []
    for name in names:
        figures = files.json(f"evaluations/{name}/results.json").get("figures")
        if not re.fullmatch(r"step-\d{5}", name) and isinstance(figures, dict):
            values = {key: number(figure.get("value")) for key, figure in figures.items() if isinstance(figure, dict)}
            known = {key: [v, *_interval(figures, key)] for key, v in values.items() if v is not None}
            found.append({"name": name, "figures": known})
    return found


def _interval(figures: Any, name: str) -> list[float | None]:
    figure = figures.get(name) if isinstance(figures, dict) else None
    return [number(figure.get(end)) for end in ("low", "high")] if isinstance(figure, dict) else [None, None]


def cost(rows: Sequence[Row]) -> dict[str, float | None]:
    """Over all steps. `saved`: of the tokens that one row a conversation would have cost."""
    total = {key: sum(number(row.get(key)) or 0.0 for row in rows) for key in _COUNTED}
    seconds = total["time/step_s"]
    return {
        "sampled": total["tokens/sampled"],
        "forwarded": total["tokens/forwarded"],
        "rows": total["tokens/rows"],
        "saved": 1 - total["tokens/forwarded"] / total["tokens/rows"] if total["tokens/rows"] else None,
        "flops": total["flops/sample"] + total["flops/train"],
        "seconds": seconds,
        "skipped": total["train/skipped"],
    }


_COUNTED = (
    "tokens/sampled", "tokens/forwarded", "tokens/rows", "flops/sample", "flops/train", "time/step_s", "train/skipped",
)  # fmt: skip


def phases(rows: Sequence[Row]) -> list[list[Any]]:
    """[phase, seconds over all steps] of what took any."""
    total = {phase: sum(number(row.get(f"time/{phase}_s")) or 0.0 for row in rows) for phase in PHASES}
    return [[phase, number(seconds)] for phase, seconds in total.items() if seconds > 0]


def alarms(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Each alarm that was on: in how many steps, from which to which, and its likely causes."""
    names = dict.fromkeys(key for row in rows for key in row if key.startswith("alarm/"))
    found = []
    for key in names:
        steps = [row["step"] for row in rows if row.get(key) == 1]
        if steps:
            name = key.removeprefix("alarm/")
            about = {"first": steps[0], "last": steps[-1], "steps": len(steps)}
            found.append({"name": name, **about, "causes": list(CAUSES.get(name, ()))})
    return found


def curves(rows: Sequence[Row], most: int) -> dict[str, Any]:
    """{x axes and series: values, `every`: steps a point}. Above `most` steps a point is the mean of several."""
    every = -(-len(rows) // most) or 1
    derived = [row | _rates(row) for row in rows]
    series = {key: [number(row.get(key)) for row in derived] for key in (*KEYS, *_RATES)}
    series = {key: values for key, values in series.items() if any(v is not None for v in values)}
    sampled, seconds = _running(rows, "tokens/sampled"), _running(rows, "time/step_s")
    return {
        "every": every,
        "step": [row["step"] for row in rows][every - 1 :: every] if every > 1 else [row["step"] for row in rows],
        "sampled": _last_of(sampled, every),
        "seconds": _last_of(seconds, every),
        "series": {key: _means(values, every) for key, values in series.items()},
    }


_RATES = ("rate/sampled", "rate/trained", "rate/all")


def _rates(row: Row) -> Row:
    """Tokens a second: sampled while generating, trained while training, sampled over the whole step."""
    of = {
        "rate/sampled": ("tokens/sampled", "time/generate_s"),
        "rate/trained": ("tokens/forwarded", "time/train_s"),
        "rate/all": ("tokens/sampled", "time/step_s"),
    }
    found = {key: (number(row.get(tokens)), number(row.get(seconds))) for key, (tokens, seconds) in of.items()}
    return {key: tokens / seconds for key, (tokens, seconds) in found.items() if tokens is not None and seconds}


def _running(rows: Sequence[Row], key: str) -> list[float]:
    total, found = 0.0, []
    for row in rows:
        total += number(row.get(key)) or 0.0
        found.append(total)
    return found


def _last_of(values: Sequence[float], every: int) -> list[float | None]:
    return [number(value) for value in (values[every - 1 :: every] if every > 1 else values)]


def _means(values: Sequence[float | None], every: int) -> list[float | None]:
    """Of whole buckets; what is left over at the end is dropped with its step."""
    if every == 1:
        return list(values)
    found: list[float | None] = []
    for start in range(0, len(values) - every + 1, every):
        bucket = [v for v in values[start : start + every] if v is not None]
        found.append(number(sum(bucket) / len(bucket)) if bucket else None)
    return found


def _said(value: Any) -> str:
    """As a command line has it."""
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "null"
    return f"{value:g}" if isinstance(value, float) else str(value)
