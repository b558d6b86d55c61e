"""Problems from a JSONL file: one object a line with `prompt` or `messages`, and `answer`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cipo_fast.errors import UserError
from cipo_fast.records import Message, Problem


def read_problems(path: Path) -> list[Problem]:
    """All problems of `path`; a bad line is a UserError naming file, line and field."""
    problems = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            problems.append(_problem(line, path, number))
    if not problems:
        raise UserError(
            f"{path}: no problems in it; expected one JSON object a line with prompt or messages, and answer"
        )
    return problems


def _problem(line: str, path: Path, number: int) -> Problem:
    where = f"{path}:{number}"
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected an object, got {type(record).__name__}")
    answer = record.get("answer")
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise UserError(f"{where}: field 'answer' is missing or neither text nor a number")
    return Problem(str(record.get("id", f"{path.stem}-{number}")), _messages(record, where), str(answer), path.name)


def _messages(record: dict[str, Any], where: str) -> tuple[Message, ...]:
    if "messages" not in record:
        prompt = record.get("prompt")
        if not isinstance(prompt, str) or not prompt.strip():
            raise UserError(f"{where}: field 'prompt' is missing or not text (or give 'messages')")
        return (Message(role="user", content=prompt),)
    messages = record["messages"]
    good = (
        isinstance(messages, list)
        and messages
        and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in messages
        )
    )
    if not good or messages[-1]["role"] != "user":
        raise UserError(
            f"{where}: field 'messages' must be a list of objects with role and content, the last from the user"
        )
    return tuple(Message(role=m["role"], content=m["content"]) for m in messages)
