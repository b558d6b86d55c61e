"""Exploit canaries: answers that try to be paid without being right, through the verifiers that a run uses.

Each row also has a control, its honest answer, which must be right: else a canary could fail because its row is broken.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cipo_fast.verify import Judgement, VerifierFailure

if TYPE_CHECKING:
    from cipo_fast.verify.workers.pool import Judges

ENVIRONMENT = "CIPO_CANARY"  # a variable of the host that no program may see
SECRET = "@SECRET@"  # in a response: the path of a file of the host that no program may read
TOKEN = "@TOKEN@"  # ... and what stands in it
BUILT_IN = ("exact", "math", "code")


@dataclass(frozen=True)
class Canary:
    """An answer to a row. `tries` says how it would be paid; `honest`: it is the control and must be right."""

    name: str
    verifier: str
    row: dict[str, Any]
    response: str
    tries: str
    honest: bool = False

    def passed(self, outcome: Judgement | VerifierFailure) -> bool:
        """Whether the verifier did what it must: a judgement, and no reward unless the answer is the control."""
        return isinstance(outcome, Judgement) and (outcome.reward > 0) == self.honest


Outcome = tuple[Canary, Judgement | VerifierFailure]


def canaries(verifiers: Iterable[str]) -> list[Canary]:
    """Every canary of the verifiers named; a path to a user's function gets answers that fit any row."""
    from cipo_fast.audit import exploits_code, exploits_text

    found: list[Canary] = []
    for verifier in dict.fromkeys(verifiers):
        if verifier == "code":
            found += exploits_code.all_of_them()
        elif verifier in BUILT_IN:
            found += exploits_text.all_of(verifier)
        else:
            found += exploits_text.any_row(verifier)
    return found


def run_canaries(
    judges: Judges, verifiers: Iterable[str], say: Callable[[str], None] = lambda line: None
) -> list[Outcome]:
    """Judge every canary of these verifiers. Returns each with its judgement, or with the failure to judge it;
    `failures` picks those that must not be. A user's function that cannot read the rows tried here is left out."""
    chosen = canaries(verifiers)
    with _bait() as (path, token):
        chosen = [_baited(canary, path, token) for canary in chosen]
        asked = [(canary, judges.submit(canary.row, canary.response)) for canary in chosen]
        outcomes = [(canary, _outcome(future)) for canary, future in asked]
    kept = [
        (canary, outcome)
        for canary, outcome in outcomes
        if canary.verifier in BUILT_IN or isinstance(outcome, Judgement)
    ]
    if len(kept) < len(outcomes):
        say(f"{len(outcomes) - len(kept)} answers tell nothing of a user's function: it cannot read their row")
    wrong = failures(kept)
    controls = sum(canary.honest for canary, _ in kept)
    say(f"canaries: {len(kept) - controls} exploits and {controls} controls, {len(wrong)} failed")
    for canary, outcome in wrong:
        say(f"canary {canary.name}: {_told(canary, outcome)}")
    return kept


def failures(outcomes: Iterable[Outcome]) -> list[Outcome]:
    """The canaries that were paid, the controls that were not, and those that the verifier could not judge."""
    return [(canary, outcome) for canary, outcome in outcomes if not canary.passed(outcome)]


def _told(canary: Canary, outcome: Judgement | VerifierFailure) -> str:
    if isinstance(outcome, VerifierFailure):
        return f"not judged ({outcome})"
    if canary.honest:
        return f"the honest answer is {outcome.verdict} ({outcome.why})"
    return f"earned a reward: {canary.tries}"


def _outcome(future: Future[Judgement]) -> Judgement | VerifierFailure:
    try:
        return future.result()
    except VerifierFailure as failure:
        return failure


def _baited(canary: Canary, path: str, token: str) -> Canary:
    if SECRET not in canary.response:
        return canary
    return replace(canary, response=canary.response.replace(SECRET, path).replace(TOKEN, token))


@contextlib.contextmanager
def _bait() -> Iterator[tuple[str, str]]:
    """A file and a variable of the host, for programs that look for them. Everybody may read the file."""
    token = secrets.token_hex(16)
    before = os.environ.get(ENVIRONMENT)
    with tempfile.TemporaryDirectory(prefix="cipo-canary-") as folder:
        Path(folder).chmod(0o755)
        path = Path(folder) / "secret"
        path.write_text(token, encoding="utf-8")
        os.environ[ENVIRONMENT] = token
        try:
            yield str(path), token
        finally:
            if before is None:
                del os.environ[ENVIRONMENT]
            else:
                os.environ[ENVIRONMENT] = before
