"""One worker: a process forked from the nursery that judges one answer after the other, until its socket closes.

In    {"row", "response", "gold", "load", "cpu_s", "sandbox"?}
Out   {"ready"} once; {"loading"} and {"go"} around the import of a user's file; for each message in, one of
      {"verdict", "why", "seconds", "worn"?} and {"failure", "worn"?}
Its limits are its own; the trainer holds the deadline and has it killed.
"""

from __future__ import annotations

import base64
import math
import os
import pickle
import resource
import socket
import time
from typing import TYPE_CHECKING, Any

from cipo_fast.errors import visible
from cipo_fast.verify import judging
from cipo_fast.verify.verdict import Judgement, VerifierFailure
from cipo_fast.verify.workers.frames import Message, pack, receive

if TYPE_CHECKING:
    from cipo_fast.verify.sandbox import Sandbox

LONGEST_WHY = 500


class Worker:
    """Judges what it is sent. Has one sandbox, made for the first code row."""

    def __init__(self, sock: socket.socket, memory_mib: int):
        self._sock = sock
        self._memory_mib = memory_mib
        self._sandbox: Sandbox | None = None
        self._loaded: set[str] = set()

    def serve(self) -> None:
        """Returns when the trainer closes the socket or is gone."""
        _limit(resource.RLIMIT_AS, self._memory_mib << 20)
        _limit(resource.RLIMIT_CORE, 0)
        self._send({"ready": True})
        while (message := receive(self._sock)) is not None:
            _limit(resource.RLIMIT_CPU, math.ceil(time.process_time() + message["cpu_s"]))
            self._send(self._answer(message))
        if self._sandbox is not None:
            self._sandbox.close()

    def _answer(self, message: Message) -> Message:
        started = time.monotonic()
        try:
            self._load(message["row"])
            started = time.monotonic()
            judgement = self._judged(message)
        except MemoryError:
            why = f"judging it needs more than verify.memory_mib={self._memory_mib} MiB"
            return _said(Judgement("timeout", why), started) | {"worn": True}
        except VerifierFailure as failure:
            return {"failure": _line(str(failure))}
        except BaseException as error:  # math-verify's time-out is no Exception
            verifier = message["row"].get("verifier")
            return {"failure": _line(f"the {verifier} verifier raised {type(error).__name__}: {error}"), "worn": True}
        return _said(judgement, started)

    def _load(self, row: dict[str, Any]) -> None:
        """A user's file may import torch: that is not the answer's time, its deadline runs from "go" on."""
        verifier = row.get("verifier")
        if isinstance(verifier, str) and ":" in verifier and verifier not in self._loaded:
            from cipo_fast.verify import user

            self._send({"loading": verifier})
            user.load(verifier)
            self._loaded.add(verifier)
            self._send({"go": True})

    def _judged(self, message: Message) -> Judgement:
        if message["load"]:
            return Judgement("right")  # to load it was all
        if message["row"].get("verifier") == "code" and self._sandbox is None:
            from cipo_fast.verify.sandbox import Sandbox

            config, tier = pickle.loads(base64.b64decode(message["sandbox"]))  # made by the trainer
            self._sandbox = Sandbox(config, tier)
        if message["gold"]:
            return judging.judge_gold(message["row"], self._sandbox)
        return judging.judge(message["row"], message["response"], self._sandbox)

    def _send(self, message: Message) -> None:
        try:
            self._sock.sendall(pack(message))
        except OSError:
            os._exit(0)  # nobody waits for it any more


def _said(judgement: Judgement, started: float) -> Message:
    seconds = round(time.monotonic() - started, 6)
    return {"verdict": judgement.verdict, "why": _line(judgement.why), "seconds": seconds}


def _line(text: str) -> str:
    line = visible(" ".join(text.split()))
    return line if len(line) <= LONGEST_WHY else line[: LONGEST_WHY - 3] + "..."


def _limit(which: int, value: int) -> None:
    """The soft limit: the sandbox sets others for its own children."""
    hard = resource.getrlimit(which)[1]
    resource.setrlimit(which, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))
