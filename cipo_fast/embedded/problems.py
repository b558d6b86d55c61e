"""The problems of an embedded task: made by seed, answers known, nothing to download."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cipo_fast.embedded import verifiers
from cipo_fast.embedded.tasks import Task, task_named
from cipo_fast.records import Problem

TRAIN_SIZE = 8_000


def embedded_problems(
    name: str, seed: int, n_held_out: int, size: int | None = None
) -> tuple[list[Problem], list[Problem]]:
    """(train, held out) problems of a task, all different from each other; each has an answer to imitate. Raises
    UserError for a size that the task has not."""
    task = task_named(name)
    pairs = task.pairs(np.random.default_rng([seed, 0]), TRAIN_SIZE + n_held_out, size)
    problems = [_problem(task, f"{name}-{i}", *pair) for i, pair in enumerate(pairs)]
    return problems[n_held_out:], problems[:n_held_out]


def _problem(task: Task, name: str, question: str, answer: str) -> Problem:
    messages = ({"role": "user", "content": question},)
    source = name.split("-")[0]
    if task.verifier is None:
        return Problem(name, messages, answer, source)
    judged_by = f"{Path(verifiers.__file__).absolute()}:{task.verifier}"
    return Problem(name, messages, answer, source, verifier=judged_by, fields={"prompt": question})
