"""What is asked of verifiers and rows before a run begins: is there a sandbox, does it pay for exploits, does every row
take its own gold?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from cipo_fast.config import Config
from cipo_fast.distributed import from_main, on_main, together
from cipo_fast.errors import TrainingStopped, UserError
from cipo_fast.golds import without_bad_golds
from cipo_fast.marking import workers_of_node
from cipo_fast.records import Problem
from cipo_fast.tasks import Say, load_dataset
from cipo_fast.verify.workers.pool import Judges

SMALL = 2**26  # bytes of training data that a dry run reads


def planned(config: Config) -> list[str]:
    """What `--dry-run` says of verifiers: which judge, within what limits, and which sandbox works here."""
    v, s = config.verify, config.sandbox
    verifiers = _verifiers(config)
    named = ", ".join(verifiers) or "what the rows name or their form implies (data.verifier names one for all)"
    lines = [f"answers are judged by {named}"]
    if set(verifiers) != {"exact"}:
        limits = f"{v.timeout_s:g} s and {v.memory_mib} MiB each"
        lines.append(f"{workers_of_node(config)} at once on a node, {limits}; programs have their sandbox's")
    if verifiers and not any(name.startswith("code") for name in verifiers):
        return lines
    try:
        from cipo_fast.verify.sandbox import choose

        lines.append(choose(s).describe())
    except UserError as error:
        lines.append(f"a run with programs would be refused: {error}")
    return [
        *lines,
        f"an execution has {s.cpu_s:g} s of CPU time, {s.wall_s or 3 * s.cpu_s:g} s by the clock, {s.memory_mib} MiB, "
        f"{s.processes} processes, {s.file_mib} MiB of files, {s.output_kib} KiB of output; an answer {s.answer_s:g} s",
    ]


def _verifiers(config: Config) -> list[str]:
    """By their names and, where the training data is read for it, rows; [] where it is not."""
    if config.data.train is None:
        return ["exact"]
    if config.data.verifier is not None:
        return [config.data.verifier]
    sources = config.data.sources("train")
    files = [source for source in sources if isinstance(source, Path)]
    if len(files) < len(sources) or sum(file.stat().st_size for file in files) > SMALL:
        return []
    try:
        counts = Counter(problem.verifier for problem in load_dataset(config).train)
    except UserError:  # a run says it
        return []
    return [name if len(counts) == 1 else f"{name} ({n:,} rows)" for name, n in counts.most_common()]


def prepare_judges(judges: Judges, problems: Iterable[Problem]) -> bool:
    """Import the user's own verifiers of these problems, and choose and say the sandbox where there are programs to
    run: whether there are. Raises UserError where a verifier does not load or no sandbox works. A collective."""
    verifiers = sorted({problem.verifier for problem in problems})
    together(lambda: judges.load(verifiers))
    if "code" in verifiers:
        together(judges.choose_tier)
    return "code" in verifiers


def refuse_exploits(judges: Judges, problems: Iterable[Problem], say: Say) -> None:
    """Have exploits judged by the verifiers of the problems, as far as they are ours. TrainingStopped where one is
    paid, or an honest answer is not. A collective."""
    from cipo_fast.audit.canaries import BUILT_IN, failures, run_canaries

    verifiers = {problem.verifier for problem in problems}

    def judge() -> None:
        failed = failures(run_canaries(judges, [name for name in BUILT_IN if name in verifiers], say))
        if failed:
            names = ", ".join(canary.name for canary, _ in failed[:3])
            raise TrainingStopped(
                f"{len(failed)} canaries failed ({names}): what the verifiers pay for would be learned; "
                "`python -m cipo_fast.audit` tells more"
            )

    on_main(judge)


def with_good_golds(problems: list[Problem], judges: Judges, say: Say) -> list[Problem]:
    """The training problems whose gold is right by their own verifier; `say` hears of the others. Raises UserError
    where none is. A collective."""
    if all(problem.verifier == "exact" for problem in problems):
        return problems
    kept = set(from_main(lambda: [problem.id for problem in without_bad_golds(problems, judges, say)]))
    return [problem for problem in problems if problem.id in kept]
