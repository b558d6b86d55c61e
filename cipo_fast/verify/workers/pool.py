"""Judges: answers are judged in worker processes that can be killed, beside all that the trainer does.

    with Judges(config.verify, config.sandbox) as judges:
        verdict = judges.submit(row, response).result()

What is cheap and cannot hang is judged at once, in the calling thread. All else goes to a worker; a thread
(dispatcher.py) holds the deadlines. A judgement is a verdict on the answer, its time-out too; VerifierFailure is raised
where nothing can be said of it.
"""

from __future__ import annotations

import base64
import os
import pickle
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from types import TracebackType
from typing import Any

from cipo_fast.config import SandboxConfig, VerifyConfig
from cipo_fast.errors import UserError
from cipo_fast.verify import judging
from cipo_fast.verify.verdict import Judgement, VerifierFailure
from cipo_fast.verify.workers.dispatcher import Dispatcher
from cipo_fast.verify.workers.frames import RowEncoder
from cipo_fast.verify.workers.turn import Item

Row = dict[str, Any]
CODE_SLACK_S = 5.0  # the sandbox itself stops at sandbox.answer_s
PATIENCE_S = 0.05  # of its own time: a worker is slow from then on, where answers take a quarter of it on average


def _quiet(_: str) -> None:
    """Says nothing."""


class Judges:
    """A context manager. Processes start when a worker is first needed; `submit` may be called by several threads."""

    def __init__(self, verify: VerifyConfig, sandbox: SandboxConfig, say: Callable[[str], None] = _quiet):
        self._verify, self._sandbox, self._say = verify, sandbox, say
        self._lock = threading.Lock()
        self._rows = RowEncoder()
        self._dispatcher: Dispatcher | None = None
        self._tier: str | None = None  # the sandbox's settings and its tier, as workers get them
        self._closed = False

    def __enter__(self) -> Judges:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def submit(self, row: Row, response: str) -> Future[Judgement]:
        """The verdict on a response, in time: its `result()` never hangs, and raises VerifierFailure where there is
        none. A row does not change once it was submitted. Raises UserError where a code row finds no sandbox that
        works."""
        try:
            known = judging.at_once(row, response)
        except Exception as error:
            return _failed(error if isinstance(error, VerifierFailure) else VerifierFailure(_described(error)))
        if known is not None:
            future: Future[Judgement] = Future()
            future.set_result(known)
            return future
        return self._send(row, response)

    def submit_gold(self, row: Row) -> Future[Judgement]:
        """The verdict on the row's own gold, the long way: right, or the row cannot be judged by it."""
        return self._send(row, "", gold=True)

    def load(self, verifiers: Iterable[str]) -> None:
        """Each file of a user's own is imported once in a worker, before anything is judged. Raises UserError."""
        own = [name for name in dict.fromkeys(verifiers) if ":" in name]
        for future in [self._send({"verifier": name}, "", load=True) for name in own]:
            try:
                future.result()
            except VerifierFailure as failure:
                raise UserError(str(failure)) from failure

    def choose_tier(self) -> None:
        """Finds the sandbox that works here and says which; once. Raises UserError where none does."""
        with self._lock:
            if self._tier is None:
                from cipo_fast.verify.sandbox import choose

                tier = choose(self._sandbox)
                self._say(tier.describe())
                self._tier = base64.b64encode(pickle.dumps((self._sandbox, tier))).decode()

    def close(self) -> None:
        """Ends every worker. What was not judged yet ends in a VerifierFailure."""
        with self._lock:
            self._closed = True
            dispatcher, self._dispatcher = self._dispatcher, None
        if dispatcher is not None:
            dispatcher.close()

    def _send(self, row: Row, response: str, gold: bool = False, load: bool = False) -> Future[Judgement]:
        code = row.get("verifier") == "code"
        deadline_s = self._sandbox.answer_s + CODE_SLACK_S if code else self._verify.timeout_s
        message: dict[str, Any] = {"response": response, "gold": gold, "load": load}
        # CPU time only stops a worker whose trainer was stopped: the deadline comes first.
        message["cpu_s"] = deadline_s * (os.cpu_count() or 1) + 1
        if code:
            self.choose_tier()
            message["sandbox"] = self._tier
        try:
            payload = self._rows.pack(row, message)
        except (TypeError, ValueError, RecursionError) as error:
            return _failed(VerifierFailure(f"the row cannot be sent to a worker: {_described(error)}"))
        patience_s = self._sandbox.cpu_s if code else PATIENCE_S
        item = Item(payload, deadline_s, patience_s, str(row.get("verifier")))
        with self._lock:
            if self._closed:
                return _failed(VerifierFailure("the judges are closed"))
            if self._dispatcher is None:
                self._dispatcher = Dispatcher(self._verify.workers or _cores(), self._verify.memory_mib)
            self._dispatcher.put(item)
        return item.future


def _failed(failure: VerifierFailure) -> Future[Judgement]:
    future: Future[Judgement] = Future()
    future.set_exception(failure)
    return future


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split()):.300}"


def _cores() -> int:
    return len(os.sched_getaffinity(0))
