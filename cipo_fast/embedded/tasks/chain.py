"""`chain ag bc cf da eh fb gd he c3` -> `f0`: from c go 3 hops, c > f > b > c.

The answer is a state, node and hops left, and only 0 hops left is right. One pass of a shallow model goes so many hops
and no further; an attempt with hops left is a state nearer the goal. `size` is the most hops; there are 8 nodes.
"""

from __future__ import annotations

import numpy as np

from cipo_fast.embedded.tasks.task import Pair, Task

NODES = "abcdefgh"


def make(rng: np.random.Generator, size: int) -> Pair:
    to = "".join(NODES[i] for i in rng.permutation(len(NODES)))
    start, hops = NODES[rng.integers(len(NODES))], int(rng.integers(1, size + 1))
    pairs = [a + b for a, b in zip(NODES, to, strict=True)]
    shown = "".join(pairs[i] for i in rng.permutation(len(NODES)))
    question = f"chain {shown} {start}{hops}"
    return question, after(question, hops)


def after(question: str, hops: int) -> str:
    """The state so many hops from the start."""
    _, shown, state = question.split(" ")
    to = dict(zip(shown[::2], shown[1::2], strict=True))
    node = state[0]
    for _ in range(hops):
        node = to[node]
    return f"{node}{int(state[1:]) - hops}"


def near_miss(question: str, answer: str, rng: np.random.Generator) -> str:
    """A state on the way; of a single hop, and now and then of others, another node."""
    hops = int(question[-1])
    if hops == 1 or rng.random() < 0.25:
        return f"{NODES[rng.integers(len(NODES))]}0"
    return after(question, int(rng.integers(1, hops)))


TASK = Task(make, near_miss, size=3, sizes=range(2, 10))
