"""Who fails, and who repairs: an engine that owns an engine.

Every call is three things: act, on this rank's engine; agree, so that all ranks have failed or none has; then go on,
or repair. To repair is to restart the engine, to publish the current weights to it and to ask again. What cannot be
repaired is a TrainingStopped on all ranks, and the loop saves its state: nobody above knows more than that.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

from cipo_fast.distributed import together
from cipo_fast.errors import EngineFailure, TrainingStopped
from cipo_fast.records import Completion
from cipo_fast.rollout import Engine, Finished, Sampling, SyncReport

T = TypeVar("T")
FORGOTTEN_S = 3600.0  # a failure older than this, and of an older policy version, counts no more


class SupervisedEngine:
    """An Engine on all ranks together. `publish(version)` syncs the current weights into it: the trainer assigns it.

    `group` is what `generate` agrees on: with overlap it is called in a thread, whose collectives must not meet the
    main thread's. A thread cannot publish either (the weights are being trained), so there a failure is raised, as
    EngineFailure on all ranks, and the main thread's next sync repairs it."""

    def __init__(self, engine: Engine, max_restarts: int, say: Callable[[str], None]):
        self.engine = engine
        self.max_restarts = max_restarts
        self.say = say
        self.publish: Callable[[int], object] = _no_publisher
        self.group: dist.ProcessGroup | None = None
        self.version = -1  # of the weights it should hold
        self.failures: list[tuple[float, int]] = []  # when, and at which version
        self.report: SyncReport | None = None  # of the last whole sync

    @property
    def policy_version(self) -> int:
        return self.engine.policy_version

    @property
    def max_model_len(self) -> int | None:
        return self.engine.max_model_len

    def generate(
        self,
        prompts: Sequence[list[int]],
        n: int,
        sampling: Sampling,
        seed: int,
        finished: Finished | None = None,
    ) -> list[list[Completion]]:
        return self._ask(lambda: self.engine.generate(prompts, n, sampling, seed, finished), self.group)

    def score(self, sequences: Sequence[list[int]]) -> list[list[float]]:
        return self._ask(lambda: self.engine.score(sequences))

    def checksums(self) -> dict[str, int]:
        return self._ask(self.engine.checksums)

    def sync(self, weights: Iterable[tuple[str, Tensor]], version: int) -> SyncReport:
        """A failed one is followed by a `publish` to a fresh engine, whose report this is (`weights` are used up)."""
        self.version = version
        walk = _gathered(weights)

        def act() -> SyncReport:
            try:
                return self.engine.sync(walk, version)
            finally:
                for _ in walk:  # gathering is a collective: the others go to the end, and so does a rank that failed
                    pass

        try:
            self.report = together(act)
        except _GatheringFailed as failure:
            raise failure.error from None
        except EngineFailure as failure:
            self._repair(failure)
        assert self.report is not None
        return self.report

    def release(self) -> None:
        together(self.engine.release)

    def restart(self) -> None:
        together(self.engine.restart)

    def prefix_cache(self) -> tuple[int, int] | None:
        return self.engine.prefix_cache()

    def close(self) -> None:
        self.engine.close()

    def _ask(self, act: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
        while True:
            try:
                return together(act, group)
            except EngineFailure as failure:
                if threading.current_thread() is not threading.main_thread():
                    raise
                self._repair(failure)

    def _repair(self, failure: EngineFailure) -> None:
        """A fresh engine with the current weights; what fails on the way is one more failure."""
        while True:
            together(partial(self._count, failure))  # each rank by its own clock
            self.say(f"engine lost: {failure}; restarting it with the current weights")
            try:
                self.restart()
                break
            except EngineFailure as again:
                failure = again
        self.publish(self.version)

    def _count(self, failure: EngineFailure) -> None:
        now = time.monotonic()
        recent = [(t, v) for t, v in self.failures if now - t < FORGOTTEN_S or v == self.version]
        self.failures = [*recent, (now, self.version)]
        if len(self.failures) > self.max_restarts:
            raise TrainingStopped(
                f"the engine failed {len(self.failures)} times within an hour or a step "
                f"(rollout.server.max_restarts={self.max_restarts}), at last: {failure}"
            )


class _GatheringFailed(BaseException):
    """No Exception, so that no rank agrees on it: the others are in the gathering that this one has left."""

    def __init__(self, error: Exception):
        super().__init__(error)
        self.error = error


def _gathered(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    try:
        yield from weights
    except Exception as error:
        raise _GatheringFailed(error) from error


def _no_publisher(version: int) -> None:
    raise TrainingStopped("the engine was lost, and there is nobody to give a fresh one its weights; start again")
