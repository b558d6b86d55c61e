"""What the judge shows: a bar while it works (a line now and then outside a terminal), a summary at its end."""

from __future__ import annotations

import heapq
import time
from collections import Counter
from pathlib import Path
from typing import get_args

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from cipo_fast.answers import Answer, Line
from cipo_fast.errors import note, visible
from cipo_fast.verify import Judgement, Verdict, VerifierFailure
from cipo_fast.view import Terminal

VERDICTS = get_args(Verdict)
SLOWEST = 5
MOST_DIFFERENT = 20  # of a second opinion, named
SECONDS_BETWEEN_LINES = 10.0  # where there is no terminal


class Bar:
    """Progress by bytes read."""

    def __init__(self, total: int, done: int, name: str):
        self.console = Terminal()
        self.total, self.done = total, done
        self.said = time.monotonic()
        self.progress = Progress(
            TextColumn(visible(name), style="bold", markup=False),
            BarColumn(bar_width=None),
            TaskProgressColumn(markup=False),
            TextColumn("{task.fields[answers]:,} answers", markup=False),
            TimeElapsedColumn(),
            TextColumn("left", markup=False),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            expand=True,
        )
        self.task = self.progress.add_task("", total=total, completed=done, answers=0)

    def __enter__(self) -> Bar:
        if self.console.is_terminal:
            self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(Text(visible(text)), soft_wrap=True)

    def warn(self, text: str) -> None:
        """A line that stays, on standard error."""
        if self.console.is_terminal:
            self.progress.stop()
        note(text)
        if self.console.is_terminal:
            self.progress.start()

    def advance(self, size: int, answers: int) -> None:
        self.done += size
        self.progress.update(self.task, completed=self.done, answers=answers)
        if not self.console.is_terminal and time.monotonic() - self.said > SECONDS_BETWEEN_LINES:
            self.said = time.monotonic()
            self.say(f"{answers:,} answers judged, {self.done / max(self.total, 1):.0%} read")


class Tally:
    """Counts of verdicts by verifier and source, and what a reader may want to look at."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.lines = self.bad = self.answers = self.failed = self.read = 0
        self.verdicts: Counter[tuple[str, str, str]] = Counter()  # (verifier, source, verdict)
        self.slowest: list[tuple[float, int, str]] = []  # a heap: seconds, tie-breaker, what
        self.agreement: Counter[tuple[str, str]] = Counter()  # (before, now)
        self.different: list[str] = []

    def add(self, line: Line, outcomes: list[Judgement | VerifierFailure]) -> str:
        """Counts a line in; returns what must be told of it, if anything."""
        self.lines += 1
        self.read += line.size
        if line.error:
            self.bad += 1
            return f"{line.where}: {line.error}"
        told = ""
        for answer, found in zip(line.answers, outcomes, strict=True):
            self.answers += 1
            where = line.where + ("" if answer.index is None else f" corrections[{answer.index}]")
            key = str(answer.row["verifier"]), line.source
            if isinstance(found, VerifierFailure):
                self.failed += 1
                self.verdicts[*key, "not judged"] += 1
                told = f"{where}: not judged: {found}"
                continue
            self.verdicts[*key, found.verdict] += 1
            slow = (found.seconds, self.answers, f"{where}: {found.verdict} {_short(found.why)}")
            (heapq.heappushpop if len(self.slowest) >= SLOWEST else heapq.heappush)(self.slowest, slow)
            self._compare(answer, found.verdict, where, found.why)
        return told

    def _compare(self, answer: Answer, now: str, where: str, why: str) -> None:
        if answer.before is None:
            return
        self.agreement[answer.before, now] += 1
        if not agree(answer.before, now) and len(self.different) < MOST_DIFFERENT:
            self.different.append(f"{where}: was {answer.before}, now {now} ({_short(why)})")

    def show(self, out: Path) -> None:
        console = Terminal()
        if self.verdicts:
            console.print(self._verdict_table())
        if self.different:
            console.print(self._agreement_table())
        for text in self.different:
            console.print(Text(visible("  " + text)), soft_wrap=True)
        if self.agreement:
            same = sum(n for pair, n in self.agreement.items() if agree(*pair))
            console.print(Text(f"second opinion: {same} of {self.agreement.total()} verdicts are as they were"))
        for seconds, _, what in sorted(self.slowest, reverse=True):
            if seconds >= 0.1:
                console.print(Text(visible(f"slowest: {seconds:.2f}s {what}")), soft_wrap=True)
        seconds = time.monotonic() - self.started
        text = f"{self.answers:,} answers in {self.lines:,} lines, {seconds:.1f}s; written to {out}"
        console.print(Text(visible(text)), soft_wrap=True)

    def _verdict_table(self) -> Table:
        by_source = len({source for _, source, _ in self.verdicts}) > 1
        columns = [*VERDICTS, *(["not judged"] if self.failed else [])]
        table = Table()
        table.add_column("verifier", overflow="fold")
        if by_source:
            table.add_column("source", overflow="fold")
        for column in ("answers", *columns):
            table.add_column(column, justify="right")
        names = sorted({(verifier, source) for verifier, source, _ in self.verdicts})
        for verifier, source in names:
            counts = {verdict: self.verdicts[verifier, source, verdict] for verdict in columns}
            total = sum(counts.values())
            cells = [f"{n:,} {n / total:.1%}" if n else "-" for n in counts.values()]
            table.add_row(Text(verifier), *([Text(source)] if by_source else []), f"{total:,}", *cells)
        return table

    def _agreement_table(self) -> Table:
        now = [verdict for verdict in VERDICTS if any(pair[1] == verdict for pair in self.agreement)]
        table = Table()
        table.add_column("was, now")
        for column in now:
            table.add_column(column, justify="right")
        for before in sorted({pair[0] for pair in self.agreement}):
            table.add_row(Text(before), *(str(self.agreement[before, column] or "-") for column in now))
        return table


def agree(before: str, now: str) -> bool:
    """A record of a reward alone says right or not."""
    return before == now or (before == "not right" and now != "right")


def _short(text: str, limit: int = 100) -> str:
    return text if len(text) <= limit else text[:limit] + "..."
