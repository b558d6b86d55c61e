"""What is asked and how an answer is verified. Knows nothing of models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cipo_fast.config import Config
from cipo_fast.errors import UserError
from cipo_fast.records import Problem
from cipo_fast.tasks.jsonl import quiet, read_problems

Say = Callable[[str], None]


@dataclass(frozen=True)
class Dataset:
    """Problems to train on and problems held out; no content is in both."""

    train: list[Problem]
    held_out: list[Problem]


def check_data(config: Config) -> None:
    """A run needs problems to train on: raises UserError where it has none. The embedded task makes its own."""
    if config.data.train is None and config.data.eval is not None:
        raise UserError("data.eval is given without data.train: name the training file too")
    if config.data.train is None and config.model.path != "embedded":
        raise UserError(f"data.train is not given: name a JSON Lines file to train model.path={config.model.path} on")


def load_dataset(config: Config, say: Say = quiet) -> Dataset:
    """The problems of `data.train` and `data.eval`; `say` hears what is cut or dropped. Raises UserError."""
    n = config.eval.problems
    if config.data.train is None:
        raise UserError("data.train is not given: name a JSON Lines file of problems to train on")
    if config.data.eval is not None:
        train, held_out = read_problems(config.data.train, say), load_held_out(config, say)
    else:
        train, held_out = _split(read_problems(config.data.train, say), config.held_out, config.seed)
        if n is not None and len(held_out) < n:
            say(f"data.train: {len(held_out)} problems held out, a tenth of them; eval.problems={n} asks for more")
    asked = {problem.content for problem in held_out}
    kept = [problem for problem in train if problem.content not in asked]
    if not kept:
        raise UserError(
            f"data.train: every problem of {config.data.train} is also held out; nothing is left to train on"
        )
    if len(kept) < len(train):
        say(f"data.train: {len(train) - len(kept)} of {len(train)} problems dropped, they are held out too")
    return Dataset(kept, held_out)


def load_held_out(config: Config, say: Say = quiet) -> list[Problem]:
    """The problems that a policy is evaluated on; data.eval is enough. Raises UserError."""
    if config.data.eval is None and config.data.train is None:
        raise UserError("data.eval is not given: name a JSON Lines file of held-out problems")
    if config.data.eval is None:
        return load_dataset(config, say).held_out
    problems = read_problems(config.data.eval, say)
    kept = problems[: config.eval.problems]
    if len(kept) < len(problems):
        say(f"data.eval: the first {len(kept)} of {len(problems)} problems are used (eval.problems)")
    return kept


def verify(problem: Problem, text: str) -> float:
    """1.0 where the answer is exactly right once stripped, else 0.0. CRLF and LF end a line alike."""
    return float(_comparable(text) == _comparable(problem.answer))


def _comparable(text: str) -> str:
    return text.replace("\r\n", "\n").strip()


def _split(problems: list[Problem], n_held_out: int, seed: int) -> tuple[list[Problem], list[Problem]]:
    if len(problems) < 2:
        raise UserError("data.train has one problem: two are needed, one of them held out (or give data.eval)")
    n = max(1, min(n_held_out, len(problems) // 10))
    order = np.random.default_rng([seed, 1]).permutation(len(problems))
    return [problems[i] for i in sorted(order[n:])], [problems[i] for i in sorted(order[:n])]
