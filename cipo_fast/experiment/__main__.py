"""A grid of settings and seeds, run and compared.

    python -m cipo_fast.experiment FILE.yaml [--jobs J] [--out DIR] [--dry-run] [--report] [--publish DIR]

FILE.yaml is a path, or the name of a file in configs/experiments; docs/experiments.md says what is in it. The same
command goes on where an earlier one was stopped.

    --jobs J       runs at once (default: one a core; with a GPU give 1)
    --out DIR      where everything is written (default: runs/experiments/NAME)
    --dry-run      say what would be run, and how much it is
    --report       write results.md, results.json and plots from what has ended; run nothing
    --publish DIR  copy them to DIR at the end, without the runs
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from cipo_fast import provenance
from cipo_fast.errors import TrainingStopped, UserError, command, put
from cipo_fast.experiment.grid import Grid, GridRun, changed_settings, common_settings, read_grid, said
from cipo_fast.experiment.report import MARKDOWN, make_report, publish, write_report
from cipo_fast.experiment.runner import cores, refuse_other_settings, run_grid
from cipo_fast.run_dir import locked


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Exit codes: 0 all has ended and is compared, 1 a run failed, 2 bad input, 75 ended by a signal (the
    runs have saved their states; the same command goes on), 130 a second Ctrl-C."""
    args = list(sys.argv[1:] if argv is None else argv)
    return command(lambda: run(args), "interrupted: the same command goes on from the runs' newest checkpoints")


def run(args: list[str]) -> None:
    if not args or {"-h", "--help"} & set(args):
        put((__doc__ or "").strip())
        return
    options = parse(args)
    grid = read_grid(options.file, options.out)
    if options.dry_run:
        put(described(grid, options.jobs or cores()))
        return
    if options.report:
        refuse_other_settings(grid)
        report(grid, options.publish)
        return
    with locked(grid.out, "--out"):
        refuse_other_settings(grid)
        waiting = sum(not run.finished for run in grid.runs)
        jobs = min(options.jobs or cores(), max(1, waiting))
        if waiting:
            provenance.record(grid.out, f"python -m cipo_fast.experiment {shlex.join(args)}", jobs)
        failure = None
        try:
            run_grid(grid, jobs)
        except TrainingStopped as error:
            failure = error
        if failure is None or any(run.finished for run in grid.runs):
            report(grid, options.publish)
        if failure is not None:
            raise failure


def report(grid: Grid, folder: Path | None) -> None:
    write_report(make_report(grid))
    put(f"compared in {grid.out / MARKDOWN}")
    if folder is not None:
        publish(grid.out, folder)
        put(f"copied to {folder}")


def parse(args: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m cipo_fast.experiment", usage=argparse.SUPPRESS, add_help=False, allow_abbrev=False
    )
    parser.add_argument("file")
    parser.add_argument("--jobs", type=int)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--publish", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args(args)
    if options.jobs is not None and options.jobs < 1:
        raise UserError(f"--jobs {options.jobs}: at least one run at a time")
    return options


def described(grid: Grid, jobs: int) -> str:
    """The grid: its arms with what differs from the defaults, its commands, and how much there is."""
    experiment = grid.experiment
    given = {arm: changed_settings(grid.of(arm)[0]) for arm in experiment.arms}
    everywhere = common_settings(given)
    lines = [f"{experiment.name}: {experiment.about}", "", f"all arms: {said(everywhere)}"]
    for arm, settings in given.items():
        own = said({key: value for key, value in settings.items() if key not in everywhere})
        control = " (the control)" if arm == experiment.control else ""
        lines.append(f"{arm}{control}, {answers_per_step(grid.of(arm)[0]):,} answers a step: {own or 'nothing more'}")
    lines += ["", *(f"{'done: ' if run.finished else ''}{run.command}" for run in grid.runs), ""]
    waiting = [run for run in grid.runs if not run.finished]
    steps = sum(run.config.train.steps for run in waiting)
    answers = sum(run.config.train.steps * answers_per_step(run) for run in waiting)
    jobs = min(jobs, max(1, len(waiting)))
    lines += [
        f"{len(experiment.arms)} arms x {len(experiment.seeds)} seeds = {len(grid.runs)} runs in {grid.out}, "
        f"{len(grid.runs) - len(waiting)} of them done",
        f"to do: {steps:,} steps, {answers:,} answers, and the evaluations; {jobs} runs at once, "
        f"{max(1, cores() // jobs)} of {cores()} cores each",
    ]
    return "\n".join(lines)


def answers_per_step(run: GridRun) -> int:
    """Rollouts and corrections."""
    config = run.config
    rollouts = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
    return rollouts + config.anchors_per_step * config.samples_per_anchor


if __name__ == "__main__":
    sys.exit(main())
