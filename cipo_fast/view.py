"""What a run shows while it runs: one live view in a terminal, a line a step elsewhere; and the table at its end."""

from __future__ import annotations

import time
from collections import deque
from datetime import timedelta
from itertools import pairwise
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from cipo_fast.cipo.metrics import Metrics
from cipo_fast.errors import note, stop_printing, visible
from cipo_fast.evaluation.figures import Difference, Figure
from cipo_fast.evaluation.report import interval, number

WIDTH = 160  # of a step's line
SECONDS_BETWEEN_LINES = 10.0  # of `Steps`, where there is no terminal
BLOCKS = " ▁▂▃▄▅▆▇█"
PHASES = ("generate", "verify", "old_logp", "train", "sync", "probe", "idle")
COLORS = {
    "generate": "cyan",
    "verify": "yellow",
    "old_logp": "magenta",
    "train": "green",
    "sync": "blue",
    "probe": "bright_blue",
    "idle": "grey50",
}


class Terminal(Console):
    """A console that takes text as it is: no markup, no emoji codes. A reader that goes away ends nothing."""

    def __init__(self, quiet: bool = False):
        super().__init__(quiet=quiet, highlight=False, markup=False, emoji=False)

    def print(self, *objects: Any, **options: Any) -> None:
        """Nobody reads on, or the disk under standard output is full: the run goes on without a word there."""
        try:
            super().print(*objects, **options)
        except OSError as error:
            self.on_broken_pipe()
            note(f"standard output cannot be written any more ({error.strerror}); the run goes on")

    def on_broken_pipe(self) -> None:
        self.quiet = True
        stop_printing()


class View:
    """`mode` is live, plain or auto (live in a terminal). Quiet on every rank but the first. `evaluate_every`: steps
    from one evaluation to the next (0: only the last), which the time that is left counts."""

    def __init__(self, mode: str, steps: int, title: str, quiet: bool, evaluate_every: int = 0):
        self.console = Terminal(quiet)
        self.title = visible(title)
        self.history: list[float] = []
        self.latest: Metrics = {}
        self.message = ""
        self.evaluation = ""  # the newest one
        self.steps, self.evaluate_every = steps, evaluate_every
        self.step_seconds: deque[float] = deque(maxlen=20)
        self.evaluation_seconds = 0.0
        self.evaluated_at = 0
        self.progress = Progress(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}", markup=False),
            expand=True,
        )
        self.task = self.progress.add_task("steps", total=steps, start=False, left="")
        live = mode == "live" or (mode == "auto" and self.console.is_terminal)
        self.live = (
            Live(console=self.console, get_renderable=self._render, refresh_per_second=4)
            if live and not quiet
            else None
        )

    def __enter__(self) -> View:
        if self.live:
            self.live.start()
        else:
            self.say(self.title)
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()
            self.live = None

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(Text(visible(text)), soft_wrap=True)

    def busy(self, text: str) -> None:
        """What is going on, in the live view alone."""
        self.message = visible(text)

    def note(self, text: str) -> None:
        """A line that is replaced by the next in the live view."""
        self.message = visible(text)
        if not self.live:
            self.say(text)

    def evaluated(self, when: str, figures: dict[str, float | None], seconds: float) -> None:
        line = f"{when}: {evaluation_line(figures)}"
        self.say(f"{line} ({seconds:.1f}s)")
        self.evaluation, self.evaluation_seconds = visible(line), seconds
        self.evaluated_at = int(self.latest.get("step") or 0)
        self._show_left()

    def left_s(self) -> float | None:
        """Seconds of the steps and evaluations to come, as long as those of late; None before the first step."""
        if not self.step_seconds:
            return None
        done, every = int(self.latest["step"] or 0), self.evaluate_every or self.steps
        past = done if self.evaluated_at == done else done - 1  # this step's own evaluation is still to come, or not
        evaluations = len(range(past // every + 1, (self.steps - 1) // every + 1)) + (past < self.steps)
        a_step = sum(self.step_seconds) / len(self.step_seconds)
        return (self.steps - done) * a_step + evaluations * self.evaluation_seconds

    def _show_left(self) -> None:
        if (seconds := self.left_s()) is not None:
            self.progress.update(self.task, left=f"left {timedelta(seconds=round(seconds))}")

    def step(self, metrics: Metrics) -> None:
        if not self.latest:
            self.progress.start_task(self.task)
        self.latest = metrics
        self.message = ""
        self.history.append(float(metrics["rollout/accuracy"] or 0))
        self.progress.update(self.task, completed=metrics["step"])
        self.step_seconds.append(float(metrics["time/step_s"] or 0))
        self._show_left()
        if not self.live:
            self.say(step_line(metrics, int(self.progress.tasks[0].total or 0)))

    def _render(self) -> Panel:
        parts: list[Any] = [self.progress]
        if self.latest:
            parts += [Text(), _columns(self.latest, self.history)]
            if on := alarms_of(self.latest):
                parts.append(Text(f"alarm: {', '.join(on)}", style="bold red"))
        if self.evaluation:
            parts.append(Text(self.evaluation))
        if self.message:
            parts.append(Text(self.message, style="dim"))
        return Panel(Group(*parts), title=Text(self.title), title_align="left", border_style="blue")


def step_line(m: Metrics, total: int) -> str:
    """One step on one line of at most `WIDTH` columns; what is rare stands last, so that the rest is aligned."""
    parts = [f"step {m['step']:>4}/{total}", f"accuracy {_share(m['rollout/accuracy']):>5}"]
    if m.get("correction/wrong_to_right") is not None or m.get("correction/retention") is not None:
        parts += [
            f"wrong>right {_share(m['correction/wrong_to_right']):>5}",
            f"right>wrong {_share(m['correction/right_to_wrong']):>5}",
            f"gap {_share(m['correction/gap'], sign=True):>6}",
            f"rho {_share(m['replay/rho']):>5}",
        ]
    parts += [
        f"loss {_number(m['loss/total'], '+.4f'):>7}",
        f"{m['time/step_s']:6.2f}s (generate {m['time/generate_s']:6.2f} train {m['time/train_s']:6.2f})",
    ]
    rare = [f"skipped {m['train/skipped']}"] if m.get("train/skipped") else []
    rare += [f"not judged {m['verify/failed']}"] if m.get("verify/failed") else []
    rare += alarms_of(m)
    rare += [f"timeout {_share(m['verify/timeout'])}"] if m.get("verify/timeout") else []
    line = "  ".join([*parts, ", ".join(rare)]).rstrip()
    return line if len(line) <= WIDTH else f"{line[: WIDTH - 1]}…"


def alarms_of(m: Metrics) -> list[str]:
    """The alarms that are on."""
    return [key.removeprefix("alarm/") for key, value in m.items() if key.startswith("alarm/") and value]


def sparkline(values: list[float], width: int) -> str:
    """The whole history in `width` characters, 0 to 1."""
    if not values:
        return ""
    n = min(width, len(values))
    edges = [round(i * len(values) / n) for i in range(n + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    return "".join(BLOCKS[round(min(max(v, 0.0), 1.0) * (len(BLOCKS) - 1))] for v in means)


LABELS = {
    "greedy": "accuracy, greedy",
    "t1": "accuracy, T=1",
    "wrong_to_right": "correction of wrong attempts: right",
    "right_to_wrong": "correction of right attempts: broken",
    "after_check_1": "accuracy after a check",
    "after_check_2": "accuracy after two checks",
    "after_check_3": "accuracy after three checks",
    "check_gain": "gain by a check, on the same attempts",
    "correction_gap": "correction gap (over a fresh retry)",
    "verbatim_copies": "checks that repeat the answer",
    "not_shown": "checks with nothing to show",
    "truncated": "cut off, T=1",
    "unparsable": "no answer found, T=1",
    "timeout": "out of time, T=1",
    "answers": "answers judged",
    "failed": "answers that could not be judged",
}
COUNTED = ("answers", "failed")
IF_ANY = ("not_shown", "truncated", "unparsable", "timeout")  # rows of the summary only where there are some
SHORT = ("greedy", "t1", "wrong_to_right", "right_to_wrong", "after_check_1", "correction_gap")


def evaluation_line(result: dict[str, float | None]) -> str:
    """The six figures of an evaluation on one line."""
    k = max((int(key[8:]) for key in result if key.startswith("pass_at_")), default=0)
    shown = {
        "greedy": "greedy",
        "t1": "T=1",
        f"pass_at_{k}": f"pass@{k}",
        "wrong_to_right": "wrong>right",
        "right_to_wrong": "right>wrong",
        "after_check_1": "after a check",
    }
    parts = [f"{label} {_number(result[key], '.3f').strip()}" for key, label in shown.items() if key in result]
    return ", ".join(parts) + (f", {result['failed']:.0f} answers not judged" if result.get("failed") else "")


def summary_table(before: dict[str, float | None], after: dict[str, float | None], saved: float | None) -> Table:
    """Before and after, on held-out problems, and the share of tokens that sharing saved. Of all the figures, which are
    in eval.jsonl, those that tell how training went."""
    table = _table("held-out problems", "before", "after", "change")
    largest = max((int(key[8:]) for key in after if key.startswith("pass_at_")), default=0)
    for key in after:
        b, a = before.get(key), after[key]
        if not (key in (*SHORT, *COUNTED, f"pass_at_{largest}") or (key in IF_ANY and (a or b))):
            continue
        change = "" if a is None or b is None or key in COUNTED else f"{a - b:+.3f}"
        table.add_row(_label(key), _number(b, _form(key)), _number(a, _form(key)), change)
    if saved is not None:
        table.add_section()
        table.add_row("tokens saved by sharing", "", f"{saved:.1%}", "")
    return table


def figures_table(found: dict[str, Figure], title: str = "all problems") -> Table:
    """An evaluation's figures with their intervals, and what each is a share of."""
    table = _table(title, "value", "95%", "of")
    for name, figure in found.items():
        table.add_row(_label(name), number(figure.value), interval(figure), f"{figure.count:.0f}")
    return table


def comparison_table(found: dict[str, Difference], a: str, b: str, title: str = "paired over problems") -> Table:
    """`b` less `a`, with intervals of the difference."""
    table = _table(title, a, b, "difference", "95%")
    for name, d in found.items():
        table.add_row(_label(name), number(d.a), number(d.b), number(d.value, "+.3f"), interval(d))
    return table


class Steps:
    """So many of a total, in one line that is drawn again; a line now and then where there is no terminal."""

    def __init__(self, total: int, what: str, quiet: bool):
        self.console = Terminal(quiet)
        self.total, self.what, self.said = total, what, time.monotonic()
        self.progress = Progress(
            TextColumn(what, style="bold", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left", markup=False),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            expand=True,
        )
        self.task = self.progress.add_task("", total=total)

    def __enter__(self) -> Steps:
        if self.console.is_terminal:
            self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def at(self, done: int) -> None:
        self.progress.update(self.task, completed=done)
        if not self.console.is_terminal and time.monotonic() - self.said > SECONDS_BETWEEN_LINES:
            self.said = time.monotonic()
            self.console.print(f"{done:,} of {self.total:,} {self.what}")


def _table(title: str, *columns: str) -> Table:
    table = Table(title=Text(visible(title)), title_justify="left", title_style="bold")
    table.add_column("")
    for column in columns:
        table.add_column(Text(visible(column)), justify="right")
    return table


def _label(key: str) -> str:
    """`pass_at_8` is pass@8, `all_at_8` pass^8."""
    for name, short in (("pass_at_", "pass@"), ("all_at_", "pass^"), ("maj_at_", "maj@")):
        if key.startswith(name):
            return short + key.removeprefix(name)
    base, _, nth = key.rpartition("_")
    if base in ("wrong_to_right", "right_to_wrong"):
        return f"{LABELS[base]}, round {nth}"
    return LABELS.get(key, key)


def _form(key: str) -> str:
    return ".0f" if key in COUNTED else ".3f"


def _columns(m: Metrics, history: list[float]) -> Table:
    left = Table.grid(padding=(0, 2))
    left.add_row("accuracy", _share(m["rollout/accuracy"]), Text(sparkline(history, 36), style="green"))
    if m.get("correction/retention") is not None or m.get("correction/wrong_to_right") is not None:
        left.add_row(
            "wrong > right", _share(m["correction/wrong_to_right"]), f"gap {_share(m['correction/gap'], sign=True)}"
        )
        left.add_row("right > wrong", _share(m["correction/right_to_wrong"]), f"rho {_share(m['replay/rho'])}")
    left.add_row("loss", _number(m["loss/total"], "+.4f"), f"grad norm {_number(m['grad/norm'], '.3f')}")
    left.add_row("tokens", f"{m['tokens/forwarded']:,}", f"one row each: {m['tokens/rows']:,}")
    left.add_row("tokens/s", _rate(m, "tokens/forwarded", "time/train_s"), "trained")
    left.add_row("", _rate(m, "tokens/sampled", "time/generate_s"), "sampled")
    if m.get("memory/peak_gb") is not None:
        left.add_row("memory", f"{m['memory/peak_gb']:.2f} GB", "peak")
    right = Table.grid(padding=(0, 1))
    total = float(m["time/step_s"] or 1)
    for phase in PHASES:
        seconds = float(m[f"time/{phase}_s"] or 0)
        bar = "█" * round(18 * seconds / total)
        right.add_row(phase, f"{seconds:.2f}s", Text(bar, style=COLORS[phase]))
    columns = Table.grid(padding=(0, 6))
    columns.add_row(left, right)
    return columns


def _rate(m: Metrics, tokens: str, seconds: str) -> str:
    """Tokens a second."""
    number, time_s = m.get(tokens), m.get(seconds)
    return f"{number / time_s:,.0f}" if number and time_s else "-"


def _share(value: Any, sign: bool = False) -> str:
    return _number(value, "+.3f" if sign else ".3f")


def _number(value: Any, form: str) -> str:
    return "  -  " if value is None else format(value, form)
