"""What is asked and how an answer is verified. Knows nothing of models."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cipo_fast.config import Config
from cipo_fast.errors import UserError
from cipo_fast.records import Problem
from cipo_fast.tasks.jsonl import read_problems


@dataclass(frozen=True)
class Dataset:
    """Problems to train on and problems held out; no content is in both."""

    train: list[Problem]
    held_out: list[Problem]


def load_dataset(config: Config) -> Dataset:
    """The problems of `data.train` and `data.eval`; raises UserError."""
    n_held_out = config.eval.problems
    if config.data.train is None:
        raise UserError("data.train is not given: name a JSONL file of problems to train on")
    if config.data.eval is not None:
        train, held_out = read_problems(config.data.train), read_problems(config.data.eval)[:n_held_out]
    else:
        train, held_out = _split(read_problems(config.data.train), n_held_out, config.seed)
    asked = {problem.content for problem in held_out}
    kept = [problem for problem in train if problem.content not in asked]
    if not kept:
        raise UserError(
            f"data.train: every problem of {config.data.train} is also held out; nothing is left to train on"
        )
    return Dataset(kept, held_out)


def verify(problem: Problem, text: str) -> float:
    """1.0 where the answer is exactly right once stripped, else 0.0."""
    return float(text.strip() == problem.answer.strip())


def _split(problems: list[Problem], n_held_out: int, seed: int) -> tuple[list[Problem], list[Problem]]:
    if len(problems) < 2:
        raise UserError("data.train has one problem: two are needed, one of them held out (or give data.eval)")
    n = max(1, min(n_held_out, len(problems) // 10))
    order = np.random.default_rng([seed, 1]).permutation(len(problems))
    return [problems[i] for i in sorted(order[n:])], [problems[i] for i in sorted(order[:n])]
