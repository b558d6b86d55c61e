"""What is asked and how an answer is verified. Knows nothing of models."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cipo_fast.config import Config
from cipo_fast.errors import UserError
from cipo_fast.records import Problem
from cipo_fast.tasks.epochs import epoch_rows as epoch_rows
from cipo_fast.tasks.problems import Say, quiet, read_all
from cipo_fast.tasks.sources import Role, count_rows


@dataclass(frozen=True)
class Dataset:
    """Problems to train on and problems held out; no content is in both."""

    train: list[Problem]
    held_out: list[Problem]


def check_data(config: Config) -> None:
    """A run needs problems to train on: raises UserError where it has none. The embedded task makes its own, without
    hints."""
    if config.data.train is None and config.data.eval is not None:
        raise UserError("data.eval is given without data.train: name the training file too")
    if config.data.train is None and config.model.path != "embedded":
        raise UserError(f"data.train is not given: name a JSON Lines file to train model.path={config.model.path} on")
    if config.data.train is None and config.nudge.hints:
        raise UserError(
            f"nudge.hints={config.nudge.hints} needs data.train, rows with a field 'hints': docs/neighbours.md"
        )


def load_dataset(config: Config, say: Say = quiet) -> Dataset:
    """The problems of `data.train` and `data.eval`; `say` hears what is cut or dropped. Raises UserError."""
    n = config.eval.problems
    if config.data.train is None:
        raise UserError("data.train is not given: name a JSON Lines file of problems to train on")
    if config.data.eval is not None:
        train, held_out = read_data(config, "train", say), load_held_out(config, say)
    else:
        train, held_out = _split(read_data(config, "train", say), config.held_out, config.seed)
        if n is not None and len(held_out) < n:
            say(f"data.train: {len(held_out)} problems held out, a tenth of them; eval.problems={n} asks for more")
    asked = {problem.content for problem in held_out}
    kept = [problem for problem in train if problem.content not in asked]
    if not kept:
        names = ", ".join(map(str, config.data.sources("train")))
        raise UserError(f"data.train: every problem of {names} is also held out; nothing is left to train on")
    if len(kept) < len(train):
        say(f"data.train: {len(train) - len(kept)} of {len(train)} problems dropped, they are held out too")
    return Dataset(kept, held_out)


def load_held_out(config: Config, say: Say = quiet) -> list[Problem]:
    """The problems that a policy is evaluated on; data.eval is enough. Raises UserError."""
    if config.data.eval is None and config.data.train is None:
        raise UserError("data.eval is not given: name a JSON Lines file of held-out problems")
    if config.data.eval is None:
        return load_dataset(config, say).held_out
    problems = read_data(config, "eval", say)
    kept = problems[: config.eval.problems]
    if len(kept) < len(problems):
        say(f"data.eval: the first {len(kept)} of {len(problems)} problems are used (eval.problems)")
    return kept


def read_data(config: Config, role: Role, say: Say = quiet) -> list[Problem]:
    """All problems of `data.train` or `data.eval`, several sources one after another. Raises UserError."""
    weights = config.data.weights if role == "train" else None
    return read_all(config.data.sources(role), weights, say, config.data, role)


def rows_of_eval(config: Config) -> int | None:
    """How many rows `data.eval` has at most, without reading them as problems; None where only loading tells."""
    counts = [count_rows(source) for source in config.data.sources("eval")]
    return None if None in counts else sum(count for count in counts if count is not None)


def _split(problems: list[Problem], n_held_out: int, seed: int) -> tuple[list[Problem], list[Problem]]:
    if len(problems) < 2:
        raise UserError("data.train has one problem: two are needed, one of them held out (or give data.eval)")
    n = max(1, min(n_held_out, len(problems) // 10))
    order = np.random.default_rng([seed, 1]).permutation(len(problems))
    return [problems[i] for i in sorted(order[n:])], [problems[i] for i in sorted(order[:n])]
