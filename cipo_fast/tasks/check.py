"""What is in a data set, and what is wrong with it, before anybody trains on it."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from cipo_fast.config import Config, load_config
from cipo_fast.config.settings import HUB_DATA
from cipo_fast.errors import UserError, put
from cipo_fast.golds import AHEAD, Gold, judged_golds
from cipo_fast.records import Problem
from cipo_fast.tasks.formats import INSTRUCTION
from cipo_fast.tasks.problems import Say, read_all
from cipo_fast.tasks.sources import Role, Source
from cipo_fast.verify import VerifierFailure
from cipo_fast.verify.workers.pool import Judges

NAMED = 20  # rows that a line names
LIST = 1000  # golds that are listed
# Between digits a stop says what is asked: 1.5 is not 15.
STOPS = re.compile(r"[;!?'\"$`\u2018\u2019\u201c\u201d]|(?<!\d)[.,:]|[.,:](?!\d)")
SPACES = re.compile(r"(?<!\w)\s+|\s+(?!\w)")


def check(files: Sequence[str], held_out: Sequence[str], overrides: list[str], say: Say) -> int:
    """Print all of it to standard output, progress to `say`. 0: nothing would mislead a run; 1: there are golds that do
    not verify, or questions that are held out too. Raises UserError."""
    config = load_config([], overrides)
    train = _read(files, config, "train")
    judged = _read(held_out, config, "eval")
    put(_counts(train))
    put(_lengths(train))
    put(_repeated(train))
    bad = 0
    if held_out:
        overlap = overlapping(train, judged)
        put(f"held out too: {len(overlap)} of {len(train):,} questions are in --eval{_places(overlap)}")
        bad += len(overlap)
    with Judges(config.verify, config.sandbox, say) as judges:
        golds = list(judged_golds([*train, *judged], judges, say))
        answers = _answers([*train, *judged], judges)
    put(_golds(golds))
    if answers:
        put(answers)
    return int(bad > 0 or any(gold.state == "bad" for gold in golds))


def _read(files: Sequence[str], config: Config, role: Role) -> list[Problem]:
    sources: list[Source] = [name if name.startswith(HUB_DATA) else Path(name).absolute() for name in files]
    for source in sources:
        if isinstance(source, Path) and not source.is_file():
            raise UserError(f"no file {source}")
    return read_all(sources, None, put, config.data, role)


# -------------------------------------------------------------------------------------------------------- figures


def _counts(problems: list[Problem]) -> str:
    counts = Counter((p.source, p.verifier) for p in problems)
    lines = [f"{len(problems):,} problems"]
    return "\n".join([*lines, *(f"  {n:>9,}  {source}, {verifier}" for (source, verifier), n in counts.most_common())])


def _lengths(problems: list[Problem]) -> str:
    prompts = [sum(len(m["content"]) for m in p.messages) for p in problems]
    answers = [len(p.answer) for p in problems if p.answer]
    lines = ["length in characters      least   median      90%      99%     most"]
    for name, found in (("prompts", prompts), ("answers", answers)):
        if found:
            shown = "".join(f"{int(value):>9,}" for value in np.quantile(found, [0, 0.5, 0.9, 0.99, 1]))
            lines.append(f"  {name:<20}{shown}")
    return "\n".join(lines)


def _repeated(problems: list[Problem]) -> str:
    """The same question again: to the letter, or but for case, spaces and punctuation; with another answer or not."""
    exact = _again(problems, lambda p: repr((p.content, p.answer)))
    nearly = _again(problems, lambda p: normalised(p) + "\0" + p.answer.strip())
    other = _again(problems, normalised)
    lost = {id(p) for p in nearly}
    other = [p for p in other if id(p) not in lost]
    lines = [
        f"repeated: {len(exact):,} to the letter{_places(exact)}",
        f"repeated: {len(nearly):,} but for case, spaces and punctuation{_places(nearly)}",
        f"asked again with another answer: {len(other):,}{_places(other)}",
    ]
    return "\n".join(lines)


def overlapping(train: Iterable[Problem], held_out: Iterable[Problem]) -> list[Problem]:
    """The problems of `train` whose question is in `held_out`, but for case, spaces and punctuation."""
    asked = {_digest(normalised(p)) for p in held_out}
    return [p for p in train if _digest(normalised(p)) in asked]


def normalised(problem: Problem) -> str:
    """What is asked, without case, spaces, punctuation and the words that ask for a box or a program."""
    text = "\n".join(content for _, content in problem.content)
    for words in INSTRUCTION.values():
        text = text.removesuffix(words)
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(SPACES.sub("", STOPS.sub("", folded)).split())


def _again(problems: list[Problem], key: Callable[[Problem], str]) -> list[Problem]:
    seen: set[bytes] = set()
    found = []
    for problem in problems:
        digest = _digest(key(problem))
        if digest in seen:
            found.append(problem)
        seen.add(digest)
    return found


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _golds(golds: list[Gold]) -> str:
    states = Counter(gold.state for gold in golds)
    lines = [f"golds: {states['good']:,} verify, {states['bad']:,} do not, {states['none']:,} rows have none"]
    if states["unknown"]:
        lines[0] += f", {states['unknown']:,} could not be judged"
    wrong = [gold for gold in golds if gold.state in ("bad", "unknown")]
    lines += [f"  {gold.problem.where or gold.problem.id}: {gold.why}" for gold in wrong[:LIST]]
    return "\n".join(lines if len(wrong) <= LIST else [*lines, f"  and {len(wrong) - LIST:,} more"])


def _answers(problems: list[Problem], judges: Judges) -> str:
    """What functions of a user's own say of their rows' answers: an answer need be no response, so nothing is bad."""
    own = [p for p in problems if ":" in p.verifier]
    asked = [(p, text) for p in own if isinstance(text := p.fields.get("answer"), str)]
    wrong: list[str] = []
    for start in range(0, len(asked), AHEAD):
        futures = [(p, judges.submit(p.row, text)) for p, text in asked[start : start + AHEAD]]
        for problem, future in futures:
            try:
                verdict: str = future.result().verdict
            except VerifierFailure as failure:
                verdict = f"not judged ({failure})"
            if verdict != "right":
                wrong.append(f"  {problem.where or problem.id}: {verdict}")
    if not own:
        return ""
    counts = f"{len(asked) - len(wrong):,} right, {len(wrong):,} not, {len(own) - len(asked):,} rows have none"
    shown = wrong if len(wrong) <= NAMED else [*wrong[:NAMED], f"  and {len(wrong) - NAMED:,} more"]
    return "\n".join([f"answers taken as responses, by functions of your own: {counts}", *shown])


def _places(problems: list[Problem]) -> str:
    if not problems:
        return ""
    shown = ", ".join(p.where or p.id for p in problems[:NAMED])
    return f" ({shown}{'' if len(problems) <= NAMED else ', ...'})"
