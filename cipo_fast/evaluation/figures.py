"""Figures of an evaluation: each a ratio of two sums over problems, with an interval over problems.

    figure = sum_p numerator_p / sum_p denominator_p

Answers to one problem are not independent, so the interval is a percentile bootstrap over problems, 95%. What each
figure is stands in `per_problem`, and in docs/evaluation.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cipo_fast.errors import UserError
from cipo_fast.evaluation.estimators import all_at_k, maj_at_k, pass_at_k, powers
from cipo_fast.evaluation.records import Answer, Record

RESAMPLES = 2000
Ratios = dict[str, tuple[float, float]]  # name -> (numerator, denominator)


@dataclass(frozen=True)
class Figure:
    """A value and its 95% interval; None where there is nothing to count, or fewer than two problems. `count`: what it
    is a share of: problems (greedy, pass@k...), attempts, shown answers..."""

    value: float | None
    low: float | None
    high: float | None
    count: float


@dataclass(frozen=True)
class Difference:
    """A figure of two evaluations on the same problems, and b - a with its 95% interval."""

    a: float | None
    b: float | None
    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Paired:
    """`problems` are in both evaluations; `left_out`: how many only the first has, and only the second. `sources` has
    each source's differences, where there are several."""

    differences: dict[str, Difference]
    sources: dict[str, dict[str, Difference]]
    problems: int
    left_out: tuple[int, int]


def figures(records: Sequence[Record]) -> dict[str, Figure]:
    """Every figure of at least one record; maj@k alone is left out where no problem has it."""
    found = [per_problem(record) for record in records]
    names = names_of(found)
    above, below = matrix(found, names)
    drawn = above.sum(0), below.sum(0)
    resampled = _ratio(*_resampled(above, below))  # [RESAMPLES, F]
    enough = (below > 0).sum(0) >= 2
    result = {}
    for f, name in enumerate(names):
        value = float(drawn[0][f] / drawn[1][f]) if drawn[1][f] else None
        result[name] = Figure(value, *_interval(resampled[:, f], enough[f]), float(drawn[1][f]))
    return result


def paired(a: Sequence[Record], b: Sequence[Record]) -> Paired:
    """b - a over the problems that both have, both resampled alike. Raises UserError where there is none."""
    of_a, of_b = ({(r.problem, r.content): r for r in records} for records in (a, b))
    common = [key for key in of_a if key in of_b]
    if not common:
        raise UserError(
            f"the two evaluations have no problem in common ({len(of_a)} and {len(of_b)} problems): sample both with "
            "the same --tasks"
        )
    by_source: dict[str, list[tuple[str, str]]] = {}
    for key in common:
        by_source.setdefault(of_a[key].source, []).append(key)

    def differences(keys: Sequence[tuple[str, str]]) -> dict[str, Difference]:
        return _differences([of_a[key] for key in keys], [of_b[key] for key in keys])

    sources = {name: differences(keys) for name, keys in by_source.items()} if len(by_source) > 1 else {}
    left_out = (len(of_a) - len(common), len(of_b) - len(common))
    return Paired(differences(common), sources, len(common), left_out)


def _differences(a: Sequence[Record], b: Sequence[Record]) -> dict[str, Difference]:
    """b - a, problem by problem the same."""
    found = [[per_problem(record) for record in records] for records in (a, b)]
    names = [name for name in names_of(found[0]) if name in names_of(found[1])]
    matrices = [matrix(ratios, names) for ratios in found]
    values = [_ratio(above.sum(0), below.sum(0)) for above, below in matrices]
    first, second = (_ratio(*_resampled(above, below)) for above, below in matrices)  # the same problems in each
    differences = {}
    for f, name in enumerate(names):
        enough = all((below[:, f] > 0).sum() >= 2 for _, below in matrices)
        one, other = (None if np.isnan(value[f]) else float(value[f]) for value in values)
        apart = None if one is None or other is None else other - one
        differences[name] = Difference(one, other, apart, *_interval(second[:, f] - first[:, f], enough))
    return differences


def per_problem(record: Record) -> Ratios:
    """The figures' parts of one problem; (0, 0) where it has nothing to say. The names follow from n and checks."""
    attempts, n = record.attempts, len(record.attempts)
    right = sum(a.right for a in attempts)
    found: Ratios = {
        "greedy": (float(record.greedy.right), 1.0) if record.greedy else (0.0, 0.0),
        "t1": (float(right), float(n)),
    }
    ks = powers(record.n)
    # A problem of which fewer than k answers could be judged has no pass@k; the figure's count tells.
    found |= {f"pass_at_{k}": (pass_at_k(n, right, k), 1.0) if k <= n else (0.0, 0.0) for k in ks}
    found |= {f"all_at_{k}": (all_at_k(n, right, k), 1.0) if k <= n else (0.0, 0.0) for k in ks}
    found |= _majorities(attempts, ks)
    found |= _checks(record)
    for name in ("unparsable", "timeout"):
        found[name] = (float(sum(a.verdict == name for a in attempts)), float(n))
    found["truncated"] = (float(sum(a.truncated for a in attempts)), float(n))
    return found


def names_of(found: Sequence[Ratios]) -> list[str]:
    """All names, in order; without maj@k where nothing is counted in it."""
    names = list(dict.fromkeys(name for ratios in found for name in ratios))
    return [
        name for name in names if not name.startswith("maj_at_") or any(ratios.get(name, (0, 0))[1] for ratios in found)
    ]


def matrix(found: Sequence[Ratios], names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(numerators, denominators), each [problems, names] float64."""
    parts = np.array([[ratios.get(name, (0.0, 0.0)) for name in names] for ratios in found])  # [P, F, 2]
    return parts[..., 0], parts[..., 1]


def _majorities(attempts: Sequence[Answer], ks: Sequence[int]) -> Ratios:
    canonical = [a.canonical for a in attempts if a.canonical is not None]
    known = [k for k in ks if k <= len(attempts)] if len(canonical) == len(attempts) else []
    values = maj_at_k(canonical, [a.right for a in attempts], known) if known else []
    found: Ratios = {f"maj_at_{k}": (0.0, 0.0) for k in ks}
    return found | {f"maj_at_{k}": (value, 1.0) for k, value in zip(known, values, strict=True)}


def _checks(record: Record) -> Ratios:
    """What checking does. An answer that is not shown stays as it is, in this and all further rounds; a chain whose
    answer nobody could judge counts up to there."""
    rounds = range(1, record.checks + 1)
    right, n = sum(a.right for a in record.attempts), len(record.attempts)
    names = [f"{name}{_nth(r)}" for r in rounds for name in ("wrong_to_right", "right_to_wrong")]
    names[2:2] = [*(f"after_check_{r}" for r in rounds), "check_gain", "correction_gap", "verbatim_copies", "not_shown"]
    found = {name: [0.0, 0.0] for name in names} if record.checks else {}

    def count(name: str, value: float) -> None:
        found[name][0] += value
        found[name][1] += 1

    for chain in record.chains:
        before = record.attempts[chain.attempt]
        for r, after in enumerate(chain.answers, 1):
            if after is None and chain.ended == "failed":
                break
            count("not_shown", after is None)
            if after is not None:
                if before.right:
                    count(f"right_to_wrong{_nth(r)}", not after.right)
                else:
                    count(f"wrong_to_right{_nth(r)}", after.right)
                    if r == 1 and n > 1:  # against the problem's other attempts; this one's own reward is 0
                        count("correction_gap", after.right - right / (n - 1))
                count("verbatim_copies", after.text.strip() == before.text.strip())
                before = after
            count(f"after_check_{r}", before.right)
            if r == 1:  # on the same attempts, which are fewer than those of t1
                count("check_gain", before.right - record.attempts[chain.attempt].right)
    return {name: (above, below) for name, (above, below) in found.items()}


def _nth(r: int) -> str:
    return "" if r == 1 else f"_{r}"


def _resampled(above: np.ndarray, below: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sums over problems drawn with replacement, [RESAMPLES, F] each; the same draws for as many problems."""
    problems = len(above)
    times = np.random.default_rng(0).multinomial(problems, np.full(problems, 1 / problems), RESAMPLES)  # [R, P]
    return times @ above, times @ below


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """NaN where nothing was counted."""
    return np.divide(above, below, out=np.full(above.shape, np.nan), where=below > 0)


def _interval(values: np.ndarray, enough: bool) -> tuple[float | None, float | None]:
    values = values[~np.isnan(values)]
    if not enough or not len(values):
        return None, None
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
