"""What the audit reads: the answers of a run or of a judged file, and a run's steps as training had them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from cipo_fast.answers import Line, files_of, read_lines, read_records
from cipo_fast.audit.gaming import Submitted
from cipo_fast.config import DataConfig
from cipo_fast.errors import UserError
from cipo_fast.records import Anchor, Group, Problem, Rollout


def answers_of(path: Path, data: DataConfig) -> list[Submitted]:
    """All answers of a file or a run, corrections among them; lines that cannot be judged are left out. Raises
    UserError."""
    files, of_a_run = files_of(path)
    found = []
    for line in read_lines(files, of_a_run, data):
        for answer in line.answers:
            inside = "" if answer.index is None else f" corrections[{answer.index}]"
            found.append(Submitted(answer.row, answer.response, line.where + inside, _step(line)))
    if not found:
        raise UserError(f"{path}: no line in it can be judged; python -m cipo_fast.judge says why")
    return found


def steps_of(path: Path) -> Iterator[tuple[list[Group], list[Anchor]]]:
    """The steps of a run: its groups, and those of its rollouts that were anchors. Token ids are not recorded: a
    rollout has as many zeros. Raises UserError."""
    files, of_a_run = files_of(path)
    if not of_a_run:
        raise UserError(f"{path}: a run's folder, or its rollouts/, is expected: corrections are in them alone")
    for file in files:
        lines = [line for line in read_records([file]) if "reward" in line.record and "problem" in line.record]
        groups: list[Group] = []
        anchors: list[Anchor] = []
        for name, members in groupby(lines, key=lambda line: str(line.record["problem"])):
            problem = Problem(name, (), "", "")
            group = Group(problem, [], [])
            for line in members:
                rollout = _rollout(problem, line.record)
                corrections = line.record.get("corrections")
                if corrections:
                    shown = [_rollout(problem, correction) for correction in corrections]
                    anchors.append(Anchor(rollout, len(groups), len(group.rollouts), [], None, shown))
                group.rollouts.append(rollout)
            groups.append(group)
        yield groups, anchors


def _rollout(problem: Problem, record: dict[str, Any]) -> Rollout:
    ids = [0] * int(record.get("tokens") or 0)
    return Rollout(
        problem,
        [],
        ids,
        [],
        str(record.get("text") or ""),
        float(record["reward"]),
        bool(record.get("truncated")),
        int(record.get("policy_version") or 0),
        str(record.get("verdict") or ""),
        hint=record.get("hint"),
    )


def _step(line: Line) -> int | None:
    found = re.search(r"step-(\d+)\.jsonl:\d+$", line.where)
    return int(found[1]) if found else None
