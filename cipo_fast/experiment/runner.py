"""Runs a grid: the real command, each run in a process of its own, J at once.

A run that is stopped, or dies, goes on from its newest checkpoint when the same command is given again; one that has
ended is not run again. Runs die with the runner, however that ends (PR_SET_PDEATHSIG).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from cipo_fast.errors import Preempted, TrainingStopped, UserError, put
from cipo_fast.experiment.grid import Grid, GridRun
from cipo_fast.run_dir import inputs_of, of_other_settings
from cipo_fast.view import evaluation_line

PR_SET_PDEATHSIG = 1  # linux/prctl.h
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LOOK_EVERY_S = 0.2
SAY_EVERY_S = 60.0
LAST_LINES = 5  # of a run that failed


@dataclass
class Child:
    """A run that is running, in a session of its own."""

    run: GridRun
    process: subprocess.Popen[bytes]
    started: float = field(default_factory=time.monotonic)
    asked: bool = False  # to end

    def send(self, number: signal.Signals) -> None:
        """To the trainer; SIGKILL to all that it has started."""
        with contextlib.suppress(ProcessLookupError):
            if number == signal.SIGKILL:
                os.killpg(self.process.pid, number)
            else:
                self.process.send_signal(number)


def cores() -> int:
    return len(os.sched_getaffinity(0))


def log_of(run: GridRun) -> Path:
    return run.dir.with_name(f"{run.name}.log")


def refuse_other_settings(grid: Grid) -> None:
    """UserError where a run that has ended is not the one that the file asks for now."""
    for run in grid.runs:
        if run.finished:
            found = of_other_settings(run.config, inputs_of(run.config, ranks=1))
            if found:
                raise UserError(
                    f"{run.dir} has ended with other settings: {'; '.join(found)}; give --out another folder, or "
                    "remove that run's"
                )


def run_grid(grid: Grid, jobs: int) -> None:
    """All runs of the grid that have not ended, `jobs` at once. A run that fails is reported and the others go on;
    TrainingStopped at the end of it all. Raises Preempted after a signal, when the runs have saved their states."""
    waiting = deque(run for run in grid.runs if not run.finished)
    threads = max(1, cores() // jobs)
    done = len(grid.runs) - len(waiting)
    put(
        f"{len(grid.runs)} runs, {done} of them done before; {jobs} at once, {threads} thread{'s' * (threads > 1)} each"
    )
    clock = Clock(grid)
    failed: list[str] = []
    children: list[Child] = []
    with stop_signals() as received:
        try:
            while (waiting and not received) or children:
                while waiting and len(children) < jobs and not received:
                    children.append(start(waiting.popleft(), threads))
                    put(f"{children[-1].run.name} begins; its output: {log_of(children[-1].run)}")
                time.sleep(LOOK_EVERY_S)
                for child in [child for child in children if child.process.poll() is not None]:
                    children.remove(child)
                    if not ended_well(child, bool(received)):
                        failed.append(child.run.name)
                    put(clock.line(children))
                clock.say_sometimes(children)
                if received:
                    stop(children, received)
        finally:
            for child in children:
                child.send(signal.SIGKILL)
                child.process.wait()
    if received:
        raise Preempted(received[0].name)
    if failed:
        raise TrainingStopped(
            f"{len(failed)} of {len(grid.runs)} runs failed: {', '.join(failed)}; the same command tries them again"
        )


def start(run: GridRun, threads: int) -> Child:
    run.dir.mkdir(parents=True, exist_ok=True)
    share_warm_starts(run)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    runner = os.getpid()

    def die_with_runner() -> None:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != runner:
            os._exit(1)

    with log_of(run).open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "cipo_fast.train", *run.args],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment,
            start_new_session=True,  # a terminal's Ctrl-C reaches the runner alone, which tells the runs
            preexec_fn=die_with_runner,
        )  # fmt: skip
    return Child(run, process)


def share_warm_starts(run: GridRun) -> None:
    """The embedded model's warm starts lie beside the runs: arms of a seed that start from the same policy make it
    once."""
    shared, own = run.dir.with_name("warm_start"), run.dir / "warm_start"
    if run.config.model.path == "embedded" and not own.exists():
        shared.mkdir(exist_ok=True)
        own.symlink_to(os.path.relpath(shared, run.dir))


def stop(children: list[Child], received: list[signal.Signals]) -> None:
    """Ask the runs, once, to save and end; a second Ctrl-C ends all at once."""
    if received.count(signal.SIGINT) > 1:
        raise KeyboardInterrupt
    for child in children:
        if not child.asked:
            child.asked = True
            child.send(signal.SIGTERM)


def ended_well(child: Child, stopping: bool) -> bool:
    """Say how a run has ended; False if it failed. One that was asked to stop has not."""
    code, run = child.process.returncode, child.run
    took = duration(time.monotonic() - child.started)
    if code == 0 and run.finished:
        put(f"{run.name} has ended after {took}: {figures_line(run)}")
        return True
    if stopping:
        put(f"{run.name} has stopped at step {steps_done(run)} after {took}")
        return True
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    last = "\n".join(f"    {line}" for line in last_lines(log_of(run)))
    put(f"{run.name} failed at step {steps_done(run)} after {took}, {how}:\n{last}")
    return False


@contextmanager
def stop_signals() -> Iterator[list[signal.Signals]]:
    """Signals that came while open, in their order."""
    received: list[signal.Signals] = []

    def note(number: int, _: FrameType | None) -> None:
        if not received:
            os.write(2, b"asked to stop: the runs save and end (Ctrl-C again ends at once)\n")
        received.append(signal.Signals(number))

    before: dict[signal.Signals, Any] = {s: signal.getsignal(s) for s in SIGNALS}
    before = {s: handler for s, handler in before.items() if handler is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


# ------------------------------------------------------------------------------------------------------ what is said


class Clock:
    """Time used and left, by the steps of all runs; those done before this process began take no time."""

    def __init__(self, grid: Grid):
        self.grid = grid
        self.began = self.said = time.monotonic()
        self.before = self.steps()

    def steps(self) -> int:
        return sum(steps_done(run) for run in self.grid.runs)

    def line(self, running: list[Child]) -> str:
        self.said = time.monotonic()
        used, done = self.said - self.began, self.steps()
        left = sum(run.config.train.steps for run in self.grid.runs) - done
        rate = (done - self.before) / used
        about = f"about {duration(left / rate)} left" if rate > 0 else "no telling yet what is left"
        over = sum(run.finished for run in self.grid.runs)
        now = ", ".join(f"{c.run.name} {steps_done(c.run)}/{c.run.config.train.steps}" for c in running)
        return f"  [{over}/{len(self.grid.runs)}] {duration(used)} used, {about}" + (f"; {now}" if now else "")

    def say_sometimes(self, running: list[Child]) -> None:
        if time.monotonic() - self.said > SAY_EVERY_S:
            put(self.line(running))


def steps_done(run: GridRun) -> int:
    """Rows of its metrics.jsonl."""
    try:
        return (run.dir / "metrics.jsonl").read_bytes().count(b"\n")
    except OSError:
        return 0


def figures_line(run: GridRun) -> str:
    after = json.loads((run.dir / "summary.json").read_text(encoding="utf-8"))["after"]
    return evaluation_line(after)


def last_lines(path: Path) -> list[str]:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 10_000))
        return file.read().decode(errors="replace").splitlines()[-LAST_LINES:]


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
