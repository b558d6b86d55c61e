"""Golds judged against themselves: a row whose own answer or solution is not right can only mislead a policy."""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cipo_fast.errors import UserError
from cipo_fast.records import Problem
from cipo_fast.verify import Judgement, VerifierFailure, judging

if TYPE_CHECKING:
    from cipo_fast.verify.workers.pool import Judges

Say = Callable[[str], None]
AHEAD = 512  # golds that workers have at once: more would only fill memory
NAMED = 20  # rows named in a line
EVERY_S = 10.0  # between two lines of progress
_INTEGER = re.compile(r"-?(0|[1-9][0-9]{0,17})")


@dataclass(frozen=True)
class Gold:
    """What judging a problem's gold said. `state`: good; bad, with `why`; none, where the row has no gold; unknown,
    where nobody could judge it, with `why`."""

    problem: Problem
    state: str
    why: str = ""


def without_bad_golds(problems: list[Problem], judges: Judges, say: Say, what: str = "data.train") -> list[Problem]:
    """The problems but those whose gold does not verify against itself, which `say` names; a gold that nobody could
    judge is said and kept. Raises UserError where none is left."""
    started = time.monotonic()
    found = list(judged_golds(problems, judges, say, what))
    bad = [gold for gold in found if gold.state == "bad"]
    unknown = [gold for gold in found if gold.state == "unknown"]
    if unknown:
        say(f"{what}: {len(unknown)} of {len(found)} golds could not be judged, their rows are kept: {named(unknown)}")
    if bad:
        say(f"{what}: {len(bad)} of {len(found)} golds do not verify, their rows are dropped: {named(bad)}")
    if bad and len(bad) == len(found):
        raise UserError(f"{what}: no gold verifies against itself, so no answer could be right: {named(bad[:1])}")
    seconds = time.monotonic() - started
    if seconds > EVERY_S:
        say(f"{what}: {len(found):,} golds checked in {seconds:.0f}s")
    return [gold.problem for gold in found if gold.state != "bad"]


def judged_golds(problems: Iterable[Problem], judges: Judges, say: Say, what: str = "golds") -> Iterator[Gold]:
    """The problems in their order, each with what its gold's judgement is."""
    waiting: deque[tuple[Problem, Gold | Future[Judgement]]] = deque()
    done, last = 0, time.monotonic()
    for problem in problems:
        waiting.append((problem, at_once(problem) or judges.submit_gold(problem.row)))
        while len(waiting) > AHEAD or (waiting and isinstance(waiting[0][1], Gold)):
            yield _result(*waiting.popleft())
            done += 1
            if time.monotonic() - last > EVERY_S:
                last = time.monotonic()
                say(f"{what}: {done:,} golds checked")
    while waiting:
        yield _result(*waiting.popleft())


def at_once(problem: Problem) -> Gold | None:
    """What needs no worker: a row that is broken, one without a gold, a gold that is an integer or compared exactly."""
    row = problem.row
    try:
        if problem.verifier == "exact" or (problem.verifier == "math" and _INTEGER.fullmatch(problem.answer)):
            response = judging.gold_response(row) or ""
            judgement = judging.at_once(row, response)
            if judgement is not None:
                return _judged(problem, judgement)
            return None
        wrong = None if problem.verifier == "math" else judging.check_row(row)  # a math gold may need algebra
        if wrong is not None:
            return Gold(problem, "bad", wrong)
        return Gold(problem, "none") if judging.gold_response(row) is None else None
    except (VerifierFailure, ValueError) as error:  # a policy that does not exist
        return Gold(problem, "bad", str(error))


def _result(problem: Problem, gold: Gold | Future[Judgement]) -> Gold:
    if isinstance(gold, Gold):
        return gold
    try:
        return _judged(problem, gold.result())
    except VerifierFailure as failure:
        return Gold(problem, "unknown", str(failure))


def _judged(problem: Problem, judgement: Judgement) -> Gold:
    good = judgement.verdict == "right"
    return Gold(problem, "good" if good else "bad", "" if good else f"{judgement.verdict}: {judgement.why}")


def named(golds: list[Gold]) -> str:
    """The rows, with reasons, in one line."""
    rows = [f"{gold.problem.where or gold.problem.id} ({gold.why[:120]})" for gold in golds[:NAMED]]
    more = f" and {len(golds) - NAMED} more (`python -m cipo_fast.tasks check` lists all)" if len(golds) > NAMED else ""
    return ", ".join(rows) + more
