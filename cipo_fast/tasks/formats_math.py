"""Public sets of math problems, as their hubs and QwenLM's evaluation files have them -> Draft.

Each says where question and gold stand, what its column types did to the gold, and what policies its answers need. A
missing field is a UserError naming it; a row that nobody can verify is Unusable.
"""

from __future__ import annotations

import re
from typing import Any

from cipo_fast.config import CorrectionConfig, DataConfig
from cipo_fast.errors import UserError
from cipo_fast.records import Message
from cipo_fast.tasks.fields import (
    Draft,
    Number,
    Record,
    Unusable,
    answer_text,
    as_text,
    identity,
    list_field,
    number_text,
    text_field,
    user_turn,
)
from cipo_fast.tasks.own import read_own

QUESTION = ("problem", "question", "input", "Problem", "Question")
ANSWER = ("answer", "Answer", "expected_answer", "target")
IDS = ("id", "ID", "unique_id", "idx")
# The wording of DAPO's own prompts, which asks for a last line instead of a box.
_DAPO_BEFORE = re.compile(
    r"\ASolve the following math problem step by step\. The last line of your response .*?\n\n", re.S
)
_DAPO_AFTER = re.compile(r"\s*Remember to put your answer on its own line after \"Answer:\"\.?\s*\Z")


def read_qa(record: Record, where: str, data: DataConfig) -> Draft:
    """A question and its answer: AMC, AIME 2025, Minerva's short form, and others of that kind."""
    return _draft(record, where, _gold(record, where))


def read_aime(record: Record, where: str, data: DataConfig) -> Draft:
    """Answers are integers from 0 to 999, written as 073 by some."""
    gold = _gold(record, where)
    if not (gold.isascii() and gold.isdigit() and int(gold) <= 999):
        raise UserError(f"{where}: field 'answer' is {gold[:40]!r}: an AIME answer is an integer from 0 to 999")
    return _draft(record, where, gold)


def read_amc(record: Record, where: str, data: DataConfig) -> Draft:
    """Answers are floats, 27.0 for 27."""
    gold = _gold(record, where)
    return _draft(record, where, number_text(gold) if re.fullmatch(r"-?\d+\.\d+", gold) else gold)


def read_boxed(record: Record, where: str, data: DataConfig) -> Draft:
    """MATH: the gold is the last box of the solution."""
    if any(record.get(name) is not None for name in ANSWER):
        return read_qa(record, where, data)
    return _draft(record, where, _boxed_gold(record, where))


def read_minerva(record: Record, where: str, data: DataConfig) -> Draft:
    """Its golds are rounded to the digits that they show."""
    draft = read_boxed(record, where, data)
    return Draft(draft.messages, "math", draft.answer, policy={"rounding": "gold_digits"}, id=draft.id)


def read_gsm8k(record: Record, where: str, data: DataConfig) -> Draft:
    """The gold follows the last ####, with thousands separators."""
    answer = text_field(record, where, "answer")
    _, mark, gold = answer.rpartition("####")
    gold = gold.strip().replace(",", "")
    if not mark or not gold:
        raise UserError(f"{where}: field 'answer' has nothing after ####: GSM8K's gold stands there")
    return _draft(record, where, gold, policy={"percent": "either"})


def read_olympiad(record: Record, where: str, data: DataConfig) -> Draft:
    """All of `final_answer` is the gold. Unit, type and tolerance are the verifier's, the context is shown."""
    if record.get("modality") not in (None, "Text-only") or record.get("image_1") is not None:
        raise Unusable("it needs an image")
    if "final_answer" in record and not record["final_answer"]:
        raise Unusable("a proof is asked for: there is no final answer to compare with")
    golds = [_bare(answer_text(gold, where, "final_answer")) for gold in list_field(record, where, "final_answer")]
    if record.get("is_multiple_answer") is True:
        golds = [part for gold in golds for part in _parts(gold)]
    several = len(golds) > 1
    question = text_field(record, where, "question")
    if record.get("context") is not None:
        question = f"{as_text(record['context'], where, 'context')}\n\n{question}"
    fields: dict[str, Any] = {"answers": golds} if several else {}
    if record.get("answer_type") is not None:
        fields["answer_type"] = as_text(record["answer_type"], where, "answer_type")
    unit = record.get("unit")
    if unit:
        fields["unit"] = as_text(unit, where, "unit")
        question += f"\n\nThe answer is wanted in this unit: ${unit}$."
    if several:
        question += "\n\nThere are several answers: give all of them in one box, separated by commas."
    if record.get("error"):
        fields["error"] = _tolerance(record["error"], where)
    return Draft(user_turn(question), "math", ", ".join(golds), fields, id=identity(record, where, *IDS))


def read_dapo(record: Record, where: str, data: DataConfig) -> Draft:
    """1.79 million rows, about 17,000 different ones. Its prompts ask for a last line `Answer: ...`: that wording is
    taken away, and our own asks for a box; with data.instruction=none it stays, and such a line counts."""
    draft = read_own(record, where, "math")
    policy: dict[str, Any] = {}
    messages = draft.messages
    if data.instruction == "none":
        policy = {"answer_line": True}
    else:
        messages = (*messages[:-1], Message(role="user", content=_unwrapped(messages[-1]["content"])))
    extra = record.get("extra_info")
    name = identity(extra, where, "index") if isinstance(extra, dict) else None
    return Draft(messages, "math", draft.answer, draft.fields, policy, draft.id or name, draft.source, once=True)


def read_critic(record: Record, where: str, data: DataConfig) -> Draft:
    """An attempt to check and correct: question, attempt and follow-up are the prompt, the question's answer the gold.
    `response_label`, whether the attempt is right, is kept for figures; the policy does not see it."""
    question, attempt = text_field(record, where, "question"), text_field(record, where, "response")
    label = record.get("response_label")
    if label is None:
        raise UserError(f"{where}: field 'response_label' is missing")
    if str(record.get("question_type", "")).lower().startswith("cod"):
        raise Unusable("a code question: its tests are not in the row")
    answers = record.get("answer")
    if answers is None or answers == []:
        raise UserError(f"{where}: field 'answer' is missing")
    golds = {_clean(answer_text(a, where, "answer")) for a in (answers if isinstance(answers, list) else [answers])}
    if len(golds) > 1:
        raise Unusable("several answers are accepted, and one can be compared with")
    messages = (
        Message(role="user", content=question),
        Message(role="assistant", content=attempt),
        Message(role="user", content=CorrectionConfig().followup),
    )
    right = label is True or str(label).lower() in ("true", "1", "correct")
    fields = {"attempt_right": right}
    source = record.get("question_source")
    return Draft(messages, "math", golds.pop(), fields, id=identity(record, where), source=_source(source))


# ---------------------------------------------------------------------------------------------------------------- parts


def last_box(text: str) -> str | None:
    """What is in the last closed \\boxed{...}, \\fbox{...} or \\boxed 7 of a worked solution."""
    for match in reversed(list(re.finditer(r"\\(?:boxed|fbox|framebox)(?![A-Za-z])\s*", text))):
        rest = text[match.end() :]
        if not rest.startswith("{"):
            word = re.match(r"[^\s$.,\\{}]+", rest)
            if word:
                return word[0]
            continue
        depth = 0
        for i, char in enumerate(rest):
            if char in "{}" and (i == 0 or rest[i - 1] != "\\"):
                depth += 1 if char == "{" else -1
                if depth == 0:
                    return rest[1:i]
    return None


def _draft(record: Record, where: str, gold: str, policy: dict[str, Any] | None = None) -> Draft:
    question = text_field(record, where, *QUESTION)
    return Draft(user_turn(question), "math", gold, policy=policy or {}, id=identity(record, where, *IDS))


def _gold(record: Record, where: str) -> str:
    found = [(name, record[name]) for name in ANSWER if record.get(name) is not None]
    if not found:
        raise UserError(f"{where}: field {ANSWER[0]!r} is missing (or {', '.join(map(repr, ANSWER[1:]))})")
    name, value = found[0]
    return _clean(answer_text(value, where, name))


def _boxed_gold(record: Record, where: str) -> str:
    text_field(record, where, *QUESTION)
    gold = last_box(text_field(record, where, "solution", "Solution"))
    if gold is None or not gold.strip():
        raise Unusable("its solution has no box, which holds the gold")
    return _clean(gold)


def _clean(gold: str) -> str:
    """As typed, without the dollars around it, a number column's .0 and the zeros before an integer."""
    if isinstance(gold, Number):
        return number_text(gold)
    text = gold.strip()
    if len(text) > 2 and text[0] == text[-1] == "$" and text.count("$") == 2:
        text = text[1:-1].strip()
    return str(int(text)) if re.fullmatch(r"-?0+[0-9]+", text, re.ASCII) else text


def _bare(gold: str) -> str:
    """An OlympiadBench gold without its dollars and full stop."""
    return _clean(gold) if isinstance(gold, Number) else gold.replace("$", "").strip().rstrip(".").strip()


def _parts(gold: str) -> list[str]:
    """An answer of several, `1, (2,3)`, at the commas outside of all brackets."""
    parts, depth = [""], 0
    for char in gold:
        depth += (char in "([{") - (char in ")]}")
        if char == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += char
    return [part.strip() for part in parts if part.strip()] or [gold]


def _tolerance(value: Any, where: str) -> float:
    """One number, or several of which the least is right for all parts of an answer."""
    texts = value.split(",") if isinstance(value, str) else []
    try:
        found = [float(text) for text in texts]
    except ValueError:
        found = []
    if not found or not all(0 <= one < float("inf") for one in found):
        raise UserError(f"{where}: field 'error' is {value!r}: expected a tolerance such as 0.01")
    return min(found)


def _unwrapped(text: str) -> str:
    """A DAPO prompt's problem, where both halves of its own wording stand round it."""
    if _DAPO_BEFORE.search(text) and _DAPO_AFTER.search(text):
        return _DAPO_AFTER.sub("", _DAPO_BEFORE.sub("", text)).strip() or text
    return text


def _source(value: Any) -> str | None:
    return f"criticbench/{value}" if isinstance(value, str) and value else "criticbench"
