"""Rows of a source -> problems: format, verifier, policy, prompt, ids; what is dropped is counted and said."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from cipo_fast.config import DataConfig
from cipo_fast.config.settings import FUNCTION
from cipo_fast.errors import UserError
from cipo_fast.records import Problem
from cipo_fast.tasks.fields import Draft, Number, Record, Unusable, hints_field, number_text
from cipo_fast.tasks.formats import instructed, read_row, recognised
from cipo_fast.tasks.sources import Role, Source, name_of, read_source, stem
from cipo_fast.verify.user import check_verifier

Say = Callable[[str], None]
PROGRESS = 200_000  # rows between two lines of progress


def quiet(line: str) -> None:
    """Says nothing."""


def read_problems(
    source: Source, say: Say = quiet, data: DataConfig | None = None, role: Role = "train"
) -> list[Problem]:
    """All problems of `source`; a bad row is a UserError naming file, line and field.

    Ids are unique: a missing one comes from the row's number, a repeated one gets it added. `say` hears, with counts,
    of rows that a user may have meant otherwise, and of those that are dropped."""
    reader = _Reader(source, data or DataConfig(), say)
    for number, where, record in read_source(source, role):
        reader.row(number, where, record)
    return reader.end()


def read_all(
    sources: Sequence[Source], weights: Sequence[float] | None, say: Say, data: DataConfig, role: Role
) -> list[Problem]:
    """The problems of several sources, ids unique among all of them, each with its source's weight."""
    found: list[Problem] = []
    ids: set[str] = set()
    for i, source in enumerate(sources):
        weight = 1.0 if weights is None else weights[i]
        for problem in read_problems(source, say, data, role):
            name = problem.id
            while name in ids:
                name = f"{name}@{stem(source)}"
            ids.add(name)
            found.append(replace(problem, id=name, weight=weight))
    return found


class _Reader:
    """Makes problems of one source's rows, and remembers what there is to say of them."""

    def __init__(self, source: Source, data: DataConfig, say: Say):
        self.source, self.data, self.say = source, data, say
        self.problems: list[Problem] = []
        self.ids: set[str] = set()
        self.seen: set[bytes] = set()  # of formats that repeat rows
        self.format = "own"  # the last one that was told from a row
        self.rows = 0
        self.notes: dict[str, list[str]] = {}
        self.dropped: dict[str, list[str]] = {}
        self.repeated = 0

    def row(self, number: int, where: str, record: Record) -> None:
        self.rows += 1
        if self.rows % PROGRESS == 0:
            self.say(f"{self.source}: {self.rows:,} rows read, {len(self.problems):,} problems")
        try:
            draft = read_row(record, where, self._format(record), self.data)
        except Unusable as reason:
            self.dropped.setdefault(str(reason), []).append(where)
            return
        except RecursionError:
            raise UserError(f"{where}: nested too deeply") from None
        if draft.once and self._again(draft):
            self.repeated += 1
            return
        self.problems.append(replace(self._problem(draft, number, where), hints=hints_field(record, where)))

    def _format(self, record: Record) -> str:
        """As the settings say or the row shows; a row that shows nothing has the form of those before it."""
        if self.data.format is not None:
            return self.data.format
        found = recognised(record)
        if found == "own" and record.get("prompt") is None and record.get("messages") is None:
            return self.format
        self.format = found
        return found

    def _again(self, draft: Draft) -> bool:
        """Whether the same question with the same answer was there before; 16 bytes of each are kept, and no row."""
        key = repr((tuple((m["role"], m["content"]) for m in draft.messages), draft.answer))
        digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
        if digest in self.seen:
            return True
        self.seen.add(digest)
        return False

    def _problem(self, draft: Draft, number: int, where: str) -> Problem:
        verifier, answer = self._verifier(draft.verifier), draft.answer
        if verifier == "exact" and isinstance(answer, Number) and not answer.lstrip("-").isdigit():
            self._note(
                "the answer is a number with a fraction or an exponent: right is what has the same characters",
                f"{where}: {answer}",
            )
        if verifier == "exact" and "\r\n" in answer:
            self._note("the answer has CRLF line ends: compared as LF", where)
        if verifier == "math" and isinstance(answer, Number):
            answer = number_text(answer)
        name = draft.id or f"{stem(self.source)}-{number}"
        if name in self.ids:
            self._note("an earlier row has the same id: the line number is added", where)
            name = f"{name}@{number}"
        self.ids.add(name)
        fields = dict(draft.fields)
        if verifier == "math":
            policy = {**draft.policy, **self.data.math, **fields.get("policy", {})}
            fields = {**fields, "policy": policy} if policy else fields
        messages = instructed(draft.messages, verifier, self.data)
        return Problem(name, messages, str(answer), draft.source or name_of(self.source), where, verifier, fields)

    def _verifier(self, name: str) -> str:
        """A function's file that a row names is looked for here, then beside the row's own file."""
        match = FUNCTION.fullmatch(name)
        if match is None:
            return name
        near = self.source.parent if isinstance(self.source, Path) else Path()
        for path in (Path(match["file"]), near / match["file"]):
            if path.is_file():
                verifier = f"{path.absolute()}:{match['name']}"
                check_verifier(verifier)
                return verifier
        raise UserError(f"{self.source}: verifier {name}: no file {match['file']}")

    def _note(self, kind: str, where: str) -> None:
        self.notes.setdefault(kind, []).append(where)

    def end(self) -> list[Problem]:
        n = len(self.problems)
        for note, found in self.notes.items():
            self.say(f"{self.source}: in {len(found)} of {n} rows {note} (first: {found[0]})")
        if self.repeated:
            self.say(f"{self.source}: {self.repeated:,} of {self.rows:,} rows repeat earlier ones: dropped")
        for reason, found in self.dropped.items():
            places = ", ".join(place.removeprefix(f"{self.source}:").strip() for place in found[:5])
            more = "" if len(found) <= 5 else f" and {len(found) - 5} more"
            self.say(f"{self.source}: {len(found)} of {self.rows:,} rows dropped: {reason} (rows {places}{more})")
        if self.format == "debugbench" and n:
            self.say(f"{self.source}: DebugBench is scored by an online judge; here by the examples that its rows show")
        if not n and self.rows:
            raise UserError(f"{self.source}: no problems in it: all {self.rows:,} rows are dropped")
        if not n:
            raise UserError(
                f"{self.source}: no problems in it; expected one JSON object a line with prompt or messages, and answer"
            )
        return self.problems
