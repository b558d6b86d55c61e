"""What is kept of an evaluation: one JSON object a problem, with every answer that was sampled, in samples.jsonl."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from cipo_fast.errors import UserError
from cipo_fast.records import Problem, Rollout
from cipo_fast.verify import exact
from cipo_fast.verify import math as mathematics

SAMPLES = "samples.jsonl"


@dataclass(frozen=True)
class Answer:
    """`tokens`: how many were sampled. `canonical`: what maj@k compares; "" without an answer (cut off, no box), None
    where the verifier knows no such form (code, a user's function)."""

    text: str
    tokens: int
    reward: float
    verdict: str
    truncated: bool
    canonical: str | None

    @property
    def right(self) -> bool:
        return self.reward > 0


@dataclass(frozen=True)
class Chain:
    """An attempt (its index) that is checked round after round, each round checking the answer of the one before.
    None where nothing was shown: it `ended` in that round, as what was to be shown was truncated, or with it the prompt
    too long; or where nobody could judge the answer (failed)."""

    attempt: int
    answers: list[Answer | None]
    ended: Literal["", "truncated", "too long", "failed"] = ""


@dataclass(frozen=True)
class Record:
    """A problem's answers, those that could be judged: one greedy, up to `n` at T=1, and `checks` rounds a chain.
    `failed` counts the others, `failure` is what was said of the first. `content` tells problems of one id apart.
    `seconds`: its share of its batch's time."""

    problem: str
    source: str
    n: int
    checks: int
    greedy: Answer | None
    attempts: list[Answer]
    chains: list[Chain] = field(default_factory=list)
    failed: int = 0
    failure: str = ""
    content: str = ""
    seconds: float = 0.0

    @property
    def answers(self) -> Iterator[Answer]:
        """All of them."""
        found = [self.greedy, *self.attempts, *(a for chain in self.chains for a in chain.answers)]
        return (answer for answer in found if answer is not None)

    def line(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False) + "\n"


def answer_of(rollout: Rollout) -> Answer:
    canonical = canonical_of(rollout.problem.row, rollout.text)
    if canonical is not None and rollout.truncated:
        canonical = ""
    length = len(rollout.token_ids)
    return Answer(rollout.text, length, rollout.reward, rollout.verdict, rollout.truncated, canonical)


def canonical_of(row: dict[str, Any], text: str) -> str | None:
    """What two answers that are the same to the row's verifier mostly share; None where it knows no such form."""
    if row["verifier"] == "exact":
        return exact.canonical(text)
    return mathematics.canonical_answer(row, text) if row["verifier"] == "math" else None


def content_of(problem: Problem) -> str:
    """16 hexadecimal digits of what is asked."""
    return hashlib.sha256(repr(problem.content).encode(errors="surrogatepass")).hexdigest()[:16]


def record_of(line: bytes | str) -> Record:
    """Raises ValueError for what is no whole line of samples.jsonl."""
    try:
        found = json.loads(line)
        chains = [Chain(c["attempt"], [_answer(a) for a in c["answers"]], c["ended"]) for c in found["chains"]]
        attempts = [Answer(**answer) for answer in found["attempts"]]
        return Record(**{**found, "greedy": _answer(found["greedy"]), "attempts": attempts, "chains": chains})
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"not a problem's answers ({error})") from None


def read_records(folder: Path) -> list[Record]:
    """Of an evaluation that has ended; raises UserError."""
    path = folder / SAMPLES
    found: list[Record] = []
    try:
        for line in path.read_bytes().splitlines():
            found.append(record_of(line))
    except ValueError as error:
        where = f"{path}:{len(found) + 1}"
        raise UserError(f"{where}: {error}; the command that began this evaluation goes on with it") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): is {folder} an evaluation's folder?") from None
    if not found:
        raise UserError(f"{path}: holds no problem yet")
    return found


def _answer(found: dict[str, Any] | None) -> Answer | None:
    return None if found is None else Answer(**found)
