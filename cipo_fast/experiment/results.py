"""What the runs of a grid have left, and figures over seeds with their intervals.

A run's figure is a ratio of sums over its held-out problems (cipo_fast/evaluation/figures.py), an arm's the mean over
seeds of its runs'. The interval is a hierarchical percentile bootstrap, 95%: seeds are drawn with replacement, and in
each the problems. The same draws serve every arm and figure, and runs on the same problems share them, so a difference
of two arms is paired over seeds and problems. Three seeds hold little of what seeds can do: the interval over them is
too narrow, which is why each seed's own difference stands beside it [ours].
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cipo_fast.errors import UserError
from cipo_fast.evaluation.figures import matrix, names_of, per_problem
from cipo_fast.evaluation.records import Record, read_records
from cipo_fast.experiment.grid import GridRun

RESAMPLES = 2000


@dataclass(frozen=True)
class Point:
    """One evaluation of a run, and what training had taken till then."""

    step: int
    sampled: int  # tokens of all answers
    trained: int  # tokens of the forward and backward passes, shared ones once
    flops: float  # of sampling and training
    seconds: float  # of training
    figures: dict[str, float | None]


@dataclass(frozen=True)
class RunResult:
    """A run that has ended."""

    run: GridRun
    points: tuple[Point, ...]  # in order of their steps
    rho: tuple[tuple[int, int, float], ...]  # (step, tokens sampled till then, rho), empty without corrections

    def at(self, step: int) -> Point:
        return next(point for point in self.points if point.step == step)

    def within(self, budget: float) -> Point:
        """The last evaluation that has not sampled more tokens than that."""
        return [point for point in self.points if point.sampled <= budget][-1]

    def sample(self, point: Point) -> Sample:
        return sample_of(read_records(self.run.dir / "evaluations" / f"step-{point.step:05d}"))


@dataclass(frozen=True)
class Sample:
    """A run's figures in parts: `above` and `below`, float64 [problems, names], whose sums over problems divide."""

    problems: tuple[str, ...]
    names: tuple[str, ...]
    above: np.ndarray
    below: np.ndarray

    def of(self, problems: Sequence[str], names: Sequence[str]) -> Sample:
        """These problems and figures alone, in this order."""
        row = {problem: p for p, problem in enumerate(self.problems)}
        column = {name: f for f, name in enumerate(self.names)}
        where = np.ix_([row[problem] for problem in problems], [column[name] for name in names])
        return Sample(tuple(problems), tuple(names), self.above[where], self.below[where])


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95% interval, and each seed's own value; None where there is nothing to count."""

    value: float | None
    low: float | None
    high: float | None
    seeds: tuple[float | None, ...]


def read_run(run: GridRun) -> RunResult:
    """Raises UserError where a file is not what a run writes."""
    try:
        found = _read_run(run)
    except (KeyError, IndexError) as error:
        raise UserError(
            f"{run.dir}: metrics.jsonl and eval.jsonl are not those of one whole run of this version "
            f"({type(error).__name__}: {error}); remove it, and the experiment runs it again"
        ) from None
    if not found.points:
        raise UserError(f"{run.dir / 'eval.jsonl'}: holds no evaluation")
    return found


def _read_run(run: GridRun) -> RunResult:
    steps = _rows(run.dir / "metrics.jsonl")
    trained = np.cumsum([0, *(row["tokens/forwarded"] for row in steps)])
    sampled = np.cumsum([0, *(row["tokens/sampled"] for row in steps)])
    points = [
        Point(
            row["step"],
            row["tokens/sampled"],
            int(trained[row["step"]]),
            row["flops/total"],
            row["seconds"],
            {key.removeprefix("eval/"): value for key, value in row.items() if key.startswith("eval/")},
        )
        for row in _rows(run.dir / "eval.jsonl")
    ]
    corrects = run.config.anchors_per_step > 0
    rho = [(row["step"], int(sampled[row["step"]]), row["replay/rho"]) for row in steps if corrects]
    return RunResult(run, tuple(points), tuple(rho))


def sample_of(records: Sequence[Record]) -> Sample:
    found = [per_problem(record) for record in records]
    names = names_of(found)
    return Sample(tuple(f"{r.problem} {r.content}" for r in records), tuple(names), *matrix(found, names))


def estimates(samples: Sequence[Sample]) -> dict[str, Estimate]:
    """Every figure that all of an arm's runs have; `samples`: one a seed."""
    names = [name for name in samples[0].names if all(name in sample.names for sample in samples)]
    samples = [sample.of(sample.problems, names) for sample in samples]
    return _estimates(names, [_value(s) for s in samples], [_resampled(s) for s in samples])


def differences(arm: Sequence[Sample], control: Sequence[Sample]) -> dict[str, Estimate]:
    """`arm` minus `control`, of the same seeds in the same order, on the problems that both have."""
    names = [name for name in arm[0].names if all(name in sample.names for sample in (*arm, *control))]
    values, resampled = [], []
    for a, b in zip(arm, control, strict=True):
        common = [problem for problem in a.problems if problem in set(b.problems)]
        if not common:
            raise UserError("two arms were evaluated on different problems, so they cannot be compared")
        a, b = a.of(common, names), b.of(common, names)
        values.append(_value(a) - _value(b))
        resampled.append(_resampled(a) - _resampled(b))
    return _estimates(names, values, resampled)


def _estimates(names: Sequence[str], values: list[np.ndarray], resampled: list[np.ndarray]) -> dict[str, Estimate]:
    """`values`: of each seed [F]; `resampled`: of each seed [RESAMPLES, F]."""
    seeds = len(values)
    drawn = np.random.default_rng(0).integers(seeds, size=(RESAMPLES, seeds))
    means = np.stack(resampled)[drawn.T, np.arange(RESAMPLES)].mean(0)  # [RESAMPLES, F]
    mean = np.stack(values).mean(0)
    found = {}
    for f, name in enumerate(names):
        counted = means[~np.isnan(means[:, f]), f]
        low, high = np.percentile(counted, [2.5, 97.5]) if len(counted) else (np.nan, np.nan)
        own = tuple(_known(value[f]) for value in values)
        found[name] = Estimate(_known(mean[f]), _known(low), _known(high), own)
    return found


def _value(sample: Sample) -> np.ndarray:
    return _ratio(sample.above.sum(0), sample.below.sum(0))


def _resampled(sample: Sample) -> np.ndarray:
    """The figures of problems drawn with replacement, [RESAMPLES, F]. The draws follow from the problems alone."""
    problems = sorted(sample.problems)
    seed = int.from_bytes(hashlib.sha256("\n".join(problems).encode()).digest()[:8])
    size = len(problems)
    times = np.random.default_rng(seed).multinomial(size, np.full(size, 1 / size), RESAMPLES)  # [RESAMPLES, P]
    ordered = sample.of(problems, sample.names)
    return _ratio(times @ ordered.above, times @ ordered.below)


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """NaN where nothing was counted."""
    return np.divide(above, below, out=np.full(above.shape, np.nan), where=below > 0)


def _known(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
