"""Which format a row has, its adapter, and the words that a prompt ends with."""

from __future__ import annotations

from collections.abc import Callable

from cipo_fast.config import DataConfig
from cipo_fast.errors import UserError
from cipo_fast.records import Message
from cipo_fast.tasks.fields import Draft, Record, plain
from cipo_fast.tasks.formats_code import read_debugbench, read_humaneval, read_livecodebench, read_mbpp
from cipo_fast.tasks.formats_math import (
    QUESTION,
    read_aime,
    read_amc,
    read_boxed,
    read_critic,
    read_dapo,
    read_gsm8k,
    read_minerva,
    read_olympiad,
    read_qa,
)
from cipo_fast.tasks.own import named_verifier, read_own

Adapter = Callable[[Record, str, DataConfig], Draft]
ADAPTERS: dict[str, Adapter] = {
    "own": lambda record, where, data: read_own(record, where, data.verifier),
    "qa": read_qa,
    "aime": read_aime,
    "amc23": read_amc,
    "math500": read_qa,
    "math": read_boxed,
    "minerva": read_minerva,
    "olympiadbench": read_olympiad,
    "gsm8k": read_gsm8k,
    "dapo": read_dapo,
    "humaneval": read_humaneval,
    "mbpp": read_mbpp,
    "livecodebench": read_livecodebench,
    "criticbench": read_critic,
    "debugbench": read_debugbench,
}
INSTRUCTION = {
    "math": "Reason step by step, and put your final answer in \\boxed{}.",
    "code": "Write one Python program, in one ```python block.",
}
ASKS = {
    "math": ("\\boxed",),
    "code": ("```python block", "code block", "one program"),
}  # what shows that it does already


def recognised(record: Record) -> str:
    """The format that a row's fields show; `own` where they show none. Few fields decide, so that a row that lacks
    another one is told so in the name of its format."""

    def has(*names: str) -> bool:
        return any(record.get(name) is not None for name in names)

    if has("verifier", "messages"):
        return "own"
    for field, name in (
        ("buggy_code", "debugbench"),
        ("response_label", "criticbench"),
        ("public_test_cases", "livecodebench"),
        ("private_test_cases", "livecodebench"),
        ("test_list", "mbpp"),
        ("canonical_solution", "humaneval"),
    ):
        if has(field):
            return name
    if has("reward_model"):
        return "dapo" if str(record.get("data_source")).startswith("math_dapo") else "own"
    if has("entry_point") and has("test") and isinstance(record.get("prompt"), str):
        return "humaneval"
    if has("prompt") or not has(*QUESTION):
        return "own"
    return _of_questions(record, has)


def _of_questions(record: Record, has: Callable[..., bool]) -> str:
    answer, url = record.get("answer"), str(record.get("url"))
    if "final_answer" in record:
        return "olympiadbench"
    if isinstance(answer, str) and "####" in answer:
        return "gsm8k"
    if not has("answer", "Answer", "expected_answer", "target") and has("solution", "Solution"):
        return "minerva" if "Spring" in str(record.get("type")) or "Fall" in str(record.get("type")) else "math"
    if has("unique_id"):
        return "math500"
    if "AIME" in url or has("year") or (has("Problem") and has("Answer")):
        return "aime"
    return "amc23" if "AMC" in url else "qa"


def read_row(record: Record, where: str, format: str, data: DataConfig) -> Draft:
    """The row by its adapter, for the verifier that settings, row or format ask for. UserError, Unusable."""
    wanted = data.verifier or named_verifier(record, where)
    draft = ADAPTERS[format](record, where, data)
    verifier = wanted or draft.verifier
    if format != "own" and ".py:" in verifier:  # a user's function gets the row as it stands
        return Draft(draft.messages, verifier, "", plain(record, where, "row"), {}, draft.id, draft.source, draft.once)
    if verifier in ("exact", "math") and draft.verifier == "code":
        raise UserError(
            f"{where}: field 'answer' is missing: {format} rows have tests, and verifier {verifier} needs one"
        )
    if verifier == "code" and draft.verifier != "code":
        raise UserError(f"{where}: field 'tests' is missing: {format} rows have answers, code needs tests")
    return Draft(draft.messages, verifier, draft.answer, draft.fields, draft.policy, draft.id, draft.source, draft.once)


def instructed(messages: tuple[Message, ...], verifier: str, data: DataConfig) -> tuple[Message, ...]:
    """`messages`, the last of which ends with data.instruction unless it, or a system turn, already asks for that."""
    words = data.instruction
    if words == "auto":
        texts = [message["content"] for message in messages if message["role"] != "assistant"]
        if data.system_prompt is not None and messages[0]["role"] != "system":
            texts.append(data.system_prompt)
        asked = any(sign in text for text in texts for sign in ASKS.get(verifier, ()))
        words = "none" if asked else INSTRUCTION.get(verifier, "none")
    last = messages[-1]["content"]
    if words == "none" or last.endswith(words):
        return messages
    return (*messages[:-1], Message(role="user", content=f"{last}\n\n{words}"))
