"""Held-out problems, one by one: what each run answered before and after."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from cipo_fast.errors import UserError
from cipo_fast.evaluation.figures import paired
from cipo_fast.evaluation.records import SAMPLES, Answer, Chain, Record
from cipo_fast.report.files import Files, number
from cipo_fast.report.rollouts import size_of

MOST_BYTES = 2**28  # read of an evaluation
MOST_PROBLEMS = 2000  # that the page compares
MOST_TEXT = 2000  # characters shown of an answer
Key = tuple[str, str]  # a problem's id, and what tells problems of one id apart


@dataclass(frozen=True)
class Evaluated:
    """An evaluation's problems. `records` are for figures: long texts are digests there; `shown`: what the page has."""

    step: int
    records: list[Record]
    shown: dict[Key, dict[str, Any]]


def first_and_last(files: Files, steps: Sequence[int]) -> list[Evaluated]:
    """Of a run's evaluations the first and the last whose answers can be read; one, or none, where there is no more."""
    ends = sorted({*steps[:1], *steps[-1:]})
    found = [read_evaluated(files, step) for step in ends]
    return [one for one in found if one.records]


def read_evaluated(files: Files, step: int) -> Evaluated:
    name = f"evaluations/step-{step:05d}/{SAMPLES}"
    found = Evaluated(step, [], {})
    other = 0
    for line in files.lines(name, MOST_BYTES):
        try:
            shown = _shown(line)
            record = _record(line)
        except (KeyError, TypeError, AttributeError, IndexError):
            other += 1
            continue
        found.records.append(record)
        found.shown[record.problem, record.content] = shown
    if other:
        files.skip(name, f"{other} lines of another format")
    return found


def _record(line: dict[str, Any]) -> Record:
    attempts = [_light(answer) for answer in line["attempts"]]
    chains = [
        Chain(c["attempt"], [None if a is None else _light(a) for a in c["answers"]], c["ended"])
        for c in line.get("chains", ())
    ]
    greedy = None if line["greedy"] is None else _light(line["greedy"])
    rest = {key: line[key] for key in ("problem", "source", "n", "checks")}
    return Record(**rest, greedy=greedy, attempts=attempts, chains=chains, content=line.get("content", ""))


def _light(answer: dict[str, Any]) -> Answer:
    """Two answers are alike when their texts are: a digest is enough for that. It has no canonical form: exact
    majorities would take longer than all of the page."""
    text = answer["text"].strip()
    if len(text) > 64:
        text = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).hexdigest()
    return Answer(**{**answer, "text": text, "canonical": None})


def _shown(line: dict[str, Any]) -> dict[str, Any]:
    """`greedy` [verdict, text], `right` of `n` attempts, `kept` of `checked` right after one check, and the first
    attempt with its check."""
    attempts, chains = line["attempts"], [c for c in line.get("chains", ()) if c["answers"]]
    after = [(c["answers"][0] or attempts[c["attempt"]]) for c in chains]
    found = {
        "greedy": _answer(line["greedy"]),
        "right": sum(a["reward"] > 0 for a in attempts),
        "n": len(attempts),
        "kept": sum(a["reward"] > 0 for a in after),
        "checked": len(after),
        "attempt": _answer(attempts[0]) if attempts else None,
    }
    first = next((c["answers"][0] for c in chains if c["attempt"] == 0), None)
    return found | {"check": _answer(first)}


def _answer(answer: dict[str, Any] | None) -> list[str] | None:
    if answer is None:
        return None
    text = answer["text"]
    gone = len(text) - MOST_TEXT
    return [answer["verdict"], text if gone <= 0 else f"[... {gone:,} characters left out ...]\n{text[-MOST_TEXT:]}"]


def changes(evaluated: Sequence[Evaluated]) -> dict[str, list[float | None]]:
    """{figure: [after less before, low, high]}, paired over problems, 95%."""
    if len(evaluated) < 2:
        return {}
    try:
        found = paired(evaluated[0].records, evaluated[-1].records)
    except UserError:  # no problem in common
        return {}
    return {name: [number(d.value), number(d.low), number(d.high)] for name, d in found.differences.items()}


def compare(runs: Sequence[tuple[int, Files, Sequence[Evaluated]]], room: int) -> dict[str, Any]:
    """{columns: [{run, step, when}], problems, of}: each problem with a cell a column, null where an evaluation has not
    asked it, within `room` bytes; those whose cells differ most come first. `of`: how many problems there are."""
    columns = [(run, one) for run, _, evaluated in runs for one in evaluated]
    asked = {(run, key): row for run, files, _ in runs for key, row in _held_out(files)}
    keys = {key: run for run, one in reversed(columns) for key in reversed(one.shown)}  # and the first run that has it
    rows = [(key, run, [one.shown.get(key) for _, one in columns]) for key, run in reversed(keys.items())]
    found = []
    for key, run, cells in sorted(rows, key=lambda row: -_apart(row[2]))[:MOST_PROBLEMS]:
        prompt, answer = asked.get((run, key[0]), ("", None))
        problem = {"id": key[0], "prompt": prompt[:MOST_TEXT], "answer": answer, "cells": cells}
        room -= size_of(problem)
        if room < 0:
            break
        found.append(problem)
    heads = [
        {"run": run, "step": one.step, "when": "before" if one.step == 0 else f"step {one.step}"}
        for run, one in columns
    ]
    return {"columns": heads, "problems": found, "of": len(rows)}


def _apart(cells: Sequence[dict[str, Any] | None]) -> float:
    shares = [cell["right"] / cell["n"] for cell in cells if cell and cell["n"]]
    return max(shares) - min(shares) if shares else 0.0


def _held_out(files: Files) -> Iterator[tuple[str, tuple[str, Any]]]:
    """(id, (what is asked, the wanted answer)) of the run's held-out problems."""
    for row in files.lines("held_out.jsonl"):
        messages = row.get("messages")
        asked = messages[-1].get("content") if isinstance(messages, list) and messages else row.get("prompt")
        wanted = row.get("answer")
        yield str(row.get("id")), (str(asked or ""), wanted if isinstance(wanted, str | int | float) else None)
