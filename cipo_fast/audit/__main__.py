"""What verifiers, answers and CIPO itself can go wrong by: canaries, a gaming diagnostic, CIPO's own diagnostics.

    python -m cipo_fast.audit [configs/x.yaml ...] [key.path=value ...]
        Exploit canaries through every verifier: exact, math, code, and data.verifier. Any that is rewarded, or an
        honest control that is not: exit code 1, with their names.

    python -m cipo_fast.audit gaming RUN|FILE [--most N] [--list N] [key.path=value ...]
    python -m cipo_fast.audit gaming model.path=... data.eval=... [key.path=value ...]
        Do programs solve their tasks, or their tests? shortcut_rate of a run's rollouts, of a file of answers (the
        judge's input or output), or of answers sampled now from a model (eval.samples a problem). --most: answers
        looked at, spread evenly (default 2000). --list: so many shortcuts by file and line (default 20).

    python -m cipo_fast.audit own RUN
    python -m cipo_fast.audit own model.path=... data.eval=... [key.path=value ...]
        CIPO's own: correction gap, flips of right attempts, verbatim copies, reward and length. With a model also the
        shuffled-attempt control: corrections of another problem's attempt.

Settings are those of training; verify.* and sandbox.* are the ones that matter here. docs/audit.md explains the
numbers.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from cipo_fast.audit.gaming import Report, Submitted, gaming
from cipo_fast.audit.intervals import Estimate
from cipo_fast.config import OVERRIDE, Config, parse_args
from cipo_fast.config.settings import expand
from cipo_fast.errors import Ending, UserError, command, put, visible
from cipo_fast.judge_view import Bar
from cipo_fast.view import Terminal

BUILT_IN = ("exact", "math", "code")


class Rewarded(Ending):
    """A verifier pays for what is not right."""

    word, exit_code = "failed", 1


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Exit codes: 0 done; 1 a canary was rewarded; 2 bad input, with one line."""
    return command(lambda: run(list(sys.argv[1:] if argv is None else argv)))


def run(args: list[str]) -> None:
    if {"-h", "--help"} & set(args):
        put((__doc__ or "").strip())
    elif args and args[0] == "gaming":
        gaming_command(args[1:])
    elif args and args[0] == "own":
        own_command(args[1:])
    else:
        if args and "=" not in args[0] and not args[0].endswith((".yaml", ".yml")):
            raise UserError(f"{args[0]}: expected gaming, own, key.path=value or a .yaml file")
        canaries_command(parse_args(args))


# --------------------------------------------------------------------------------------------------------- canaries


def canaries_command(config: Config) -> None:
    from cipo_fast.audit.canaries import failures, run_canaries
    from cipo_fast.verify.workers.pool import Judges

    named = config.data.verifier
    verifiers = list(dict.fromkeys([*BUILT_IN, *([named] if named else [])]))
    with Judges(config.verify, config.sandbox, say) as judges:
        outcomes = run_canaries(judges, verifiers, say)
    table = Table(title="canaries", title_justify="left", title_style="bold")
    for column in ("verifier", "canaries", "refused", "rewarded", "not judged", "honest controls", "paid"):
        table.add_column(column, justify="left" if column == "verifier" else "right")
    for verifier in verifiers:
        exploits = [(c, o) for c, o in outcomes if c.verifier == verifier and not c.honest]
        honest = [(c, o) for c, o in outcomes if c.verifier == verifier and c.honest]
        refused = sum(c.passed(o) for c, o in exploits)
        lost = sum(isinstance(o, Exception) for _, o in exploits)
        paid = sum(c.passed(o) for c, o in honest)
        counts = (len(exploits), refused, len(exploits) - refused - lost, lost, len(honest), paid)
        table.add_row(Text(verifier), *map(str, counts))
    Terminal().print(table)
    bad = failures(outcomes)
    if bad:
        names = ", ".join(canary.name for canary, _ in bad)
        raise Rewarded(f"{len(bad)} of {len(outcomes)} canaries did not end as they must: {names}")


# ----------------------------------------------------------------------------------------------------------- gaming


def gaming_command(args: list[str]) -> None:
    from cipo_fast.audit.recorded import answers_of
    from cipo_fast.verify.sandbox import Sandbox
    from cipo_fast.verify.workers.pool import Judges

    most, rest = option(args, "--most", 2000)
    listed, rest = option(rest, "--list", 20)
    path, config = path_and_config(rest)
    answers: list[Submitted]
    if path is None:
        from cipo_fast.audit.sampled import sampled_answers

        answers = sampled_answers(config)
    else:
        answers = answers_of(path, config.data)
    if len(answers) > most:
        say(f"{most} of {len(answers)} answers, spread evenly (--most)")
        answers = [answers[i * len(answers) // most] for i in range(most)]
    sandbox = Sandbox(config.sandbox)
    try:
        with Bar(len(answers), 0, "gaming") as bar, Judges(config.verify, config.sandbox, bar.say) as judges:
            report = gaming(answers, judges, sandbox, config.seed, lambda count: bar.advance(count - bar.done, count))
    finally:
        sandbox.close()
    show_report(report, listed)


def show_report(report: Report, listed: int) -> None:
    console = Terminal()
    console.print(estimates_table("gaming", report.estimates()))
    steps = sorted({t.answer.step for t in report.perturbed if t.answer.step is not None})
    if len(steps) > 1:
        console.print(gap_table(report, steps))
    n, problems = len(report.perturbed), len({t.problem for t in report.perturbed})
    say(f"{n} answers to {problems} problems were run on Phi(T); an interval takes answers as independent")
    for why, count in report.why_not.items():
        say(f"{count} problems have no Phi(T): {why}")
    if report.no_program:
        say(f"{report.no_program} answers are no programs or have no tests: nothing to run again (see docs/audit.md)")
    if report.failed:
        say(f"{len(report.failed)} answers could not be judged; the first: {report.failed[0]}")
    for t in [t for t in report.tested if t.shortcut or (t.passes and t.shared)][:listed]:
        failed = [kind for kind, passes in t.passes_kind.items() if not passes]
        parts = [f"fails {' and '.join(failed)} inputs"] if failed else []
        parts += [f"holds {', '.join(t.shared[:2])}"] if t.shared else []
        say(f"  {t.answer.where}: {'; '.join(parts)}")


def gap_table(report: Report, steps: list[int]) -> Table:
    """The hacking gap over training, in at most eight parts."""
    table = Table(title="over training", title_justify="left", title_style="bold")
    for column in ("steps", "reward on T", "shortcut_rate", "hacking gap", "n"):
        table.add_column(column, justify="right")
    parts = min(8, len(steps))
    for part in range(parts):
        some = steps[part * len(steps) // parts : (part + 1) * len(steps) // parts]
        tested = [t for t in report.perturbed if t.answer.step in set(some)]
        n = len(tested)
        rates = (sum(t.passes for t in tested) / n, sum(t.shortcut for t in tested) / n, report.gap(tested).value or 0)
        table.add_row(f"{some[0]} to {some[-1]}", *(f"{rate:.3f}" for rate in rates), str(n))
    return table


# -------------------------------------------------------------------------------------------------------------- own


def own_command(args: list[str]) -> None:
    from cipo_fast.audit.own import own_table

    path, config = path_and_config(args)
    if path is None:
        from cipo_fast.audit.sampled import own_of_a_model

        found = own_of_a_model(config)
    else:
        from cipo_fast.audit.recorded import steps_of

        found = own_table(steps_of(path))
    Terminal().print(estimates_table("CIPO's own", found))


# ---------------------------------------------------------------------------------------------------------- helpers


def path_and_config(args: Sequence[str]) -> tuple[Path | None, Config]:
    """A folder or file, if one is named, and the settings. One of a path and a model.path is needed."""
    settings = [arg for arg in args if OVERRIDE.match(arg) or arg.endswith((".yaml", ".yml"))]
    paths = [arg for arg in args if arg not in settings]
    unknown = [arg for arg in paths if arg.startswith("-")]
    if unknown:
        raise UserError(f"unknown option {unknown[0]}")
    config = parse_args(settings)
    if len(paths) > 1:
        raise UserError(f"one file or folder is expected, not {len(paths)}: {', '.join(paths)}")
    if paths:
        path = Path(expand(paths[0], "FILE"))
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
        return path, config
    if config.model.path == "embedded":
        raise UserError("name a run's folder or a file of answers; or model.path=FOLDER and data.eval=FILE")
    return None, config


def option(args: Sequence[str], name: str, default: int) -> tuple[int, list[str]]:
    """(the number after `name`, the other arguments)."""
    rest = list(args)
    if name not in rest:
        return default, rest
    at = rest.index(name)
    text = rest[at + 1] if at + 1 < len(rest) else ""
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise UserError(f"{name}: a number above 0 is expected, not {text!r}")
    return int(text), rest[:at] + rest[at + 2 :]


def estimates_table(title: str, found: dict[str, Estimate]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("")
    for column in ("value", "95% interval", "n"):
        table.add_column(column, justify="right")
    for name, estimate in found.items():
        interval = "" if estimate.low is None else f"{estimate.low:.3f} to {estimate.high:.3f}"
        table.add_row(Text(name), "-" if estimate.value is None else f"{estimate.value:.3f}", interval, str(estimate.n))
    return table


def say(text: str) -> None:
    Terminal().print(Text(visible(text)), soft_wrap=True)


if __name__ == "__main__":
    raise SystemExit(main())
