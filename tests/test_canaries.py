"""Exploits earn nothing through the verifiers, and would through a naive one."""

import json
import subprocess
import sys
from collections import Counter
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from cipo_fast.audit.canaries import ENVIRONMENT, SECRET, Canary, canaries, failures, run_canaries
from cipo_fast.config import SandboxConfig, VerifyConfig
from cipo_fast.verify import Judgement, VerifierFailure
from cipo_fast.verify.workers.pool import Judges

BUILT_IN = ("exact", "math", "code")

# In the program's own process, the way of many: expected values beside it, ==, the exit code as the verdict.
NAIVE = """
import json, sys
row, program = json.loads(sys.stdin.readline())
names = {"__name__": "__main__"}
try:
    exec(program, names)
    if "test" in row:
        exec(row["test"] + "\\ncheck(" + row["entry_point"] + ")", names)
    else:
        for test in row["tests"]:
            if not names[row["entry_point"]](*test["args"]) == test["expected"]:
                sys.exit(1)
except Exception:
    sys.exit(1)
"""


def naive(canary: Canary) -> Judgement:
    """The verdict of an in-process harness; it stays in a subprocess of the test."""
    program = canary.response.split("\n", 1)[1].rpartition("\n")[0]
    done = subprocess.run(
        [sys.executable, "-c", NAIVE],
        input=json.dumps([canary.row, program]) + "\n",
        capture_output=True,
        text=True,
        timeout=30,
    )
    return Judgement("wrong" if done.returncode else "right")


class At:
    """Judges that answer with a function of this file: what run_canaries makes of it."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def submit(self, row: dict[str, Any], response: str) -> Future[Judgement]:
        future: Future[Judgement] = Future()
        try:
            future.set_result(self.answer(row, response))
        except VerifierFailure as failure:
            future.set_exception(failure)
        return future


@pytest.mark.slow
def test_no_exploit_is_paid() -> None:
    said: list[str] = []
    with Judges(VerifyConfig(workers=2), SandboxConfig(cpu_s=1)) as judges:
        outcomes = run_canaries(judges, BUILT_IN, said.append)
        assert failures(outcomes) == []
        again = Canary(
            "", "code", {"verifier": "code", "tests": [{"args": [1], "expected": 1}]}, "def f(n): return n", ""
        )
        assert judges.submit(again.row, again.response).result().verdict == "right"  # the pool is whole
    kinds = Counter((canary.verifier, canary.honest) for canary, _ in outcomes)
    assert kinds["code", False] >= 150
    assert kinds["math", False] >= 40
    assert kinds["exact", False] >= 10
    assert kinds["code", True] >= 9
    assert "0 failed" in said[-1]


@pytest.mark.parametrize(
    "name",
    [
        "calls-eq-object",
        "calls-eq-int",
        "calls-eq-str",
        "calls-eq-list",
        "calls-frames",
        "calls-gc",
        "calls-exit",
        "calls-hard-exit",
        "calls-hard-exit-in-call",
        "calls-exit-in-call",
        "suite-eq-callable",
        "suite-atexit",
        "suite-hard-exit",
        "types-bool-for-int",
        "nothing-exit",
        "sorts-emptied",
        "sorts-arithmetic",
        "calls-passwords",
    ],
)
def test_the_canary_is_paid_by_a_naive_verifier(name: str) -> None:
    """Each of these would be noticed: an exploit that nobody pays for tells nothing."""
    [canary] = [canary for canary in canaries(["code"]) if canary.name == f"code/{name}"]
    judgement = naive(canary)
    if name == "calls-passwords" and judgement.reward == 0:
        pytest.skip("needs root: it reads /etc/shadow")
    assert failures([(canary, judgement)]) != []


def test_the_naive_verifier_pays_controls_and_not_everything() -> None:
    chosen = canaries(["code"])
    controls = [c for c in chosen if c.name in ("code/control-calls", "code/control-suite", "code/control-sorts")]
    assert len(controls) == 3
    assert failures((canary, naive(canary)) for canary in controls) == []
    [wrong] = [c for c in chosen if c.name == "code/suite-visible-tests"]
    assert naive(wrong).reward == 0


def test_a_reward_a_failure_and_a_broken_row_are_told() -> None:
    said: list[str] = []
    outcomes = run_canaries(At(lambda row, response: Judgement("right")), ["exact"], said.append)
    assert {canary.honest for canary, _ in failures(outcomes)} == {False}
    assert any("earned a reward" in line for line in said)
    outcomes = run_canaries(At(lambda row, response: Judgement("wrong")), ["math"], said.append)
    assert {canary.honest for canary, _ in failures(outcomes)} == {True}

    def lost(row: dict[str, Any], response: str) -> Judgement:
        raise VerifierFailure("a worker was lost")

    outcomes = run_canaries(At(lost), ["exact"], said.append)
    assert len(failures(outcomes)) == len(outcomes) > 10
    assert "not judged (a worker was lost)" in said[-1]


def test_the_bait_is_laid_and_taken_away(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.delenv(ENVIRONMENT, raising=False)
    seen = []

    def look(row: dict[str, Any], response: str) -> Judgement:
        if "cipo-canary-" in response and "read()" in response:
            path = response.split("open('")[1].split("'")[0]
            seen.append((path, Path(path).read_text() in response, bool(os.environ.get(ENVIRONMENT))))
        return Judgement("wrong")

    outcomes = run_canaries(At(look), ["code"])
    assert seen
    assert all(bait[1:] == (True, True) for bait in seen)
    assert not Path(seen[0][0]).exists()
    assert ENVIRONMENT not in os.environ
    assert not any(SECRET in canary.response for canary, _ in outcomes)


USER = """
def same(response, row):
    return response.strip() == row["answer"]

def generous(response, row):
    return "right" in response or len(response) > 1000

def wants_more(response, row):
    return response == row["solution"]
"""


def test_a_users_own_function(tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text(USER)
    with Judges(VerifyConfig(workers=1), SandboxConfig()) as judges:
        assert failures(run_canaries(judges, [f"{path}:same"])) == []
        paid = failures(run_canaries(judges, [f"{path}:generous"]))
        assert {canary.name.rpartition("/")[2] for canary, _ in paid} == {"right", "injected", "json", "boxes", "long"}
        said: list[str] = []
        assert run_canaries(judges, [f"{path}:wants_more"], said.append) == []
        assert "tell nothing" in said[0]


def test_names_are_unique_and_every_row_has_a_control() -> None:
    chosen = canaries(BUILT_IN)
    assert len({canary.name for canary in chosen}) == len(chosen)
    honest = {json.dumps(canary.row, sort_keys=True) for canary in chosen if canary.honest}
    assert {json.dumps(canary.row, sort_keys=True) for canary in chosen} == honest
    assert all(canary.tries for canary in chosen if not canary.honest)
