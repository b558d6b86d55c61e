"""Our side: `Sandbox` asks the zygote for executions and reads what they tell."""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from cipo_fast.config import SandboxConfig
from cipo_fast.verify.sandbox.execution import Execution, Lost
from cipo_fast.verify.sandbox.inside.values import NotPlain, decode, encode
from cipo_fast.verify.sandbox.nest import Nest
from cipo_fast.verify.sandbox.tiers import Tier
from cipo_fast.verify.verdict import VerifierFailure

MAX_PROGRAM = 1 << 20  # characters
MAX_STDIN = 64 << 20


@dataclass(frozen=True)
class Call:
    """Arguments of one call of a function: plain values."""

    args: list[Any]
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """What one execution came to.

    `outcome`: ok; error (an exception, an exit code other than 0, a value that is not plain); timeout, memory, output,
    processes (a limit). `value`: what the function returned, or the exit code of a program that reads stdin, or None.
    `detail`: one line for a reader.
    """

    outcome: str
    value: Any = None
    stdout: str = ""
    detail: str = ""


class Sandbox:
    """Executions of programs, one at a time (a suite is two). A context manager; nothing starts before it is needed."""

    def __init__(self, config: SandboxConfig, tier: Tier | None = None) -> None:
        self.config, self._tier = config, tier
        self._nest: Nest | None = None
        self._lock = threading.RLock()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def tier(self) -> Tier:
        if self._tier is None:
            from cipo_fast.verify.sandbox.choosing import choose

            self._tier = choose(self.config)
        return self._tier

    def call(self, program: str, entry_point: str | None, calls: list[Call]) -> Iterator[Result]:
        """Call a function of `program`, each time in a fresh process. Stops when the caller stops asking.

        `entry_point`: a name, `Class.method` or `Class().method`; None: the only function, or Solution's only method.
        Raises VerifierFailure when nothing can be executed at all.
        """
        for one in calls:
            try:
                arguments = encode((list(one.args), dict(one.kwargs)))
            except NotPlain as error:
                raise VerifierFailure(f"an argument of a test is {error}") from None
            yield self._single("call", program, entry_point=entry_point, call=arguments)

    def run(self, program: str, stdins: list[str]) -> Iterator[Result]:
        """Run `program` as a script, each time in a fresh process with a true pipe as its stdin.

        ok with value 0: it ended by itself with exit code 0. error: another exit code (`value`); a signal
        is negative.
        """
        for stdin in stdins:
            yield self._single("run", program, stdin=stdin)

    def suite(self, program: str, entry_point: str, tests: str) -> Result:
        """Run `tests` (text that defines `check(candidate)`) in one execution and `program` in another; only plain
        values cross. ok: check returned; `value` is what, if it is plain. error: it raised, or the candidate was lost;
        the candidate's time-out is one.
        """
        refused = _refused(program)
        if refused:
            return refused
        with self._lock:
            return self._twice(lambda: self._suite(program, entry_point, tests))

    def close(self) -> None:
        with self._lock:
            if self._nest:
                self._nest.close()
            self._nest = None

    # -- inside

    def _single(self, mode: str, program: str, **more: Any) -> Result:
        refused = _refused(program)
        if refused:
            return refused
        with self._lock:
            return self._twice(lambda: self._one(mode, program, more))

    def _twice(self, body: Callable[[], Result]) -> Result:
        """Once more with a fresh zygote if it was lost."""
        try:
            return body()
        except Lost:
            self.close()
        try:
            return body()
        except Lost as error:
            self.close()
            raise VerifierFailure(f"the sandbox was lost twice: {error}") from error

    def _start(self, mode: str, program: str, more: dict[str, Any]) -> Execution:
        if self._nest is None:
            self._nest = Nest(self.tier)
        limits = self.config.model_dump(include=set(_LIMITS))
        limits["wall_s"] = limits["wall_s"] or 3 * limits["cpu_s"]
        request = {"mode": mode, "program": program, "nonce": secrets.token_hex(8), "limits": limits, **more}
        return Execution(self._nest, request)

    def _one(self, mode: str, program: str, more: dict[str, Any]) -> Result:
        with self._start(mode, program, more) as execution:
            told = [message for message in execution.messages() if message is not None]
            return _result(mode, told, execution.report)

    def _suite(self, program: str, entry_point: str, tests: str) -> Result:
        names = {"entry_point": entry_point}
        with (
            self._start("serve", program, names) as candidate,
            self._start("tests", tests, names) as suite,
        ):
            passed, value, lost, number = False, None, None, 0
            for message in suite.messages():
                if "passed" in message:
                    passed, value = True, _decoded(message["passed"])
                elif "call" in message and lost is None:
                    number += 1
                    answer = candidate.ask(json.dumps([number, str(message["call"])]))
                    if answer is None:
                        lost = candidate.report
                        suite.cancel()
                        break
                    if "broken" in answer:
                        return Result("error", None, "", _raised(answer["broken"]))
                    if answer.get("number") != number:
                        return Result("error", None, "", "the candidate answered a call more than once")
                    suite.send(json.dumps(answer))
                elif "raised" in message:
                    return Result(
                        "error", None, suite.report["stdout"] if suite.report else "", _raised(message["raised"])
                    )
            if lost is not None:
                return _ended(lost, "the candidate ended before it answered")
            if passed and suite.report and suite.report["outcome"] == "exit":
                return Result("ok", value, suite.report["stdout"])
            return _ended(suite.report, "the tests ended before check returned")


_LIMITS = ("cpu_s", "wall_s", "memory_mib", "processes", "file_mib", "output_kib")


def _refused(program: str) -> Result | None:
    if len(program) > MAX_PROGRAM:
        return Result("error", None, "", f"a program of {len(program)} characters; at most {MAX_PROGRAM} are run")
    return None


def _result(mode: str, told: list[dict[str, Any]], report: dict[str, Any] | None) -> Result:
    stdout = report["stdout"] if report else ""
    if report and report["outcome"] != "exit":
        return Result(report["outcome"], None, stdout, report["detail"])
    first = told[0] if told else {}
    code = report["code"] if report else None
    if "raised" in first:
        outcome = "memory" if _kind(first) == "MemoryError" else "error"
        return Result(outcome, code if mode == "run" else None, stdout, _raised(first["raised"]))
    if mode == "run":
        return Result("ok", 0, stdout) if code == 0 else _ended(report, "")
    if "refused" in first:
        return Result("error", None, stdout, f"returned {first['refused']}")
    if "value" in first:
        try:
            return Result("ok", decode(str(first["value"])), stdout)
        except NotPlain as error:
            return Result("error", None, stdout, f"returned {error}")
    return _ended(report, "ended before it returned")


def _decoded(told: Any) -> Any:
    """What the tests' own process tells; None where it is no value."""
    try:
        return decode(str(told))
    except NotPlain:
        return None


def _kind(message: dict[str, Any]) -> str:
    try:
        return str(json.loads(message["raised"])[0])
    except (ValueError, TypeError, LookupError):
        return ""


def _raised(told: Any) -> str:
    """The last line of a traceback."""
    try:
        _, name, text = json.loads(told)
        return " ".join(f"{name}: {text}".split("\n"))[:600] if text else str(name)
    except (ValueError, TypeError, LookupError):
        return "an exception that cannot be read"


def _ended(report: dict[str, Any] | None, what: str) -> Result:
    """An execution that ended in another way than it should."""
    if report is None:
        return Result("error", None, "", f"{what}: its supervisor was ended" if what else "its supervisor was ended")
    if report["outcome"] != "exit":
        return Result(report["outcome"], None, report["stdout"], report["detail"])
    code = report["code"]
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    return Result("error", code, report["stdout"], f"{what} ({how})" if what else how)
