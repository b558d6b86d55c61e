"""What n samples of a problem say of k: exact expectations over all subsets of k of them, none drawn twice.

Every function takes the counts of one problem; figures are means over problems, taken afterwards. k > n is refused: the
usual product formula would say 1 for it, whatever was sampled.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import comb

import numpy as np

MOST_SAMPLES = 1000  # of a problem, for `maj_at_k`: beyond, binomial coefficients leave the range of a float


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that at least one of k of n samples is right, c of the n being right: 1 - C(n - c, k) / C(n, k)
    [Chen et al. 2021, arXiv 2107.03374]. Raises ValueError unless 0 <= c <= n and 1 <= k <= n."""
    _check(n, c, k)
    return 1 - comb(n - c, k) / comb(n, k)


def all_at_k(n: int, c: int, k: int) -> float:
    """pass^k, the probability that all k are right: C(c, k) / C(n, k) [tau-bench, arXiv 2406.12045]."""
    _check(n, c, k)
    return comb(c, k) / comb(n, k)


def maj_at_k(answers: Sequence[str], rights: Sequence[bool], ks: Sequence[int]) -> list[float]:
    """Probability that the most frequent answer among k of n is right, for each k of `ks` (maj@k).

    `answers`: n canonical answers, "" for none, which has no vote; `rights`: whether each is right. Among answers that
    are equally frequent the winner is drawn by lot; without a vote nothing is right. Where equal answers were judged
    unlike, their group counts as the share of them that is right. Exact, for at most MOST_SAMPLES answers: an answer
    with c votes wins alone or with s others if it has t of the k, and every other answer at most t, s of them just t,

        sum over t, s of  C(c, t) * W_t[k - t, s] / (1 + s) / C(n, k),

    W_t[m, s] being the ways to draw m of the others so, a product over the others.
    """
    n, most = len(answers), max(ks)
    _check(n, sum(rights), most)
    if n > MOST_SAMPLES:
        raise ValueError(f"{n} samples: at most {MOST_SAMPLES} are counted")
    votes = Counter(answers)
    right = Counter(answer for answer, good in zip(answers, rights, strict=True) if good)
    silent = votes.pop("", 0)
    kinds = Counter((count, right[answer] / count) for answer, count in votes.items())  # answers alike in both
    found = np.zeros(len(ks))
    for (count, share), alike in kinds.items():
        if share == 0:
            continue
        others = [c for (c, s), number in kinds.items() for _ in range(number - ((c, s) == (count, share)))]
        for t in range(1, min(count, most) + 1):
            ways = _ways(others, silent, t, most)  # [m, s]
            won = ways @ (1 / (1 + np.arange(ways.shape[1])))
            found += [alike * share * comb(count, t) * won[k - t] / comb(n, k) if k >= t else 0.0 for k in ks]
    return [float(value) for value in found]


def _ways(others: Sequence[int], silent: int, t: int, most: int) -> np.ndarray:
    """W_t[m, s] for m up to `most`, float64: draws of m among answers of so many votes each, none given more than t
    times, s of them just t times; and among `silent` that have no vote."""
    ties = sum(count >= t for count in others)
    ways = np.zeros((most + 1, ties + 1))
    ways[0, 0] = 1.0
    for count in others:
        after = ways.copy()
        for u in range(1, min(count, t, most) + 1):
            if u < t:
                after[u:] += comb(count, u) * ways[:-u]
            else:
                after[u:, 1:] += comb(count, u) * ways[:-u, :-1]
        ways = after
    after = ways.copy()
    for u in range(1, min(silent, most) + 1):
        after[u:] += comb(silent, u) * ways[:-u]
    return after


def powers(n: int) -> list[int]:
    """1, 2, 4, ... up to n, and n."""
    found = [2**i for i in range(n.bit_length())]
    return found if found and found[-1] == n else [*found, n]


def _check(n: int, c: int, k: int) -> None:
    if not 0 <= c <= n:
        raise ValueError(f"{c} right of {n} samples")
    if not 1 <= k <= n:
        raise ValueError(f"k={k} of n={n} samples: k is at least 1 and at most n")
