"""Mathematical answers: the final answer of a response against a row's gold.

A row has `answer` (a text) or `answers` (a list of texts, all of them asked for), and may have `policy`
(policy.py), `unit`, `answer_type` and `error` (an absolute tolerance) as OlympiadBench gives them.

`at_once` settles what needs no algebra, in microseconds; `judge` settles everything and belongs in a worker that can
be killed: it may take any time.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from cipo_fast.verify.math.exact import choice, labelled, number, numbers_agree
from cipo_fast.verify.math.extract import final_answer
from cipo_fast.verify.math.policy import MathPolicy, policy_of
from cipo_fast.verify.math.text import Refused, canonical, prepared, words
from cipo_fast.verify.verdict import Judgement

Row = Mapping[str, Any]
_WORDS = re.compile(r"\\text\{\s*[A-Za-z]{2}[A-Za-z .'\-]*\}")
# What algebra raises on some texts: the answer's fault. Anything else (a missing library, say) is ours and goes on.
_OF_ANSWERS = (
    ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, NotImplementedError, RecursionError,
    TypeError, ValueError,
)  # fmt: skip


def at_once(row: Row, response: str) -> Judgement | None:
    """The verdict where no algebra is needed, else None: safe in the caller's own process, and linear in time."""
    started = time.perf_counter()
    policy = policy_of(row)
    gold = gold_text(row)
    final = final_answer(response, policy.answer_line)
    if final.text is None:
        return Judgement("unparsable", final.why, time.perf_counter() - started)
    try:
        answer = prepared(final.text)
    except Refused as error:
        return Judgement("unparsable", str(error), time.perf_counter() - started)
    try:
        same = _plainly(prepared(gold), answer, row, policy) if len(golds(row)) == 1 else None
    except Refused:
        return None
    if same is None:
        return None
    return Judgement("right" if same else "wrong", _said(answer, gold), time.perf_counter() - started)


def judge(row: Row, response: str) -> Judgement:
    """The verdict, however long it takes: a worker's work."""
    started = time.perf_counter()
    judged = at_once(row, response)
    if judged is None:
        from cipo_fast.verify.math.compare import agree  # algebra is loaded where it is needed

        policy = policy_of(row)
        answer = final_answer(response, policy.answer_line).text or ""
        try:
            same = agree(golds(row), prepared(answer), policy, row, row_error(row))
            judged = Judgement("right" if same else "wrong", _said(answer, gold_text(row)))
        except Refused as error:
            judged = Judgement("wrong", f"{_short(answer)}: {error}")
        except _OF_ANSWERS as error:
            judged = Judgement("wrong", f"{_short(answer)}: cannot be compared ({type(error).__name__})")
    return Judgement(judged.verdict, judged.why, time.perf_counter() - started)


def check_row(row: Row) -> str | None:
    """What is missing of a row, or wrong in its policy, in one line, or None. Reads no mathematics: cheap anywhere."""
    several = row.get("answers")
    if several is None and row.get("answer") is None:
        return "no field `answer`"
    parts: list[Any] = several if isinstance(several, list) and several else [row.get("answer")]
    if not all(isinstance(part, str) for part in parts):
        return "`answers` is not a list of texts" if several is not None else "`answer` is not text"
    if not all(part.strip() for part in parts):
        return "`answer` is empty"
    try:
        policy_of(row)
        row_error(row)
    except ValueError as error:
        return str(error)
    return None


def check_gold(row: Row) -> str | None:
    """Why a row's gold cannot be judged, in one line, or None. The gold is classified and compared with itself by its
    class's comparator: that two strings are the same counts for nothing here. A worker's work."""
    try:
        policy = policy_of(row)
    except ValueError as error:
        return str(error)
    texts = golds(row)
    if not all(text.strip() for text in texts):
        return "the gold is empty"
    from cipo_fast.verify.math.compare import check

    try:
        return check(texts, policy, row, row_error(row))
    except Refused as error:
        return f"the gold {_short(gold_text(row))} cannot be judged: {error}"


def gold_response(row: Row) -> str:
    """A response that must be right."""
    return f"The answer is $\\boxed{{{gold_text(row)}}}$."


def golds(row: Row) -> list[str]:
    """The row's golds as they stand: one, or all that are asked for."""
    several = row.get("answers")
    if isinstance(several, list | tuple) and several:
        return [str(one) for one in several]
    return [str(row.get("answer", ""))]


def gold_text(row: Row) -> str:
    return ", ".join(golds(row))


def row_error(row: Row) -> Fraction | None:
    """The absolute tolerance that the row gives, if any."""
    given = row.get("error")
    if given is None or given == "" or given == "None":
        return None
    try:
        return abs(Fraction(str(given)))
    except (ValueError, ZeroDivisionError):
        return None


def _plainly(gold: str, answer: str, row: Row, policy: MathPolicy) -> bool | None:
    """Whether the answer is the gold, where exact arithmetic or plain words can tell; None where they cannot."""
    if not answer:
        return False
    gold_number, answer_number = number(gold), number(answer)
    if gold_number is not None and answer_number is not None:
        return numbers_agree(gold_number, answer_number, policy, row_error(row))
    letter = choice(gold)
    if letter is not None:
        return _chosen(letter, answer, policy)
    if gold and canonical(gold) == canonical(answer):
        return True
    if _WORDS.fullmatch(gold):
        return words(answer) == words(gold)
    if gold_number is not None and not any(char.isdigit() for char in answer) and words(answer) is not None:
        return None if len(answer) < 4 else False  # words are no number
    return None


def _chosen(letter: str, answer: str, policy: MathPolicy) -> bool | None:
    given = choice(answer)
    if given is None and policy.choices == "with_text":
        named = labelled(answer)
        given = named[0] if named else None
    return given == letter if given is not None else None


def _said(answer: str, gold: str) -> str:
    return f"{_short(answer)} against {_short(gold)}"


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else line[:57] + "..."
