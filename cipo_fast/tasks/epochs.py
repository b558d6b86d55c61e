"""Which rows an epoch has when files have weights: a function of seed and epoch, so a resumed run has the same."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def epoch_rows(weights: Sequence[float], seed: int, epoch: int) -> NDArray[np.int64]:
    """Indices of the rows of `epoch` (0, 1, ...), in rising order; their number is the same in every epoch.

    A row of weight w is there floor(w) times; for the fraction, rows of that weight take turns: they are dealt from one
    permutation after another, so that weight 0.5 shows all of them in two epochs. A row counts once at least where all
    of its weight would come to none. Weights of 1 give 0 ... n - 1."""
    found = []
    given = np.asarray(weights, dtype=np.float64)
    for weight in np.unique(given):
        rows = np.flatnonzero(given == weight)
        whole = int(weight)
        extra = round((weight - whole) * len(rows)) or int(whole == 0)
        found += [rows] * whole + [rows[_dealt(len(rows), extra, seed, epoch, weight)]]
    return np.sort(np.concatenate(found)).astype(np.int64)


def _dealt(n: int, take: int, seed: int, epoch: int, weight: float) -> NDArray[np.int64]:
    """`take` of n, those at epoch * take and on in one permutation of n after another."""
    places = np.arange(epoch * take, (epoch + 1) * take)
    key = [seed, 3, int(np.float64(weight).view(np.uint64))]
    orders = {c: np.random.default_rng([*key, int(c)]).permutation(n) for c in np.unique(places // n)}
    return np.asarray([orders[c][p] for c, p in zip(places // n, places % n, strict=True)], dtype=np.int64)
