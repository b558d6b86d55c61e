"""A sample of a run's rollouts, as trees: a problem, its attempts, the corrections of each."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, TypeVar

from cipo_fast.report.files import Files, number

T = TypeVar("T")
MOST_STEPS = 24  # that are looked into, the first and the last among them
FEWEST_STEPS = 3  # even where answers are so long that they are cut for it
TOKENS = ("pieces", "logp", "gap", "entropy")  # of an answer; a value of each for every piece
Problem = dict[str, Any]
Answer = dict[str, Any]


def sample_rollouts(files: Files, room: int) -> list[dict[str, Any]]:
    """[{step, problems, of}] of at most `room` bytes of JSON; `of`: how many problems the step has. Steps are spread
    over the run; within one, problems take turns: one with a flip, one without."""
    names = [name for name in files.of_format("rollouts/step-*.jsonl") if _step(name) is not None]
    if not names:
        return []
    chosen = spread(names, _affordable(files, names, room))
    found = []
    for left, name in zip(range(len(chosen), 0, -1), chosen, strict=True):
        share = room // left
        problems = read_problems(files, name)
        kept: list[Problem] = []
        for problem in in_turns(problems):
            size = lighten(problem, share // (3 if kept else 2))  # tokens of the first ones, texts of many
            if not kept and size > share:  # else the step would show nothing
                cut(problem, share)
                size = size_of(problem)
            if size <= share:
                kept.append(problem)
                share, room = share - size, room - size
        found.append({"step": _step(name), "of": len(problems), "problems": kept})
    return [step for step in found if step["problems"]]


def read_problems(files: Files, name: str) -> list[Problem]:
    """All problems of a step's file, in order."""
    found: dict[str, Problem] = {}
    other = 0
    for record in files.lines(name):
        try:
            key, prompt = str(record["problem"]), str(record["prompt"])
            attempt = answer_of(record)
            corrections = record.get("corrections")
            if corrections is not None:
                attempt["corrections"] = [answer_of(one) for one in corrections]
        except (KeyError, TypeError, AttributeError):
            other += 1
            continue
        about = {"id": key, "prompt": prompt, "answer": record.get("answer"), "source": str(record.get("source") or "")}
        problem = found.setdefault(key, about | {"attempts": []})
        problem["attempts"].append(attempt)
    if other:
        files.skip(name, f"{other} lines of another format")
    return list(found.values())


def answer_of(record: dict[str, Any]) -> Answer:
    """What the page shows of an answer; raises KeyError or TypeError for what is none. An older run's has no verdict
    or no advantage."""
    if not isinstance(record["text"], str):
        raise TypeError
    found: Answer = {
        "text": record["text"],
        "tokens": record.get("tokens"),
        "advantage": number(record.get("advantage")),
    }
    found["verdict"] = str(record.get("verdict") or ("right" if record["reward"] > 0 else "wrong"))
    found |= {key: record[key] for key in ("why", "hint") if record.get(key) not in (None, "")}
    if record.get("truncated"):
        found["truncated"] = True
    return found | _tokens(record)


def _tokens(record: dict[str, Any]) -> dict[str, Any]:
    """`pieces`, and for each of them `logp` (the engine's), `gap` (trainer's less engine's) and `entropy`; nothing
    where the record has no tokens, or not as many of each."""
    pieces, logps = record.get("token_texts"), record.get("sampler_logps")
    if not isinstance(pieces, list) or not isinstance(logps, list) or len(pieces) != len(logps):
        return {}
    found: dict[str, Any] = {"pieces": [str(piece) for piece in pieces], "logp": _numbers(logps)}
    trainer, entropies = record.get("trainer_logps"), record.get("entropies")
    if isinstance(trainer, list) and len(trainer) == len(pieces):
        found["gap"] = [_gap(a, b) for a, b in zip(trainer, logps, strict=True)]
    if isinstance(entropies, list) and len(entropies) == len(pieces):
        found["entropy"] = _numbers(entropies)
    return found


def _gap(trainer: Any, engine: Any) -> float | None:
    if trainer == engine:
        return 0  # mostly
    a, b = number(trainer), number(engine)
    return None if a is None or b is None else round(a - b, 4)


def _numbers(values: Sequence[Any]) -> list[float | None]:
    """`number` of each, to 0.01 where that is enough for a colour; quick, because tokens are most of a page."""
    return [_short(v) if type(v) is float and -1e6 < v < 1e6 else number(v) for v in values]


def _short(value: float) -> float:
    return int(value * 100 + (0.5 if value > 0 else -0.5)) / 100


def in_turns(problems: Sequence[Problem]) -> list[Problem]:
    """One with a correction that flips its attempt, one without, and so on."""
    flips = [problem for problem in problems if _flips(problem)]
    others = [problem for problem in problems if not _flips(problem)]
    mixed = [problem for pair in zip(flips, others, strict=False) for problem in pair]
    return mixed + flips[len(others) :] + others[len(flips) :]


def _flips(problem: Problem) -> bool:
    return any(
        (attempt["verdict"] == "right") != (correction["verdict"] == "right")
        for attempt in problem["attempts"]
        for correction in attempt.get("corrections", ())
    )


def lighten(problem: Problem, room: int) -> int:
    """Drop the tokens of answers until the problem has at most `room` bytes, or no tokens; return its size. What nobody
    was shown goes first, then corrections from the last, then the attempts that were shown."""
    size = size_of(problem)
    shown = [attempt for attempt in problem["attempts"] if attempt.get("corrections")]
    plain = [attempt for attempt in problem["attempts"] if not attempt.get("corrections")]
    corrections = [correction for attempt in shown for correction in attempt["corrections"]]
    for answer in (*reversed(plain), *reversed(corrections), *reversed(shown)):
        if size <= room:
            break
        size -= size_of({key: answer.pop(key) for key in TOKENS if key in answer})
    return size


def cut(problem: Problem, room: int) -> None:
    """Shorten the longest texts, and drop their tokens, until the problem has about `room` bytes: an answer keeps its
    beginning and its end, and says how much is gone (`cut`, in characters)."""
    answers = [a for attempt in problem["attempts"] for a in (attempt, *attempt.get("corrections", ()))]
    texts: list[tuple[dict[str, Any], str]] = [(problem, "prompt"), *((a, "text") for a in answers)]
    room -= 300 * len(texts)  # what else each has
    for answer in answers:
        if size_of(answer) > room // len(answers):
            for key in TOKENS:
                answer.pop(key, None)
    limit = max(200, _level([len(owner[key]) for owner, key in texts], room // 2))
    for owner, key in texts:
        text = owner[key]
        if len(text) > limit:
            owner["cut"] = len(text) - 2 * (limit // 2)
            gone = f"\n[... {owner['cut']:,} characters left out of this page ...]\n"
            owner[key] = text[: limit // 2] + gone + text[-(limit // 2) :]


def _level(lengths: Sequence[int], room: int) -> int:
    """The largest limit for which the lengths, none counted above it, add up to `room` at most."""
    left = room
    for done, length in enumerate(sorted(lengths)):
        share = left // (len(lengths) - done)
        if length > share:
            return share
        left -= length
    return max(lengths, default=0)


def size_of(thing: Any) -> int:
    """Bytes on the page, within a few percent."""
    return len(json.dumps(thing, ensure_ascii=False).encode(errors="backslashreplace"))


def spread(items: Sequence[T], most: int) -> list[T]:
    """At most that many, evenly from the first to the last."""
    if len(items) <= most:
        return list(items)
    places = [round(i * (len(items) - 1) / (most - 1)) for i in range(most)] if most > 1 else [len(items) - 1]
    return [items[place] for place in places]


def _affordable(files: Files, names: Sequence[str], room: int) -> int:
    """How many steps can show a problem each, by the typical one of the last file."""
    sizes = sorted(size_of(problem) for problem in read_problems(Files(files.folder), names[-1]))
    typical = sizes[len(sizes) // 2] if sizes else 1
    return max(FEWEST_STEPS, min(MOST_STEPS, room // max(1, typical)))


def _step(name: str) -> int | None:
    found = re.search(r"step-(\d+)\.jsonl$", name)
    return int(found[1]) if found else None
