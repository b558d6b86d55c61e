"""Code: a program is right when it gives what every test of its row expects.

The sandbox returns values and never verdicts; they are compared here, outside of it, and no expected value of a call or
of a stdin test ever enters it. The first test that fails decides. docs/verifiers.md states what "equal" means.
"""

from __future__ import annotations

import hashlib
import json
import reprlib
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from typing import Any

from cipo_fast.verify.code.compare import same_output, same_value
from cipo_fast.verify.code.counting import STAND_INS
from cipo_fast.verify.code.program import Program, Unparsable, fenced, function_program, stdin_program
from cipo_fast.verify.code.tests import kind_of, problem_with, suite
from cipo_fast.verify.sandbox import Call, Result, Sandbox
from cipo_fast.verify.verdict import Judgement, Verdict, VerifierFailure

LONGEST_WHY = 200  # characters
MOST_SUITES = 10_000  # remembered

_noticing: dict[bytes, bool] = {}


def judge(row: Mapping[str, Any], response: str, sandbox: Sandbox) -> Judgement:
    """Judge a response by a row's tests. Raises VerifierFailure where the row or the sandbox allows no judgement."""
    started = time.monotonic()
    problem = problem_with(row)
    if problem:
        raise VerifierFailure(problem)
    kind = kind_of(row)
    try:
        if kind == "stdin":
            program = stdin_program(response)
        else:
            prompt = row.get("prompt")
            code = prompt if isinstance(prompt, str) else ""
            program = function_program(response, row.get("entry_point"), code)
    except Unparsable as reason:
        verdict: Verdict = "unparsable"
        why = str(reason)
    else:
        run = {"stdin": _stdin, "calls": _calls, "suite": _suite}[kind]
        try:
            verdict, why = run(row, program, sandbox)
        except _OutOfTime as late:
            verdict, why = "timeout", str(late)
    return Judgement(verdict, _line(why), time.monotonic() - started)


def check_row(row: Mapping[str, Any]) -> str | None:
    """What is wrong with a row, in one line: no tests, an empty list of them, a missing field."""
    return problem_with(row)


def gold_response(row: Mapping[str, Any]) -> str | None:
    """The row's own solution, fenced; None where it has none. HumanEval's is a function body."""
    solution = row.get("solution") or row.get("canonical_solution")
    return fenced(solution) if isinstance(solution, str) and solution.strip() else None


def _calls(row: Mapping[str, Any], program: Program, sandbox: Sandbox) -> tuple[Verdict, str]:
    tests = row["tests"]
    calls = [Call(args=test["args"], kwargs=test.get("kwargs") or {}) for test in tests]
    with closing(_all(sandbox.call(program.text, program.entry_point, calls), sandbox, len(tests))) as results:
        for number, (test, result) in enumerate(zip(tests, results, strict=True), 1):
            if result.outcome != "ok":
                return _failed(result, number)
            if not same_value(test["expected"], result.value):
                return "wrong", f"test {number}: got {_short(result.value)}"
    return "right", _passed(len(tests))


def _stdin(row: Mapping[str, Any], program: Program, sandbox: Sandbox) -> tuple[Verdict, str]:
    tests = row["tests"]
    stdins = [test["stdin"] for test in tests]
    with closing(_all(sandbox.run(program.text, stdins), sandbox, len(tests))) as results:
        for number, (test, result) in enumerate(zip(tests, results, strict=True), 1):
            if result.outcome != "ok":  # also where the output is the expected one
                return _failed(result, number)
            difference = same_output(test["stdout"], result.stdout)
            if difference:
                return "wrong", f"test {number}: {difference}"
    return "right", _passed(len(tests))


def _suite(row: Mapping[str, Any], program: Program, sandbox: Sandbox) -> tuple[Verdict, str]:
    assert program.entry_point is not None
    result = sandbox.suite(program.text, program.entry_point, suite(row))
    if result.outcome != "ok":
        return _failed(result, None)
    if type(result.value) is not int or result.value < 1:
        raise VerifierFailure("the suite ran no assertion after a call of the program: nothing can be said of it")
    if not _notices(row, sandbox):
        raise VerifierFailure("the suite passes whatever a program returns: nothing can be said of this one")
    return "right", "passed its suite"


def _notices(row: Mapping[str, Any], sandbox: Sandbox) -> bool:
    """Whether a suite fails when every call gives one and the same thing that is no answer. Asked once a suite, of
    those that a program has passed."""
    key = hashlib.sha256(suite(row).encode("utf-8", "surrogatepass")).digest()
    if key not in _noticing:
        if len(_noticing) >= MOST_SUITES:
            _noticing.clear()
        nothing = f"def {row['entry_point']}():\n    pass\n"
        stand_ins = (suite(row, number) for number in range(len(STAND_INS)))
        _noticing[key] = any(sandbox.suite(nothing, row["entry_point"], one).outcome != "ok" for one in stand_ins)
    return _noticing[key]


class _OutOfTime(Exception):
    """The tests of one answer took more than `sandbox.answer_s` together."""


def _all(results: Iterator[Result], sandbox: Sandbox, count: int) -> Generator[Result, None, None]:
    """The sandbox's results, which must be as many as were asked for: a missing one would be a test passed. Raises
    _OutOfTime instead of starting one too late."""
    given, limit = 0, sandbox.config.answer_s
    deadline = time.monotonic() + limit
    try:
        for result in results:
            given += 1
            yield result
            if given < count and time.monotonic() > deadline:
                raise _OutOfTime(f"more than {limit:g} s for {given} of {count} tests")
    finally:
        close = getattr(results, "close", None)
        if close:
            close()
    if given != count:
        raise VerifierFailure(f"the sandbox gave {given} results for {count} tests")


def _failed(result: Result, number: int | None) -> tuple[Verdict, str]:
    """A time-out is a verdict; every other end of a program (an exception, memory, output) is a wrong answer."""
    where = "suite" if number is None else f"test {number}"
    verdict: Verdict = "timeout" if result.outcome == "timeout" else "wrong"
    return verdict, f"{where}: {result.outcome}{': ' if result.detail else ''}{result.detail}"


def _passed(count: int) -> str:
    return f"passed {count} {'test' if count == 1 else 'tests'}"


class _Short(reprlib.Repr):
    """Values in a few words; an integer of more digits than Python prints is told by its size."""

    def repr_int(self, x: int, level: int) -> str:
        return f"an integer of {x.bit_length()} bits" if x.bit_length() > 256 else super().repr_int(x, level)


def _short(value: Any) -> str:
    short = _Short()
    short.maxstring = short.maxother = short.maxlong = 80
    return short.repr(value)


def _line(text: str) -> str:
    """One line of at most LONGEST_WHY characters that a terminal prints and does not obey."""
    line = json.dumps(" ".join(text.split()), ensure_ascii=True)[1:-1].replace('\\"', '"').replace("\\\\", "\\")
    return line if len(line) <= LONGEST_WHY else line[: LONGEST_WHY - 3] + "..."
