"""Intervals of 95%: Wilson's for a share of independent answers, a bootstrap over problems for anything else."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

Z = 1.959964  # of a normal distribution, 95% two-sided
RESAMPLES = 1000
T = TypeVar("T")


@dataclass(frozen=True)
class Estimate:
    """A value with its interval; None where there was nothing to count. `n`: answers (or pairs) it rests on."""

    value: float | None
    low: float | None
    high: float | None
    n: int

    def __str__(self) -> str:
        if self.value is None:
            return f"-  (n {self.n})"
        interval = "" if self.low is None or self.high is None else f" [{self.low:.3f}, {self.high:.3f}]"
        return f"{self.value:.3f}{interval}  (n {self.n})"


def wilson(k: int, n: int) -> Estimate:
    """k of n, with Wilson's score interval (E. B. Wilson, 1927), which holds also where k is 0 or n. It takes answers
    as independent: many answers to few problems are less than that."""
    if n == 0:
        return Estimate(None, None, None, 0)
    p, z2 = k / n, Z * Z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return Estimate(p, max(0.0, centre - half), min(1.0, centre + half), n)


def bootstrap(
    values: Sequence[T], clusters: Sequence[Hashable], statistic: Callable[[Sequence[T]], float | None], seed: int = 0
) -> Estimate:
    """`statistic` of the values, with the percentiles 2.5 and 97.5 over resamples of whole clusters (problems): the
    answers to one problem are not independent. No interval where there are fewer than two clusters."""
    value = statistic(values)
    by_cluster: dict[Hashable, list[T]] = {}
    for item, cluster in zip(values, clusters, strict=True):
        by_cluster.setdefault(cluster, []).append(item)
    groups = list(by_cluster.values())
    if value is None or len(groups) < 2:
        return Estimate(value, None, None, len(values))
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(RESAMPLES):
        drawn = statistic([item for g in rng.integers(len(groups), size=len(groups)) for item in groups[g]])
        if drawn is not None:
            found.append(drawn)
    low, high = np.percentile(found, [2.5, 97.5]) if found else (None, None)
    return Estimate(value, low, high, len(values))


def mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None
