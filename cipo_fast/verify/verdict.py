"""What a verifier says of an answer, and what it is when there is nothing to say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["right", "wrong", "unparsable", "timeout"]


@dataclass(frozen=True)
class Judgement:
    """A verdict on an answer. `why` is one line for a reader; `seconds` what judging took."""

    verdict: Verdict
    why: str = ""
    seconds: float = 0.0

    @property
    def reward(self) -> float:
        """1.0 or 0.0: the only two rewards there are."""
        return float(self.verdict == "right")


class VerifierFailure(Exception):
    """The answer could not be judged: a worker was lost, the sandbox did not start, a user's function raised. Nothing
    is known about the answer, so it is never a reward."""
