"""Offline scoring: judges answers in a file, or anew those of a finished run, by the code that judges in training.

    python -m cipo_fast.judge FILE.jsonl [--out OUT.jsonl] [--overwrite] [configs/x.yaml ...] [key.path=value ...]
    python -m cipo_fast.judge RUN                     a run's folder, its rollouts/, or a step-N.jsonl in it

In: one object a line with `response`, `verifier` (exact, math, code or path/to/file.py:function) and what that verifier
reads: `answer`; or for code `tests` ([{"args": [...], "expected": ...}], with `entry_point`, or [{"stdin": ...,
"stdout": ...}]), or `prompt`, `entry_point` and `test` (HumanEval's form). Settings are verify.*, sandbox.*,
data.verifier (of lines that name none) and data.math (a policy under theirs); a run is judged with the verify.* and
sandbox.* that it recorded, unless given. A run's rollouts name problems: their rows are in problems.jsonl beside them.

Out: the same lines in the same order, with `verdict` (right, wrong, unparsable, timeout), `why` and `seconds` added, in
FILE.judged.jsonl beside FILE unless --out names another. An earlier `verdict` is kept as `verdict_before`; where a line
has one, or a reward, it is compared with the new one. Blank lines are left out. Bytes that are not UTF-8 are judged,
and written, as U+FFFD.

A line that cannot be judged (no JSON, no response, no tests, more than 256 MiB...) is written with verdict null,
`fault` "bad line" and `why`, and named on standard error; the others are judged. So is an answer that the machinery
failed (a worker or the sandbox was lost, a user's function raised, a suite tests nothing): verdict null, `fault`
"not judged", never a verdict. A row's own `error` is a tolerance, and stays as it is.

While it works it writes OUT.part: the same command goes on from there after a Ctrl-C or worse. A finished OUT is never
written over without --overwrite.

Exit codes: 0 all judged; 1 some were failed by the machinery; 2 bad lines among them, or nothing could be judged;
130 Ctrl-C.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from cipo_fast.answers import ADDED, BEFORE, Answer, Line, files_of, plain, read_lines
from cipo_fast.config import OVERRIDE, Config, parse_args, read_config
from cipo_fast.config.settings import expand
from cipo_fast.errors import Ending, UserError, command, note, put
from cipo_fast.judge_view import Bar, Tally
from cipo_fast.verify import Judgement, VerifierFailure
from cipo_fast.verify.workers.pool import Judges

MOST_LINES, MOST_BYTES = 256, 2**26  # read and not yet written
MOST_NOTES = 20  # bad lines and failures told one by one

Outcome = Judgement | VerifierFailure


class NotJudged(Ending):
    """Some answers could not be judged; all else is written."""

    word, exit_code = "error", 1


@dataclass(frozen=True)
class Options:
    path: Path
    out: Path
    overwrite: bool
    config: Config


def main(argv: Sequence[str] | None = None) -> int:
    """The command; exit codes as above."""
    args = list(sys.argv[1:] if argv is None else argv)
    with ended_by_sigterm():
        return command(lambda: run(args), "interrupted: the same command goes on from where it was")


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends it as Ctrl-C does, while it lasts; in a thread, where that cannot be had, as ever."""
    try:
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run(args: Sequence[str]) -> None:
    if not args or {"-h", "--help"} & set(args):
        put((__doc__ or "").strip())
        return
    options = parse(args)
    files, of_a_run = files_of(options.path)
    if options.out.resolve() in [file.resolve() for file in files]:
        raise UserError(f"--out {options.out} is the input")
    tally = Tally()
    try:
        part = judge_files(files, of_a_run, options, tally)
        os.replace(part, options.out)
    except OSError as error:
        raise UserError(f"{options.out}: cannot be written ({error.strerror})") from None
    tally.show(options.out)
    if tally.bad:
        raise UserError(f"{tally.bad} of {tally.lines} lines could not be judged: `why` in {options.out} says it")
    if tally.failed:
        raise NotJudged(f"{tally.failed} answers were not judged, the machinery failed: `why` in {options.out} says it")


def parse(args: Sequence[str]) -> Options:
    """Raises UserError."""
    paths: list[str] = []
    settings: list[str] = []
    out, overwrite, rest = None, False, list(args)
    while rest:
        arg = rest.pop(0)
        if arg == "--out":
            if not rest:
                raise UserError("--out: name a file")
            out = rest.pop(0)
        elif arg.startswith("--out="):
            out = arg.removeprefix("--out=")
        elif arg == "--overwrite":
            overwrite = True
        elif arg.startswith("-"):
            raise UserError(f"unknown option {arg}: expected --out, --overwrite, --help")
        else:
            (settings if OVERRIDE.match(arg) or arg.endswith((".yaml", ".yml")) else paths).append(arg)
    if len(paths) != 1:
        raise UserError(f"one file or folder to judge is expected, not {len(paths)}{': ' * bool(paths)}{paths or ''}")
    path = Path(expand(paths[0], "FILE"))
    inside = path / "rollouts"
    beside = (inside if inside.is_dir() else path).with_suffix(".judged.jsonl")
    return Options(path, Path(expand(out, "--out")) if out else beside, overwrite, settings_of(path, settings))


def settings_of(path: Path, given: Sequence[str]) -> Config:
    """The settings given; under them those of the run that `path` belongs to."""
    recorded: list[str] = []
    for file in (path / "config.yaml", path.parent / "config.yaml"):
        if path.is_dir() and file.is_file():
            config = read_config(file)
            for section in ("verify", "sandbox"):
                values = getattr(config, section).model_dump(mode="json", exclude_none=True)
                recorded += [f"{section}.{key}={value}" for key, value in values.items()]
            break
    return parse_args([*recorded, *given])


def judge_files(files: list[Path], of_a_run: bool, options: Options, tally: Tally) -> Path:
    """Judges all lines into OUT.part, which is returned. Raises UserError, OSError."""
    out, part = options.out, options.out.with_name(options.out.name + ".part")
    if not options.overwrite and out.exists():
        raise UserError(f"{out} exists: --overwrite writes it anew, --out names another")
    lines = read_lines(files, of_a_run, options.config.data)
    if options.overwrite:
        part.unlink(missing_ok=True)
    if not out.parent.is_dir():
        raise UserError(f"{out}: cannot be written (no folder {out.parent})")
    with ExitStack() as stack:
        file = stack.enter_context(part.open("ab"))
        os.truncate(part, go_on(part, lines, tally))
        bar = stack.enter_context(Bar(sum(f.stat().st_size for f in files), tally.read, options.path.name))
        judges = stack.enter_context(Judges(options.config.verify, options.config.sandbox, bar.say))
        for line, outcomes in judged(lines, judges):
            write(file, line, outcomes)
            told = tally.add(line, outcomes)
            if told and tally.bad + tally.failed <= MOST_NOTES:
                bar.warn(told)
            bar.advance(line.size, tally.answers)
    return part


def go_on(part: Path, lines: Iterator[Line], tally: Tally) -> int:
    """Count in what an ended judge has written, and pass it by in `lines`; the bytes of its whole lines."""
    kept = 0
    with part.open("rb") as file:
        for written in file:
            if not written.endswith(b"\n"):
                break  # it was ended in the midst of it
            line = next(lines, None)
            found = read_record(written)
            if line is None or found is None or json.dumps(plain(found)) != json.dumps(plain(line.record)):
                raise UserError(f"{part} was written from another input: remove it, or give --overwrite")
            tally.add(line, recorded(line, found))
            kept += len(written)
    if kept:
        note(f"going on after the {tally.lines} lines of {part}")
    return kept


def read_record(written: bytes) -> dict[str, Any] | None:
    with suppress(ValueError, RecursionError):
        found = json.loads(written)
        return found if isinstance(found, dict) else None
    return None


def recorded(line: Line, found: dict[str, Any]) -> list[Outcome]:
    """The outcomes as they were written."""
    inside = [found if a.index is None else found["corrections"][a.index] for a in line.answers]
    return [
        Judgement(r["verdict"], r["why"], r["seconds"]) if r["verdict"] else VerifierFailure(r["why"]) for r in inside
    ]


def judged(lines: Iterable[Line], judges: Judges) -> Iterator[tuple[Line, list[Outcome]]]:
    """Every line with what became of its answers, in order. Many are judged at once; a slow one holds up those after
    it only when there are `MOST_LINES` or `MOST_BYTES` of them."""
    waiting: deque[tuple[Line, list[Future[Judgement]]]] = deque()
    size = 0
    for line in lines:
        waiting.append((line, [submitted(judges, answer) for answer in line.answers]))
        size += line.size + line.row_size
        while waiting and (len(waiting) >= MOST_LINES or size >= MOST_BYTES or all(f.done() for f in waiting[0][1])):
            done, futures = waiting.popleft()
            yield done, [outcome(future) for future in futures]
            size -= done.size + done.row_size
    for done, futures in waiting:
        yield done, [outcome(future) for future in futures]


def submitted(judges: Judges, answer: Answer) -> Future[Judgement]:
    """What was cut off has no answer, as in training."""
    if not answer.truncated:
        return judges.submit(answer.row, answer.response)
    future: Future[Judgement] = Future()
    future.set_result(Judgement("unparsable", "cut off at the most tokens of an answer"))
    return future


def outcome(future: Future[Judgement]) -> Outcome:
    try:
        return future.result()
    except VerifierFailure as failure:
        return failure


def write(file: BinaryIO, line: Line, outcomes: list[Outcome]) -> None:
    """The line as it was, with what was found. Flushed, so that a judge that is killed loses nothing."""
    file.write(with_outcomes(line, outcomes) + b"\n")
    file.flush()


def with_outcomes(line: Line, outcomes: list[Outcome]) -> bytes:
    record = line.record
    added = not_judged("bad line", line.error) if line.error else as_added(outcomes[0])
    keys = {*ADDED, BEFORE, "corrections"}
    if record and not keys & set(record) and record != {"line": line.text}:  # nothing of the line is written anew
        return encoded(line.text.rstrip()[:-1] + ", " + json.dumps(added, ensure_ascii=False)[1:])
    kept = plain(record)
    for answer, found in zip(line.answers, outcomes, strict=True):
        if answer.index is not None:
            before = {BEFORE: answer.before} if "verdict" in record["corrections"][answer.index] else {}
            kept["corrections"][answer.index] |= before | as_added(found)
    before = {BEFORE: record["verdict"]} if "verdict" in record else {}
    return encoded(json.dumps({**kept, **before, **added}, ensure_ascii=False))


def as_added(found: Outcome) -> dict[str, Any]:
    if isinstance(found, VerifierFailure):
        return not_judged("not judged", str(found))
    return {"verdict": found.verdict, "why": found.why, "seconds": round(found.seconds, 4)}


def not_judged(fault: str, why: str) -> dict[str, Any]:
    return {"verdict": None, "why": why, "seconds": None, "fault": fault}


def encoded(text: str) -> bytes:
    """UTF-8, but where there is half a character: as JSON escapes."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return json.dumps(json.loads(text)).encode()


if __name__ == "__main__":
    raise SystemExit(main())
