"""The exact verifier: the response is the answer, character for character, once both are stripped."""

from __future__ import annotations

from typing import Any

from cipo_fast.verify.verdict import Judgement

Row = dict[str, Any]


def judge(row: Row, response: str) -> Judgement:
    """Right where the texts are equal. CRLF and LF end a line alike."""
    if canonical(response) == canonical(str(row["answer"])):
        return Judgement("right")
    return Judgement("wrong", "not the answer, character for character")


def gold_response(row: Row) -> str:
    return str(row["answer"])


def check_row(row: Row) -> str | None:
    answer = row.get("answer")
    if answer is None:
        return "answer is missing"
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        return f"answer is {type(answer).__name__}, not text or a number"
    return None if str(answer).strip() else "answer is empty"


def canonical(text: str) -> str:
    """Responses that are the same to `judge` have the same."""
    return text.replace("\r\n", "\n").strip()
