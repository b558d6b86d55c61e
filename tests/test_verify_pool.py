"""Judges with real worker processes: hanging answers, killed processes, bad input, and nobody left behind."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, wait
from pathlib import Path

import pytest

from cipo_fast.config import SandboxConfig, VerifyConfig
from cipo_fast.records import Problem
from cipo_fast.verify import Judgement, VerifierFailure, judging
from cipo_fast.verify.workers import dispatcher, frames
from cipo_fast.verify.workers.clock import Clock
from cipo_fast.verify.workers.pool import Judges

VERIFIER = """
import json, os, signal, sys, time

def verify(response, row):
    return globals().get(response.partition(" ")[0], equal)(response, row)

def equal(response, row):
    return response == row["answer"]

def spin(response, row):
    while True:
        pass

def sleep(response, row):
    time.sleep(1000)

def deaf(response, row):
    for number in range(1, 65):
        try:
            signal.signal(number, signal.SIG_IGN)
        except (OSError, ValueError):
            pass
    while True:
        time.sleep(0.01)

def children(response, row):
    for own_session in (False, True):
        if os.fork() == 0:
            if own_session:
                os.setsid()
                if os.fork():
                    os._exit(0)
            time.sleep(1000)
    time.sleep(1000)

def lost(response, row):
    os.kill(os.getpid(), signal.SIGKILL)

def leave(response, row):
    os._exit(3)

def dies_once(response, row):
    path = response.split()[1]
    if not os.path.exists(path):
        open(path, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return True

def memory(response, row):
    return len("x" * (1 << 40)) > 0

def grow(response, row):
    parts = []
    while True:
        parts.append(bytearray(1 << 24))

def deep(response, row):
    return deep(response, row)

def wait(response, row):
    time.sleep(float(response.split()[1]))
    return True

def loud(response, row):
    print("on stdout"); print("on stderr", file=sys.stderr); os.write(1, b"raw"); os.write(2, b"raw")
    return True

def loaded(response, row):
    with open(response.split()[1], "w") as file:
        json.dump(["torch" in sys.modules, "sympy" in sys.modules, "transformers" in sys.modules], file)
    return True

def number(response, row):
    with open(response.split()[1], "a") as file:
        file.write(str(os.getpid()) + "\\n")
    return True

def compute(response, row):
    end = time.process_time() + float(response.split()[1])
    while time.process_time() < end:
        pass
    return True

def computing_child(response, row):
    pid = os.fork()
    if pid == 0:
        os._exit(0 if compute(response, row) else 1)
    return os.waitpid(pid, 0)[1] == 0

def deadlock(response, row):
    import threading
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()

def deadlocked_child(response, row):
    pid = os.fork()
    if pid == 0:
        deadlock(response, row)
    return os.waitpid(pid, 0)[1] == 0

def hangs_up(response, row):
    os.closerange(3, 1000)
    time.sleep(1000)
"""


@pytest.fixture
def row(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "own.py").write_text(VERIFIER)
    return {"verifier": f"{tmp_path / 'own.py'}:verify", "answer": "yes"}


@pytest.fixture
def judges() -> Iterator[Judges]:
    with judges_with(timeout_s=2.0) as judges:
        yield judges


def judges_with(**verify: object) -> Judges:
    return Judges(VerifyConfig(**{"workers": 2, **verify}), SandboxConfig())


def verdict(judges: Judges, row: dict[str, str], response: str) -> Judgement:
    return judges.submit(row, response).result(timeout=60)


def failure(future: Future[Judgement]) -> str:
    with pytest.raises(VerifierFailure) as caught:
        future.result(timeout=60)
    return str(caught.value)


def family(pid: int) -> list[int]:
    """All descendants of a process, zombies among them."""
    found = []
    for child in Path(f"/proc/{pid}/task").glob("*/children"):
        for number in child.read_text().split():
            found += [int(number), *family(int(number))]
    return found


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def until(condition: object, seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:  # type: ignore[operator]
        time.sleep(0.02)
    return bool(condition())  # type: ignore[operator]


def slowness() -> float:
    """How much longer everything takes on this machine since others use it, too."""
    started, cpu = time.monotonic(), time.process_time()
    while time.process_time() - cpu < 0.3:
        pass
    return (time.monotonic() - started) / 0.3


def nursery_of(pid: int) -> int:
    return next(n for n in family(pid) if b"workers.nursery" in Path(f"/proc/{n}/cmdline").read_bytes())


def test_a_large_row_is_encoded_once_for_all_answers() -> None:
    problem = Problem("a", (), "4", "", fields={"tests": "x\u00e9\ud800" * 500_000})
    encoder, found = frames.RowEncoder(), []

    def pack(i: int) -> None:
        found.append(encoder.pack(problem.row, {"response": str(i), "gold": False}))

    threads = [threading.Thread(target=pack, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(part) for parts in found for part in parts if len(part) > 1000}) == 1
    inbox = frames.Inbox()
    read = [message for parts in found for message in inbox.feed(b"".join(parts))]
    assert sorted(message["response"] for message in read) == list("01234567")
    assert all(message == {"row": problem.row, "response": message["response"], "gold": False} for message in read)


def test_encoded_rows_are_bounded_and_small_ones_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "MOST_KEPT", 4 * 100_000)
    encoder, rows = frames.RowEncoder(), [{"text": "x" * 99_000} for _ in range(5)]
    first = [encoder.pack(row, {"n": 1})[2] for row in rows]
    again = [encoder.pack(row, {"n": 1})[2] for row in reversed(rows)]
    assert [one is other for one, other in zip(first, reversed(again), strict=True)] == [False, True, True, True, True]
    small = {"text": "x"}
    encoder.pack(small, {"n": 1})
    small["text"] = "y"
    assert b'"y"' in encoder.pack(small, {"n": 1})[2]
    huge = {"text": "x" * 500_000}
    assert encoder.pack(huge, {"n": 1})[2] is not encoder.pack(huge, {"n": 1})[2]  # larger than all that may be kept
    with pytest.raises(TypeError):
        encoder.pack({"text": b""}, {"n": 1})


def test_many_answers_to_a_large_row(judges: Judges, row: dict[str, str]) -> None:
    large = {**row, "tests": ["x" * 1000] * 5000}
    futures = [judges.submit(large, ("yes", "no")[i % 2]) for i in range(8)]
    assert [future.result(timeout=60).verdict for future in futures] == ["right", "wrong"] * 4


@pytest.mark.slow
def test_hanging_answers_delay_no_other(judges: Judges, row: dict[str, str]) -> None:
    """20 of 256 hang. One after the other on two workers they would take 20 s."""
    verdict(judges, row, "yes")
    bad = ["spin", "sleep", "deaf", "children"]
    responses = [bad[i // 12 % 4] if i % 12 == 5 and i < 240 else ("yes", "no")[i % 2] for i in range(256)]
    assert sum(r in bad for r in responses) == 20
    started = time.monotonic()
    futures = [judges.submit(row, response) for response in responses]
    expected = {"yes": "right", "no": "wrong"}
    verdicts = [future.result(timeout=60).verdict for future in futures]
    took = time.monotonic() - started
    assert verdicts == [expected.get(response, "timeout") for response in responses]
    assert took < 12 * slowness(), "20 s of hanging in two workers, had the others waited"
    assert until(lambda: len(family(os.getpid())) <= 3), "the nursery and two workers"


@pytest.fixture
def load() -> Iterator[None]:
    """A busy machine: five loops a core, each in a session of its own, since Linux shares by session."""
    loops = [
        subprocess.Popen([sys.executable, "-Sc", "while True: pass"], start_new_session=True)
        for _ in range(5 * len(os.sched_getaffinity(0)))
    ]
    yield
    for loop in loops:
        loop.kill()
        loop.wait()


def test_verdicts_do_not_depend_on_load(load: None, row: dict[str, str]) -> None:
    """Each would be a time-out by the wall: many easy answers, and two that need most of their time."""
    with judges_with(timeout_s=1.0) as judges:
        easy = [judges.submit(row, "compute 0.02") for _ in range(60)]
        assert Counter(future.result(timeout=120).verdict for future in easy) == {"right": 60}
        # Of their second each needs most, and a child's start some more.
        hard = [judges.submit(row, response) for response in ("compute 0.6", "computing_child 0.6")]
        started = time.monotonic()
        assert [future.result(timeout=120).verdict for future in hard] == ["right", "right"]
        assert time.monotonic() - started > 1.0, "the machine was not busy: this tests nothing"


def test_what_hangs_is_a_timeout_under_load(load: None, row: dict[str, str]) -> None:
    with judges_with(timeout_s=1.0) as judges:
        bad = [judges.submit(row, response) for response in ("sleep", "deadlock", "deadlocked_child", "spin")]
        easy = [judges.submit(row, "yes") for _ in range(20)]
        assert {future.result(timeout=120).verdict for future in easy} == {"right"}
        for future in bad:
            judged = future.result(timeout=120)
            assert judged.verdict == "timeout"
            assert judged.seconds >= 1.0


def test_a_starved_answer_is_no_verdict(row: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that never runs: stopped from outside, which is as good as a machine without a free core."""
    monkeypatch.setattr("cipo_fast.verify.workers.turn.BACKSTOP_S", 2.0)
    with judges_with(timeout_s=0.3, workers=1) as judges:
        assert verdict(judges, row, "yes").verdict == "right"
        future = judges.submit(row, "wait 0.2")
        os.kill(family(nursery_of(os.getpid()))[0], signal.SIGSTOP)
        assert failure(future).startswith("starved: it got ")
        assert verdict(judges, row, "yes").verdict == "right"


def test_own_time(load: None) -> None:
    """Sleep counts whole, and of a busy process, its children among it, what it had of the processors."""
    own = {}
    for name, code in {
        "sleep": "import time; time.sleep(60)",
        "spin": "while True: pass",
        "child": "import os; os.fork() and os.wait()\nwhile True: pass",
    }.items():
        process = subprocess.Popen([sys.executable, "-Sc", code])
        time.sleep(1.0)
        clock = Clock(process.pid)
        for _ in range(10):
            time.sleep(0.2)
            clock.look()
        own[name] = clock.own_s / clock.wall_s
        assert clock.spins == (name != "sleep")
        process.send_signal(signal.SIGSTOP)
        clock.look()
        before = clock.own_s
        time.sleep(0.3)
        assert clock.look() - before < 0.1, "what is stopped has no time"
        for number in (*family(process.pid), process.pid):
            os.kill(number, signal.SIGKILL)
        process.wait()
    assert own["sleep"] > 0.9
    assert own["spin"] < 0.8
    assert own["child"] < 0.8


def test_a_deadline_is_a_verdict_with_a_reason(row: dict[str, str]) -> None:
    with judges_with(timeout_s=0.5) as judges:
        judged = verdict(judges, row, "sleep")
    assert judged.verdict == "timeout"
    assert judged.why == "no verdict within 0.5 s"
    assert 0.5 <= judged.seconds < 5
    assert judged.reward == 0


def test_exact_rows_need_no_process(judges: Judges) -> None:
    before = family(os.getpid())
    assert verdict(judges, {"verifier": "exact", "answer": "a\nb"}, " a\r\nb\n").verdict == "right"
    assert verdict(judges, {"verifier": "exact", "answer": "a"}, "A").verdict == "wrong"
    assert family(os.getpid()) == before


def test_nothing_is_left_after_close(row: dict[str, str]) -> None:
    judges = judges_with(timeout_s=60)
    futures = [judges.submit(row, response) for response in ("spin", "children", "deaf", "yes", "spin")]
    assert until(lambda: len(family(os.getpid())) >= 5)
    started = family(os.getpid())
    judges.close()
    assert not any(alive(pid) for pid in started)
    assert {failure(future) for future in futures if future.exception(0)} == {"the judges were closed"}
    assert failure(judges.submit(row, "yes")) == "the judges are closed"
    judges.close()


def test_a_lost_worker_is_tried_once_more(judges: Judges, row: dict[str, str], tmp_path: Path) -> None:
    assert verdict(judges, row, f"dies_once {tmp_path / 'mark'}").verdict == "right"
    assert failure(judges.submit(row, "lost")) == "two workers were lost over it (signal 9)"
    assert failure(judges.submit(row, "leave")) == "two workers were lost over it (exit code 3)"
    assert "two workers were lost" in failure(judges.submit(row, "hangs_up"))
    assert verdict(judges, row, "yes").verdict == "right"


def test_workers_killed_from_outside(judges: Judges, row: dict[str, str]) -> None:
    futures = [judges.submit(row, f"wait {0.02 + 0.001 * i}") for i in range(60)]
    wait(futures[:1])
    nursery = nursery_of(os.getpid())
    for _ in range(6):
        time.sleep(0.15)
        for worker in family(nursery)[:1]:
            os.kill(worker, signal.SIGKILL)
    outcomes = Counter("lost" if future.exception(timeout=60) else future.result().verdict for future in futures)
    assert outcomes["right"] >= 58, "an item must be hit twice to fail"
    assert outcomes.keys() <= {"right", "lost"}


def test_a_nursery_killed_from_outside_is_replaced(judges: Judges, row: dict[str, str]) -> None:
    futures = [judges.submit(row, "wait 0.1") for _ in range(30)]
    assert until(lambda: futures[2].done())
    nursery = nursery_of(os.getpid())
    workers = family(nursery)
    os.kill(nursery, signal.SIGKILL)
    assert [future.result(timeout=60).verdict for future in futures] == ["right"] * 30
    assert until(lambda: not any(alive(pid) for pid in [nursery, *workers]))
    assert nursery_of(os.getpid()) != nursery


def test_a_stopped_nursery_is_replaced(judges: Judges, row: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """It neither answers nor dies: the batch goes on without it."""
    monkeypatch.setattr("cipo_fast.verify.workers.home.REPLY_S", 1.0)
    assert verdict(judges, row, "yes").verdict == "right"
    nursery = nursery_of(os.getpid())
    os.kill(nursery, signal.SIGSTOP)
    futures = [judges.submit(row, "sleep") for _ in range(3)] + [judges.submit(row, "yes")]
    assert [future.result(timeout=60).verdict for future in futures] == ["timeout"] * 3 + ["right"]
    assert until(lambda: not alive(nursery))


def test_memory_is_limited(row: dict[str, str]) -> None:
    with judges_with(timeout_s=30, memory_mib=512) as judges:
        for response in ("memory", "grow"):
            judged = verdict(judges, row, response)
            assert judged.verdict == "timeout"
            assert "verify.memory_mib=512" in judged.why
        assert verdict(judges, row, "yes").verdict == "right"


@pytest.mark.parametrize(
    "response", ["", "\0", "\ud800 \udfff", "a\r\n\u2028\x85b", "x" * 10_000_000, "é" * 1_000_000, "\U0001f600"]
)
def test_any_text_travels(judges: Judges, row: dict[str, str], response: str) -> None:
    assert verdict(judges, {**row, "answer": response}, response).verdict == "right"
    assert verdict(judges, {**row, "answer": response}, response + "\0").verdict == "wrong"


def test_what_cannot_travel_is_a_failure(judges: Judges, row: dict[str, str]) -> None:
    nested: list[object] = []
    for _ in range(100_000):
        nested = [nested]
    assert "cannot be sent" in failure(judges.submit({**row, "tests": nested}, "yes"))
    assert "cannot be sent" in failure(judges.submit({**row, "tests": {1, 2}}, "yes"))
    assert "RecursionError" in failure(judges.submit(row, "deep"))
    assert verdict(judges, row, "yes").verdict == "right"


def test_a_row_without_a_verifier_is_a_failure(judges: Judges) -> None:
    assert failure(judges.submit({"answer": "1"}, "1")).startswith("verifier is missing")
    assert failure(judges.submit({"verifier": "maths", "answer": "1"}, "1")).startswith("verifier is 'maths'")
    assert "answer" in failure(judges.submit({"verifier": "exact"}, "1"))


def test_workers_load_no_torch_and_share_sympy(judges: Judges, row: dict[str, str], tmp_path: Path) -> None:
    assert "torch" in sys.modules or __import__("torch")
    assert verdict(judges, row, f"loaded {tmp_path / 'modules'}").verdict == "right"
    assert json.loads((tmp_path / "modules").read_text()) == [False, True, False]


def test_workers_are_recycled(
    judges: Judges, row: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatcher, "JOBS", 5)
    assert all(verdict(judges, row, f"number {tmp_path / 'pids'}").verdict == "right" for _ in range(20))
    assert set(Counter((tmp_path / "pids").read_text().split()).values()) == {5}


def test_slow_answers_that_end_start_no_crowd(row: dict[str, str]) -> None:
    """A verifier that takes half a second each time is no reason for ever more processes."""
    with judges_with(timeout_s=30) as judges:
        futures = [judges.submit(row, "wait 0.5") for _ in range(24)]
        most = 0
        while wait(futures, timeout=0.05).done != set(futures):
            most = max(most, len(family(nursery_of(os.getpid()))))
        assert most <= 12
        assert {future.result().verdict for future in futures} == {"right"}


def test_a_cancelled_item_is_not_judged(row: dict[str, str], tmp_path: Path) -> None:
    with judges_with(workers=1, timeout_s=5) as judges:
        first = judges.submit(row, "wait 0.15")
        second = judges.submit(row, f"number {tmp_path / 'pids'}")
        assert second.cancel()
        assert first.result(timeout=60).verdict == "right"
        assert verdict(judges, row, "yes").verdict == "right"
    assert not (tmp_path / "pids").exists()


def test_several_threads_and_two_pools(row: dict[str, str]) -> None:
    with judges_with(timeout_s=5) as first, judges_with(timeout_s=5) as second:
        found: list[str] = []

        def ask(judges: Judges) -> None:
            found.extend(verdict(judges, row, ("yes", "no")[i % 2]).verdict for i in range(25))

        threads = [threading.Thread(target=ask, args=(judges,)) for judges in (first, second) * 2]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        first.close()
        assert verdict(second, row, "yes").verdict == "right"
    assert Counter(found) == {"right": 52, "wrong": 48}


def test_no_worker_can_be_started(row: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A Python that ends at once: three tries, then the line that it said."""
    monkeypatch.setattr("cipo_fast.verify.workers.home._START", "raise SystemExit('no room')")
    with judges_with() as judges:
        assert "no room" in failure(judges.submit(row, "yes"))
        monkeypatch.undo()
        assert verdict(judges, row, "yes").verdict == "right"


SCRIPT = """
import sys, time
import torch
from cipo_fast.config import SandboxConfig, VerifyConfig
from cipo_fast.verify.workers.pool import Judges

print("imported", flush=True)
judges = Judges(VerifyConfig(workers=2, timeout_s=1000), SandboxConfig())
row = {"verifier": sys.argv[1], "answer": "yes"}
print(judges.submit(row, "yes").result().verdict, judges.submit(row, "loud").result().verdict, flush=True)
futures = [judges.submit(row, response) for response in ("spin", "children", "deaf")]
print("hanging", flush=True)
time.sleep(float(sys.argv[2]))
"""


def script(tmp_path: Path, row: dict[str, str], seconds: float) -> subprocess.Popen[str]:
    path = tmp_path / "trainer.py"
    path.write_text(textwrap.dedent(SCRIPT))
    return subprocess.Popen(
        [sys.executable, str(path), row["verifier"], str(seconds)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=tmp_path,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where the tests run behind `&`
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT, None])
def test_nobody_outlives_the_trainer(tmp_path: Path, row: dict[str, str], end: signal.Signals | None) -> None:
    """A script as __main__, its output clean, and it ends: killed, by Ctrl+C in its terminal, or without a close."""
    trainer = script(tmp_path, row, 2 if end is None else 1000)
    assert trainer.stdout is not None
    assert [trainer.stdout.readline().strip() for _ in range(3)] == ["imported", "right right", "hanging"]
    assert until(lambda: len(family(trainer.pid)) >= 5)
    started = family(trainer.pid)
    try:
        if end is not None:
            os.killpg(trainer.pid, end)
        rest = trainer.communicate(timeout=60)[0]
    finally:
        trainer.kill()
    assert until(lambda: not any(alive(pid) for pid in started))
    if end is signal.SIGINT:
        assert rest.strip().endswith("KeyboardInterrupt")
    else:
        assert rest == ""


def test_golds_are_judged_the_long_way(judges: Judges, row: dict[str, str]) -> None:
    """A math gold that is no mathematics is refused, although it equals itself as a text."""

    def gold(answer: str, verifier: str = "math") -> str:
        return judges.submit_gold({"verifier": verifier, "answer": answer}).result(timeout=60).verdict

    assert gold("\\frac{\\sqrt{2}}{2}") == "right"
    assert gold("x^{2^{") == "wrong"
    assert gold("x^{2^{", "exact") == "right"
    assert "no gold" in failure(judges.submit_gold({**row, "answer": "1"}))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"verifier": "exact"}, "answer is missing"),
        ({"verifier": "exact", "answer": " "}, "answer is empty"),
        ({"verifier": "exact", "answer": [1]}, "answer is list, not text or a number"),
        ({"verifier": "math"}, "answer is missing"),
        ({"verifier": "math", "answer": ""}, "answer is empty"),
        ({"verifier": "maths", "answer": "1"}, "verifier is 'maths'"),
        ({"answer": "1"}, "verifier is missing"),
    ],
)
def test_broken_rows_are_named(row: dict[str, object], said: str) -> None:
    found = judging.check_row(row)
    assert found is not None
    assert found.startswith(said)
