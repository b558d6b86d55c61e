"""Rows made for training: our form, TRL's, verl's.

    ours, TRL   {"prompt": text or messages, "answer": text or number}     `messages` may stand for `prompt`
    ours, code  {"prompt": ..., "tests": [...]}, the judge's own form of a program's tests
    verl        {"prompt": messages, "reward_model": {"style": "rule", "ground_truth": text or number}}

TRL's `solution` and a plain `ground_truth` may stand for `answer`; verl's `data_source` becomes the problem's source
and says whether the answer is math. A row may name its `verifier`. What could be read in two ways is refused.
"""

from __future__ import annotations

import re
from typing import Any

from cipo_fast.errors import UserError
from cipo_fast.records import Message, blank
from cipo_fast.tasks.fields import Draft, Number, Record, answer_text, identity, plain, whole_text

ORIGINAL = "original_row"  # in a run's held_out.jsonl: what a user's function gets in place of the whole row
ROLES = ("system", "user", "assistant")
# What other programs' rows have beside prompt or messages, to be shown to the model with it.
SHOWN = (
    *("system", "system_prompt", "tools", "functions", "documents", "chat_template_kwargs"),
    *("image", "images", "video", "videos", "audio", "audios"),
)
READ = {  # what a verifier reads of a row beside its answer
    "exact": (),
    "math": ("policy", "answers", "answer_type", "unit", "error"),
    "code": ("tests", "entry_point", "test", "solution", "canonical_solution"),
}
# Data sources that verl scores as math.
MATH_SOURCE = re.compile(
    r"math_dapo.*|math|aime.*|openai/gsm8k|lighteval/MATH|DigitalLearningGmbH/MATH-lighteval|HuggingFaceH4/MATH-500|"
    r"numina_.*"
)


def read_own(record: Record, where: str, verifier: str | None = None) -> Draft:
    """`verifier`: what the settings ask for, over the row's own."""
    verifier = verifier or named_verifier(record, where) or _implied(record)
    source = record.get("data_source")
    source = whole_text(source, where, "data_source") if isinstance(source, str) else None
    if ".py:" in verifier:  # a user's function gets the row as it stands
        original = record.get(ORIGINAL)
        row = plain(original, where, ORIGINAL) if isinstance(original, dict) else plain(record, where, "row")
        shown = {name: value for name, value in record.items() if name != "prompt" or record.get("messages") is None}
        return Draft(_messages(shown, where, None), verifier, "", row, {}, _id(record, where), source)
    answer = "" if verifier == "code" else _answer(record, where)
    fields = {name: plain(record[name], where, name) for name in READ[verifier] if record.get(name) is not None}
    stub = None
    if not isinstance(fields.get("policy", {}), dict):
        raise UserError(f"{where}: field 'policy' is not an object")
    if isinstance(fields.get("tests"), list):
        fields["tests"] = [_without_nulls(test) for test in fields["tests"]]
    if verifier == "code":
        stub = _stub(record, where)
        fields |= stub or {}
    return Draft(_messages(record, where, stub), verifier, answer, fields, {}, _id(record, where), source)


def named_verifier(record: Record, where: str) -> str | None:
    name = record.get("verifier")
    if name is None:
        return None
    if name not in READ and not (isinstance(name, str) and re.fullmatch(r".+\.py:[^\W\d]\w*", name, re.DOTALL)):
        raise UserError(
            f"{where}: field 'verifier' is {name!r}: expected exact, math, code or path/to/file.py:function"
        )
    return whole_text(str(name), where, "verifier")


def _implied(record: Record) -> str:
    if record.get("tests") is not None or (record.get("test") is not None and record.get("entry_point") is not None):
        return "code"
    source = record.get("data_source")
    if record.get("reward_model") is not None and isinstance(source, str) and MATH_SOURCE.fullmatch(source):
        return "math"
    return "exact"


def _stub(record: Record, where: str) -> dict[str, Any] | None:
    """HumanEval's form beside `messages`: its `prompt` is the beginning of the program, not what is asked."""
    if record.get("tests") is None and record.get("test") is None:
        raise UserError(f"{where}: field 'tests' is missing (or 'test', with 'entry_point'): a program needs tests")
    if record.get("tests") is None and record.get("messages") is not None and isinstance(record.get("prompt"), str):
        return {"prompt": whole_text(record["prompt"], where, "prompt")}
    return None


def _without_nulls(test: Any) -> Any:
    """A test without the keys that a table's other rows have."""
    if not isinstance(test, dict):
        return test
    return {key: value for key, value in test.items() if value is not None or key == "expected"}


def _id(record: Record, where: str) -> str | None:
    return identity(record, where, "id")


# ----------------------------------------------------------------------------------------------------------- answer


def _answer(record: Record, where: str) -> str:
    """The text of a right answer. Several fields may hold it where they agree."""
    names = ["answer", "solution", "ground_truth"]
    if record.get("tests") is not None or record.get("test") is not None:
        names.remove("solution")  # a program
    given = {name: record[name] for name in names if record.get(name) is not None}
    model = record.get("reward_model")
    if isinstance(model, dict) and model.get("ground_truth") is not None:
        style = model.get("style", "rule")
        if not isinstance(style, str) or not style.startswith("rule"):
            raise UserError(f"{where}: field 'reward_model.style' is {style!r}: only 'rule' can be verified")
        given["reward_model.ground_truth"] = model["ground_truth"]
    if not given and isinstance(record.get("answers"), list) and record["answers"]:
        return ", ".join(answer_text(answer, where, "answers") for answer in record["answers"])
    if not given:
        raise UserError(
            f"{where}: field 'answer' is missing (or 'solution', 'ground_truth', 'reward_model.ground_truth')"
        )
    answers = {field: answer_text(value, where, field) for field, value in given.items()}
    if len({answer.strip() for answer in answers.values()}) > 1:
        raise UserError(f"{where}: fields {' and '.join(map(repr, answers))} differ: keep the one that is the answer")
    return next(iter(answers.values()))


# --------------------------------------------------------------------------------------------------------- question


def _messages(record: Record, where: str, stub: dict[str, Any] | None) -> tuple[Message, ...]:
    fields = ("messages",) if stub else ("prompt", "messages")
    given = [field for field in fields if record.get(field) is not None]
    if not given:
        raise UserError(f"{where}: field 'prompt' is missing (or give 'messages')")
    if len(given) > 1:
        raise UserError(f"{where}: both 'prompt' and 'messages' are given: keep one of them")
    (field,) = given
    for more in SHOWN:
        if record.get(more):
            raise UserError(f"{where}: field {more!r} is beside {field!r}: it would not be shown")
    asked = record[field]
    if field == "prompt" and isinstance(asked, str) and not isinstance(asked, Number):
        asked = [{"role": "user", "content": asked}]
    good = (
        isinstance(asked, list)
        and asked
        and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in asked)
    )
    if not good or asked[-1]["role"] != "user":
        text = "text or " if field == "prompt" else ""
        raise UserError(
            f"{where}: field {field!r} must be {text}a list of objects with role and content, the last from the user"
        )
    as_text = isinstance(record[field], str)
    return tuple(_message(m, where, field if as_text else f"{field}[{i}]", as_text) for i, m in enumerate(asked))


def _message(message: dict[str, Any], where: str, field: str, as_text: bool) -> Message:
    if message["role"] not in ROLES:
        raise UserError(f"{where}: field '{field}.role' is {message['role']!r}: expected one of {', '.join(ROLES)}")
    more = [key for key, value in message.items() if key not in ("role", "content") and value not in (None, [], {})]
    if more:
        raise UserError(f"{where}: field '{field}.{more[0]}' is beside role and content: it would not be shown")
    at = field if as_text else f"{field}.content"
    content = message["content"]
    if isinstance(content, list) and content and all(_is_text_part(part) for part in content):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str) or isinstance(content, Number):
        raise UserError(f"{where}: field {at!r} is not text")
    if blank(whole_text(content, where, at)):
        raise UserError(f"{where}: field {at!r} is blank")
    return Message(role=message["role"], content=content)


def _is_text_part(part: Any) -> bool:
    """OpenAI's form of a content that may also hold images."""
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
