"""Act, agree, repair: an engine that wraps one which fails as it is told."""

import threading
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from cipo_fast.errors import EngineFailure, RankFailure, TrainingStopped
from cipo_fast.records import Completion
from cipo_fast.rollout import Finished, Sampling, SyncReport
from cipo_fast.rollout import supervised as supervised_module
from cipo_fast.rollout.supervised import SupervisedEngine

SAMPLING = Sampling(1.0, 1.0, 4)
pytestmark = pytest.mark.usefixtures("mesh")


class Fails:
    """`failures`: what the next calls raise, by the call's name; a restart mends nothing but the weights' absence."""

    max_model_len = None

    def __init__(self, **failures: list[Exception]):
        self.failures = failures
        self.policy_version = -1
        self.calls: list[str] = []

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if self.failures.get(name):
            raise self.failures[name].pop(0)

    def generate(
        self, prompts: list[list[int]], n: int, sampling: Sampling, seed: int, finished: Finished | None = None
    ) -> list[list[Completion]]:
        if finished is not None:
            finished(0, [seed])  # before it fails, if it does
        self._call("generate")
        return [[Completion([seed], [0.0], False, self.policy_version)] * n for _ in prompts]

    def sync(self, weights: Iterable[tuple[str, Tensor]], version: int) -> SyncReport:
        first = next(iter(weights))
        self._call("sync")
        self.policy_version = version
        return SyncReport(version, 1, first[1].nbytes, 0.0)

    def restart(self) -> None:
        self.policy_version = -1
        self._call("restart")


class Weights:
    """Counts how often all of them were gathered."""

    def __init__(self) -> None:
        self.whole = 0

    def walk(self) -> Iterable[tuple[str, Tensor]]:
        for i in range(3):
            yield f"w{i}", torch.zeros(i + 1)
        self.whole += 1


def engine_of(inner: Fails, max_restarts: int = 3) -> tuple[SupervisedEngine, Weights, list[str]]:
    weights, said = Weights(), []
    engine = SupervisedEngine(inner, max_restarts, said.append)
    engine.publish = lambda version: engine.sync(weights.walk(), version)
    engine.publish(5)
    return engine, weights, said


def test_a_request_that_fails_is_asked_again_of_a_fresh_engine_with_the_same_weights(mesh: DeviceMesh) -> None:
    inner = Fails(generate=[EngineFailure("gone")])
    engine, _, said = engine_of(inner)
    (completions,) = engine.generate([[1]], 2, SAMPLING, 7)
    assert [c.token_ids for c in completions] == [[7], [7]]
    assert completions[0].policy_version == 5
    assert inner.calls == ["sync", "generate", "restart", "sync", "generate"]
    assert said == ["engine lost: gone; restarting it with the current weights"]


def test_answers_are_told_of_through_a_repair(mesh: DeviceMesh) -> None:
    """And again: who listens knows an answer by its prompt and ids (marking.py)."""
    engine, _, _ = engine_of(Fails(generate=[EngineFailure("gone")]))
    told: list[tuple[int, list[int]]] = []
    engine.generate([[1]], 1, SAMPLING, 7, lambda i, ids: told.append((i, ids)))
    assert told == [(0, [7]), (0, [7])]


def test_a_sync_that_fails_is_published_again_and_always_gathered_to_its_end(mesh: DeviceMesh) -> None:
    inner = Fails(sync=[EngineFailure("half-way")])
    engine, weights, _ = engine_of(inner)
    assert inner.calls == ["sync", "restart", "sync"]
    assert weights.whole == 2  # the one that failed too: other ranks gather
    assert engine.report == SyncReport(5, 1, 4, 0.0)
    assert engine.policy_version == 5


def test_what_fails_during_the_repair_is_one_more_failure(mesh: DeviceMesh) -> None:
    inner = Fails(generate=[EngineFailure("a")], restart=[EngineFailure("b")])
    engine, _, said = engine_of(inner)
    engine.generate([[1]], 1, SAMPLING, 0)
    assert [line.split(";")[0] for line in said] == ["engine lost: a", "engine lost: b"]


def test_an_engine_that_keeps_failing_stops_the_run(mesh: DeviceMesh) -> None:
    engine, _, said = engine_of(Fails(generate=[EngineFailure(str(i)) for i in range(9)]), max_restarts=2)
    with pytest.raises(TrainingStopped, match=r"failed 3 times .*max_restarts=2.*, at last: 2"):
        engine.generate([[1]], 1, SAMPLING, 0)
    assert len(said) == 2


def test_failures_of_other_hours_and_steps_are_forgotten(mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(supervised_module.time, "monotonic", lambda: now[0])
    inner = Fails()
    engine, _, said = engine_of(inner, max_restarts=1)
    for step in range(6, 12):
        now[0] += 3601.0
        engine.publish(step)
        inner.failures["generate"] = [EngineFailure("now and then")]
        engine.generate([[1]], 1, SAMPLING, 0)
    assert len(said) == 6
    now[0] += 3601.0  # an hour later, but no step further
    inner.failures["generate"] = [EngineFailure("again")]
    with pytest.raises(TrainingStopped, match="failed 2 times"):
        engine.generate([[1]], 1, SAMPLING, 0)


def test_what_nobody_foresaw_stops_the_run_with_its_cause(mesh: DeviceMesh) -> None:
    engine, *_ = engine_of(Fails(generate=[OSError("No space left on device")]))
    with pytest.raises(RankFailure, match=r"^OSError: No space left on device$") as caught:
        engine.generate([[1]], 1, SAMPLING, 0)
    assert isinstance(caught.value.__cause__, OSError)


def test_a_thread_leaves_the_repair_to_the_next_sync(mesh: DeviceMesh) -> None:
    """The thread samples ahead while the weights are being trained: nobody can publish them."""
    inner, found = Fails(generate=[EngineFailure("gone")]), []
    engine, *_ = engine_of(inner)

    def ahead() -> None:
        try:
            engine.generate([[1]], 1, SAMPLING, 0)
        except EngineFailure as failure:
            found.append(str(failure))

    thread = threading.Thread(target=ahead)
    thread.start()
    thread.join()
    assert found == ["gone"]
    assert "restart" not in inner.calls
    inner.failures["sync"] = [EngineFailure("still gone")]
    engine.publish(6)
    assert inner.calls[-2:] == ["restart", "sync"]
    assert engine.generate([[1]], 1, SAMPLING, 0)[0][0].policy_version == 6
