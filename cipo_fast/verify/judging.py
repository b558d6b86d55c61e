"""Which verifier judges a row: the one place that knows them all. Each is imported when a row first asks for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cipo_fast.verify.verdict import Judgement, VerifierFailure

if TYPE_CHECKING:
    from cipo_fast.verify.sandbox import Sandbox

Row = dict[str, Any]
NAMES = ("exact", "math", "code")  # all else is path/to/file.py:function


def judge(row: Row, response: str, sandbox: Sandbox | None = None) -> Judgement:
    """The verdict on a response. Runs in a worker: it may hang, and a code row runs programs in `sandbox`.

    Raises VerifierFailure where there is nothing to say of the response."""
    kind = _kind(row)
    if kind == "code":
        from cipo_fast.verify import code

        if sandbox is None:
            raise VerifierFailure("a code row needs a sandbox")
        return code.judge(row, response, sandbox)
    return _verifier(kind).judge(row, response)


def judge_gold(row: Row, sandbox: Sandbox | None = None) -> Judgement:
    """The verdict on the row's own gold, the long way: no shortcut for equal texts. Runs in a worker."""
    if _kind(row) == "math":
        from cipo_fast.verify import math

        fault = math.check_gold(row)
        return Judgement("right") if fault is None else Judgement("wrong", fault)
    response = gold_response(row)
    if response is None:
        raise VerifierFailure("the row has no gold response")
    return judge(row, response, sandbox)


def at_once(row: Row, response: str) -> Judgement | None:
    """The verdict where it costs next to nothing and cannot hang; None: a worker must look."""
    if _kind(row) == "math":
        from cipo_fast.verify import math

        return math.at_once(row, response)
    return judge(row, response) if _kind(row) == "exact" else None


def gold_response(row: Row) -> str | None:
    """A response that must be right; None where the row has none."""
    kind = _kind(row)
    return None if kind == "user" else _verifier(kind).gold_response(row)


def check_row(row: Row) -> str | None:
    """What is wrong with a row, in one line: a missing field, no tests, no such policy. None: nothing that can be seen
    without a worker; whether a gold can be judged, `judge_gold` says."""
    try:
        kind = _kind(row)
    except VerifierFailure as failure:
        return str(failure)
    return _verifier(kind).check_row(row)


def _kind(row: Row) -> str:
    """exact, math, code or user. Raises VerifierFailure."""
    verifier = row.get("verifier")
    if verifier in NAMES:
        return str(verifier)
    if isinstance(verifier, str) and ":" in verifier:
        return "user"
    if verifier is None:
        raise VerifierFailure("verifier is missing: exact, math, code or path/to/file.py:function")
    raise VerifierFailure(f"verifier is {verifier!r:.80}: not exact, math, code or path/to/file.py:function")


def _verifier(kind: str) -> Any:
    if kind == "exact":
        from cipo_fast.verify import exact

        return exact
    if kind == "math":
        from cipo_fast.verify import math

        return math
    if kind == "code":
        from cipo_fast.verify import code

        return code
    from cipo_fast.verify import user

    return user
