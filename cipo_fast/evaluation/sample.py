"""Asks a policy: greedy, at T=1, and to check its own answers; a batch of problems at a time, each kept when whole.

Every seed is a function of (config.seed, the place of the batch's first problem, purpose): an evaluation that was
killed goes on at the first batch that is not in samples.jsonl, and ends as one that was not.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from cipo_fast.cipo.prompts import CorrectionPrompts
from cipo_fast.config import Config
from cipo_fast.config.settings import FUNCTION
from cipo_fast.distributed import from_main, on_main
from cipo_fast.errors import TrainingStopped, UserError
from cipo_fast.evaluation.records import SAMPLES, Answer, Chain, Record, answer_of, content_of, record_of
from cipo_fast.evaluation.report import REPORTS, Results, results_of, write_report
from cipo_fast.marking import failures_of, refuse_failures
from cipo_fast.records import Anchor, Group, Rollout
from cipo_fast.rollout import Sampling
from cipo_fast.run_dir import hash_files
from cipo_fast.sampling import Prompt, Sampler

SETTINGS = "settings.json"
AT_ONCE = 1024  # answers at T=1 in a batch, of each rank


@dataclass
class _Chain:
    """A chain while it grows. `newest`: the answer that the next round shows."""

    group: int  # place of its problem in the batch
    attempt: int
    prompt_ids: list[int]  # of the problem
    newest: Rollout
    answers: list[Answer | None]
    ended: str = ""


def evaluate(
    sampler: Sampler,
    prompts: Sequence[Prompt],
    correct: CorrectionPrompts,
    config: Config,
    folder: Path,
    about: dict[str, Any],
    pause: Callable[[], None] = lambda: None,
    progress: Callable[[int], None] = lambda done: None,
    anew: bool = True,
) -> Results:
    """Sample what `folder` does not hold yet, write the report there, and return it, on every rank. A collective.

    `about` names the model and whatever else makes this evaluation the one that it is: with other settings in `folder`
    it is begun anew, or (`anew` false) refused with a UserError. `pause` is called between batches' parts: it may raise
    to end the evaluation; `progress` hears how many problems are done. Answers that nobody could judge are left out and
    counted; more than verify.max_failed of them are a TrainingStopped, as is a folder that cannot be written.
    """
    settings = from_main(lambda: settings_of(config, prompts, about))
    size = max(1, AT_ONCE // config.eval.samples) * dist.get_world_size()
    most, total = config.verify.max_failed, len(prompts) * _asked(config)
    done, judged, failed = from_main(lambda: _writing(folder, lambda: _opened(folder, settings, prompts, size, anew)))
    for place in range(done, len(prompts), size):
        progress(place)
        records = sampled(sampler, prompts[place : place + size], correct, config, place, pause)
        judged += sum(1 for record in records for _ in record.answers)
        failed += _failures(records)
        if len(failed) > most * total:  # the rest cannot mend it
            refuse_failures(failed, judged + len(failed), most)
        on_main(lambda records=records: _writing(folder, lambda: _append(folder / SAMPLES, records)))  # type: ignore[misc]
    progress(len(prompts))

    def report() -> Results:
        results = results_of(folder, settings)
        refuse_failures(failed, results.answers + results.failed, most)
        write_report(folder, results)
        return results

    return from_main(lambda: _writing(folder, report))


def settings_of(config: Config, prompts: Sequence[Prompt], about: dict[str, Any]) -> dict[str, Any]:
    """What an evaluation's answers and their verdicts depend on, less the weights, which `about` names."""
    asked = repr([(p.problem.id, p.token_ids, p.problem.row) for p in prompts])
    functions = {Path(found["file"]) for p in prompts if (found := FUNCTION.fullmatch(p.problem.verifier))}
    return {
        **about,
        "n": config.eval.samples,
        "checked": min(config.eval.checked, config.eval.samples),
        "checks": config.eval.checks,
        "shown": "the newest answer",  # in each of them; once the conversation went on: such samples are not continued
        "temperature": 1.0,
        "max_tokens": config.eval.max_tokens,
        "correction": config.correction.model_dump(
            include={"layout", "followup", "verdict", "max_prompt_tokens"}, mode="json"
        ),
        "seed": config.seed,
        "ranks": dist.get_world_size(),
        "problems": len(prompts),
        "problems_sha256": hashlib.sha256(asked.encode(errors="surrogatepass")).hexdigest()[:16],
        **({"functions_sha256": hash_files(sorted(functions))} if functions else {}),
    }


def sampled(
    sampler: Sampler,
    prompts: Sequence[Prompt],
    correct: CorrectionPrompts,
    config: Config,
    place: int,
    pause: Callable[[], None],
) -> list[Record]:
    """A batch of problems, the first of which has that place among all."""
    started = time.perf_counter()
    n = config.eval.samples
    greedy = sampler.groups(prompts, 1, Sampling(0.0, 1.0, config.eval.max_tokens), place, "eval-greedy")
    pause()
    sampling = Sampling(1.0, 1.0, config.eval.max_tokens)
    groups = sampler.groups(prompts, n, sampling, place, "eval")
    pause()
    chains = [
        _Chain(g, i, rollout.prompt_ids, rollout, [])
        for g, group in enumerate(groups)
        for i, rollout in enumerate(group.rollouts[: config.eval.checked])
    ]
    failures: list[list[str]] = [failures_of([one, many]) for one, many in zip(greedy, groups, strict=True)]
    for r in range(1, config.eval.checks + 1):
        _check(sampler, chains, correct, sampling, place, r, failures)
        pause()
    sampler.take_times()
    seconds = (time.perf_counter() - started) / len(prompts)
    return [
        _record(greedy[g], group, [c for c in chains if c.group == g], failures[g], config, seconds)
        for g, group in enumerate(groups)
    ]


def _check(
    sampler: Sampler,
    chains: list[_Chain],
    correct: CorrectionPrompts,
    sampling: Sampling,
    place: int,
    r: int,
    failures: list[list[str]],
) -> None:
    """Round `r`: every chain that goes on is shown its newest answer, in the place of the first one, and gets the next:
    the check that training trains, again."""
    asked: list[tuple[_Chain, Anchor]] = []
    longest = sampler.engine.max_model_len
    for chain in chains:
        chain.answers.append(None)
        if chain.ended:
            continue
        prompt = None if chain.newest.truncated else correct(chain.newest)
        if chain.newest.truncated:
            chain.ended = "truncated"
        elif prompt is None or (longest is not None and _length(chain.newest, *prompt) >= longest):
            chain.ended = "too long"
        else:
            asked.append((chain, Anchor(chain.newest, chain.group, chain.attempt, *prompt)))
    sampler.correct([anchor for _, anchor in asked], 1, sampling, place, f"eval-check-{r}")
    for chain, anchor in asked:
        failures[chain.group] += anchor.failures
        if anchor.corrections:
            chain.newest = replace(anchor.corrections[0], prompt_ids=chain.prompt_ids)
            chain.answers[-1] = answer_of(chain.newest)
        else:
            chain.ended = "failed"


def _length(rollout: Rollout, prompt_ids: list[int], glue_ids: list[int] | None) -> int:
    return len(prompt_ids) + (0 if glue_ids is None else len(rollout.token_ids) + len(glue_ids))


def _record(
    greedy: Group, group: Group, chains: list[_Chain], failures: list[str], config: Config, seconds: float
) -> Record:
    problem = group.problem
    return Record(
        problem=problem.id,
        source=problem.source,
        n=config.eval.samples,
        checks=config.eval.checks,
        greedy=answer_of(greedy.rollouts[0]) if greedy.rollouts else None,
        attempts=[answer_of(rollout) for rollout in group.rollouts],
        chains=[Chain(c.attempt, c.answers, c.ended) for c in chains],  # type: ignore[arg-type]
        failed=len(failures),
        failure=failures[0] if failures else "",
        content=content_of(problem),
        seconds=seconds,
    )


def _asked(config: Config) -> int:
    """Most answers to a problem."""
    return 1 + config.eval.samples + min(config.eval.checked, config.eval.samples) * config.eval.checks


# ------------------------------------------------------------------------------------------------- the first rank's


def _writing(folder: Path, act: Callable[[], Any]) -> Any:
    try:
        return act()
    except OSError as error:
        raise TrainingStopped(f"{folder} cannot be written ({error})") from None


def _opened(
    folder: Path, settings: dict[str, Any], prompts: Sequence[Prompt], size: int, anew: bool
) -> tuple[int, int, list[str]]:
    """(problems that are done, their answers that were judged, a line for each of the others). What is no whole batch,
    a torn last line among it, is cut off."""
    recorded = _read(folder / SETTINGS)
    if recorded is not None and recorded != settings and not anew:
        keys = [key for key in recorded.keys() | settings.keys() if recorded.get(key) != settings.get(key)]
        raise UserError(
            f"{folder} holds an evaluation of other settings ({', '.join(sorted(keys))}); name another --out"
        )
    if recorded != settings:
        folder.mkdir(parents=True, exist_ok=True)
        for name in (SAMPLES, *REPORTS):
            (folder / name).unlink(missing_ok=True)
        part = folder / f"{SETTINGS}.part"
        part.write_text(json.dumps(settings, indent=1), encoding="utf-8")
        part.rename(folder / SETTINGS)
    samples = folder / SAMPLES
    lines = samples.read_bytes().split(b"\n")[:-1] if samples.exists() else []
    kept: list[Record] = []
    for line, prompt in zip(lines, prompts, strict=False):
        try:
            record = record_of(line)
        except ValueError:
            break
        if record.problem != prompt.problem.id:
            break
        kept.append(record)
    whole = len(kept) if len(kept) == len(prompts) else len(kept) // size * size
    with samples.open("ab") as file:
        file.truncate(sum(len(line) + 1 for line in lines[:whole]))
    return whole, sum(1 for record in kept[:whole] for _ in record.answers), _failures(kept[:whole])


def _failures(records: Sequence[Record]) -> list[str]:
    """A line for each answer that nobody could judge, each problem's first for all of its own."""
    return [line for record in records for line in [record.failure] * record.failed]


def _read(path: Path) -> dict[str, Any] | None:
    """None where there is none that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _append(path: Path, records: list[Record]) -> None:
    """A batch at once, to the disk."""
    with path.open("ab") as file:
        file.write("".join(record.line() for record in records).encode(errors="surrogatepass"))
        file.flush()
        os.fsync(file.fileno())
