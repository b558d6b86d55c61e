"""An item at a worker: when it is slow, when it is out of time, and when the machine never gave it time.

Time is the worker's own (clock.py). An answer is a `timeout` when its deadline by the wall has passed since it was
handed out *and* it had that much time of its own: on a busy machine it gets longer, not less. Of answers that spin
there may be more than processors; then each is owed no more than its share of the deadline, or 20 of them would take
20 deadlines. What had nearly nothing of its own for many deadlines is starved, and that is no verdict.
"""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import dataclass, field

from cipo_fast.verify.verdict import Judgement, VerifierFailure
from cipo_fast.verify.workers.clock import Clock

SLOW = 4.0  # times the average
HANGS = 20.0  # times the average: whatever the crowd, no time-out before
LEAST = 1 / 20  # of the deadline: nor before that
FAIR = 0.5  # of its share of the processors that a spinning answer must have had: the trainer needs some, too
BACKSTOP, BACKSTOP_S = 6.0, 30.0  # deadlines by the wall, and no less than that many seconds
ENOUGH = 1 / 10  # of the deadline as own time, with HANGS: then it is a time-out at the backstop
ASIDE = 1 / 2  # of a deadline that a spinning worker stands still, at most, for those that wait
STEP_S, SHORTEST_STEP_S = 0.25, 0.02  # between looks


@dataclass(eq=False)
class Item:
    """Something to judge. The parts of its message for a worker may be those of other items, too."""

    payload: tuple[bytes, ...]
    deadline_s: float
    patience_s: float
    verifier: str
    future: Future[Judgement] = field(default_factory=Future)
    lost: int = 0  # workers that died over it


class Turn:
    def __init__(self, item: Item, pid: int, average_s: float):
        """`average_s`: own time of this verifier's answers."""
        self.clock = Clock(pid)
        self._deadline_s, self._average_s = item.deadline_s, average_s
        self._patience_s = max(item.patience_s, SLOW * average_s)
        self._owed_s = self._owed_until_s = 0.0
        self._aside_s: float | None = None  # since when, by the wall
        self.slow = False
        self.next_look = time.monotonic() + self._patience_s

    @property
    def spins(self) -> bool:
        return self.slow and self.clock.spins

    def look(self, average_s: float, spinning: int, cores: int) -> None:
        """`average_s` as of now; `spinning`: workers in all that do."""
        self._average_s = average_s
        own_s, wall_s = self.clock.look(), self.clock.wall_s
        share = 1.0 if spinning <= cores else FAIR * cores / spinning
        until_s = min(wall_s, self._deadline_s)
        if not self.aside:
            self._owed_s += share * (until_s - self._owed_until_s)
        self._owed_until_s = until_s
        self.slow = self.slow or own_s >= self._patience_s
        if not self.slow:
            step_s = self._patience_s - own_s
        elif wall_s < self._deadline_s:
            step_s = min(STEP_S, self._deadline_s - wall_s)
        else:
            step_s = min(STEP_S, self._claim_s - own_s)
        self.next_look = time.monotonic() + max(step_s, SHORTEST_STEP_S)

    @property
    def _claim_s(self) -> float:
        return max(self._owed_s, self._at_least(LEAST))

    def _at_least(self, part: float) -> float:
        """A part of the deadline, in seconds, more where this verifier's answers take long."""
        return min(self._deadline_s, max(part * self._deadline_s, HANGS * self._average_s))

    def end(self) -> Judgement | VerifierFailure | None:
        """As of the last look: a time-out, the news that it was starved, or None: it goes on."""
        wall_s, own_s = self.clock.wall_s, self.clock.own_s
        if wall_s >= self._deadline_s and own_s >= self._claim_s:
            return self._timeout
        if wall_s < max(BACKSTOP * self._deadline_s, BACKSTOP_S):
            return None
        if own_s >= self._at_least(ENOUGH):
            return self._timeout
        return VerifierFailure(f"starved: it got {own_s:.2g} s in {wall_s:.3g} s, the machine is too busy to judge")

    @property
    def _timeout(self) -> Judgement:
        return Judgement("timeout", f"no verdict within {self._deadline_s:g} s", self.clock.wall_s)

    # --- it may stand aside for a while: stopped, so that others are judged first

    @property
    def aside(self) -> bool:
        return self._aside_s is not None

    def step_aside(self) -> None:
        self._aside_s = self.clock.wall_s

    @property
    def stood_long(self) -> bool:
        return self._aside_s is not None and self.clock.wall_s - self._aside_s >= ASIDE * self._deadline_s

    def go_on(self) -> None:
        self.clock.look()  # what it stood was not its own time
        self._owed_until_s = min(self.clock.wall_s, self._deadline_s)  # nor is it owed
        self._aside_s = None
