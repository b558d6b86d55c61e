"""Mathematical answers: the final answer of a response against a row's gold.

A row has `answer` (a text) or `answers` (a list of texts, all of them asked for), and may have `policy`
(policy.py), `unit`, `answer_type` and `error` (an absolute tolerance) as OlympiadBench gives them.

`at_once` settles what needs no algebra, in microseconds; `judge` settles everything and belongs in a worker that can
be killed: it may take any time.
"""

from __future__ import annotations

import math
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
        error = row_error(row)
        try:
            same = agree(golds(row), prepared(answer), policy, row, error)
            judged = Judgement("right" if same else "wrong", _said(answer, gold_text(row)))
        except Refused as refused:
            judged = Judgement("wrong", f"{_short(answer)}: {refused}")
        except _OF_ANSWERS as raised:
            judged = Judgement("wrong", f"{_short(answer)}: cannot be compared ({type(raised).__name__})")
    return Judgement(judged.verdict, judged.why, time.perf_counter() - started)


def canonical_answer(row: Row, response: str) -> str:
    """The final answer in a form that equal answers mostly share: a number's value, a choice's letter, plain words,
    else the text without what does not matter; "" where there is none. Without algebra: x+1 and 1+x differ."""
    try:
        answer = prepared(final_answer(response, policy_of(row).answer_line).text or "")
    except Refused:
        return ""
    read = number(answer)
    if read is not None:
        return f"{read.value.numerator:x}/{read.value.denominator:x}"  # hexadecimal has no limit of digits
    return choice(answer) or words(answer) or canonical(answer)


def check_row(row: Row) -> str | None:
    """What is missing of a row, or wrong in its golds or its policy, in one line, or None. Reads no mathematics: cheap
    anywhere."""
    several = row.get("answers")
    if several is not None and not isinstance(several, list | tuple):
        return f"answers is {type(several).__name__}, not a list"
    if not several and row.get("answer") is None:
        return "answer is missing"
    for gold in several or [row["answer"]]:
        wrong = _wrong_gold(gold)
        if wrong:
            return f"{'a text of answers' if several else 'answer'} {wrong}"
    try:
        policy_of(row)
        row_error(row)
    except ValueError as error:
        return str(error)
    return None


def _wrong_gold(gold: object) -> str | None:
    """Golds are texts or numbers (7, 7.0), which stand for what they are written as."""
    if isinstance(gold, bool) or not isinstance(gold, str | int | float):
        return f"is {type(gold).__name__}, not text or a number"
    try:
        text = str(gold)
        prepared(text)
    except Refused as error:
        return f"{_short(text)} cannot be judged: {error}"
    except ValueError:  # Python writes no integers of more than 4,300 digits
        return "is too large a number"
    if isinstance(gold, float) and not math.isfinite(gold):
        return f"is {gold}, not a finite number"
    if not text.strip():
        return "is empty"
    return None if _braces_match(text) else f"{_short(text)} has braces that do not match"


def _braces_match(text: str) -> bool:
    level = 0
    for char in re.sub(r"\\.", "", text, flags=re.DOTALL):
        level += (char == "{") - (char == "}")
        if level < 0:
            return False
    return level == 0


def check_gold(row: Row) -> str | None:
    """Why a row's gold cannot be judged, in one line, or None. The gold is classified and compared with itself by its
    class's comparator: that two strings are the same counts for nothing here. A worker's work."""
    wrong = check_row(row)
    if wrong:
        return wrong
    from cipo_fast.verify.math.compare import check

    try:
        return check(golds(row), policy_of(row), row, row_error(row))
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
    """The absolute tolerance that the row gives, if any. ValueError with one line where it is no number."""
    given = row.get("error")
    if given is None or given == "" or given == "None":
        return None
    text = str(given).strip()
    try:
        if isinstance(given, bool) or len(text) > 40 or not math.isfinite(float(text)):
            raise ValueError
    except ValueError:
        raise ValueError(f"error is {_short(text)!r}, not a number") from None
    return abs(Fraction(text))


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
