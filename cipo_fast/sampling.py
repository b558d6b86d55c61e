"""Engine and judges together: problems -> groups of judged rollouts, anchors -> judged corrections."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch.distributed as dist

from cipo_fast.chat import Chat
from cipo_fast.cipo.nudge import Hint
from cipo_fast.cipo.prompts import CorrectionPrompts
from cipo_fast.config import Config
from cipo_fast.distributed import gather, share, together
from cipo_fast.errors import UserError
from cipo_fast.marking import Marking
from cipo_fast.records import Anchor, Group, Problem, Rollout
from cipo_fast.rollout import Engine, Sampling
from cipo_fast.tasks import Dataset, Say, epoch_rows, quiet
from cipo_fast.verify.judging import at_once
from cipo_fast.verify.workers.pool import Judges


def seed_for(seed: int, step: int, purpose: str, rank: int = 0) -> int:
    """A seed for one purpose of one step: with no generator carried from step to step, a resumed run is the same."""
    words = [seed, step, rank, *purpose.encode()]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> 1)


@dataclass(frozen=True)
class Prompt:
    """A problem and its prompt, as the policy sees it: alone, and with each of its hints after it, by their places."""

    problem: Problem
    token_ids: list[int]
    hinted: Mapping[int, list[int]] = field(default_factory=dict)


def encode_prompts(problems: Sequence[Problem], chat: Chat, hints: bool = False) -> list[Prompt]:
    """Raises UserError, naming the first row and counting the others, where the template cannot take one."""
    prompts, errors = [], []
    for problem in problems:
        where = problem.where or problem.id
        try:
            prompt = Prompt(problem, chat.prompt(problem.messages, where))
            prompts.append(replace(prompt, hinted=_hinted(problem, chat, where)) if hints else prompt)
        except UserError as error:
            errors.append(str(error))
    if errors:
        more = len(errors) - 1
        raise UserError(errors[0] + (f" (and {more} more row{'s' * (more > 1)})" if more else ""))
    return prompts


def _hinted(problem: Problem, chat: Chat, where: str) -> dict[int, list[int]]:
    *before, last = problem.messages
    return {
        i: chat.prompt([*before, {**last, "content": f"{last['content']}\n\n{hint}"}], f"{where}: field 'hints[{i}]'")
        for i, hint in enumerate(problem.hints)
    }


def fitting_hints(prompts: list[Prompt], config: Config, say: Say) -> list[Prompt]:
    """Prompts with the hints that fit in `data.max_prompt_tokens`. Says how many problems have fewer than nudge.hints
    of them, and so are sampled bare; none having as many is an error."""
    limit, m = config.data.max_prompt_tokens, config.nudge.hints
    if m == 0:
        return prompts
    found = [replace(p, hinted={i: ids for i, ids in p.hinted.items() if len(ids) <= limit}) for p in prompts]
    bare = sum(len(p.hinted) < m for p in found)
    if bare == len(found):
        raise UserError(
            f"nudge.hints={m}: no row of data.train has a field 'hints' with as many texts that fit in "
            f"data.max_prompt_tokens={limit}"
        )
    if bare:
        say(f"data.train: {bare} of {len(found)} problems have fewer than nudge.hints={m} hints: sampled without")
    return found


def fitting(prompts: list[Prompt], limit: int, what: str, say: Say) -> list[Prompt]:
    """Prompts of at most `limit` tokens; longer ones are dropped and counted, all of them being longer is an error."""
    kept = [p for p in prompts if len(p.token_ids) <= limit]
    if not kept:
        shortest = min(len(p.token_ids) for p in prompts)
        raise UserError(
            f"{what}: every prompt is longer than data.max_prompt_tokens={limit}, the shortest has {shortest}; raise it"
        )
    if len(kept) < len(prompts):
        dropped = len(prompts) - len(kept)
        say(f"{what}: {dropped} of {len(prompts)} prompts dropped, longer than data.max_prompt_tokens={limit}")
    return kept


def count_unreachable(prompts: Sequence[Prompt], chat: Chat, what: str, limit: tuple[str, int], say: Say) -> None:
    """Say how many answers no attempt can give: with their end of turn longer than `limit` (setting, tokens), or not
    what their tokens decode to. All of them being longer is an error. It is asked of exact answers, which an attempt
    has to give word for word."""
    setting, most = limit
    prompts = [p for p in prompts if p.problem.verifier == "exact"]
    if not prompts:
        return
    answers = [chat.answer(p.problem.answer) for p in prompts]
    longer = [p.problem for p, ids in zip(prompts, answers, strict=True) if len(ids) > most]
    if len(longer) == len(answers):
        shortest = min(map(len, answers))
        raise UserError(
            f"{what}: every answer is longer than {setting}={most}, the shortest has {shortest} tokens; raise it"
        )
    changed = [p.problem for p, ids in zip(prompts, answers, strict=True) if not _gives(p.problem, chat.text(ids))]
    for found, why in ((longer, f"longer than {setting}={most}"), (changed, "changed by the tokenizer")):
        if found:
            first = found[0].where or found[0].id
            say(f"{what}: {len(found)} of {len(answers)} answers are {why}, so never right (first: {first})")


def _gives(problem: Problem, text: str) -> bool:
    judgement = at_once(problem.row, text)
    return judgement is not None and judgement.verdict == "right"


def encode_dataset(dataset: Dataset, chat: Chat, config: Config, say: Say) -> tuple[list[Prompt], list[Prompt]]:
    """(training, held-out) prompts, the long ones among them: an engine may lower the limit. What rows, template and
    limits cannot stand is refused here, before one starts."""
    found = []
    for problems, what, limit in (
        (dataset.train, "data.train", ("rollout.max_tokens", config.rollout.max_tokens)),
        (dataset.held_out, "held-out problems", ("eval.max_tokens", config.eval.max_tokens)),
    ):
        hints = config.nudge.hints > 0 and problems is dataset.train
        prompts = encode_prompts(problems, chat, hints)
        found.append(prompts)
        if not prompts:  # an evaluation has no training problems
            continue
        kept = fitting(prompts, config.data.max_prompt_tokens, what, quiet)
        if hints:
            fitting_hints(kept, config, quiet)
        count_unreachable(kept, chat, what, limit, say)
    CorrectionPrompts(chat, config.correction)
    return found[0], found[1]


def prompts_of_step(prompts: list[Prompt], config: Config, step: int) -> list[Prompt]:
    """B prompts: every epoch is a permutation of its own, and a step's place in it follows from its number. Rows of a
    weight other than 1 stand in an epoch more or less often (tasks/epochs.py)."""
    b, weights = config.rollout.prompts_per_step, [prompt.problem.weight for prompt in prompts]
    size = len(epoch_rows(weights, config.seed, 0))
    found: list[Prompt] = []
    for i in range((step - 1) * b, step * b):
        epoch, place = divmod(i, size)
        if not found or place == 0:
            rows = epoch_rows(weights, config.seed, epoch)
            order = np.random.default_rng(seed_for(config.seed, epoch, "order")).permutation(size)
        found.append(prompts[rows[order[place]]])
    return found


@dataclass
class Sampler:
    """Samples, and has answers judged as they finish; work is shared between ranks, and every rank gets all of the
    result. What stops one rank stops all. Answers that could not be judged are left out, with a line each in
    `failures`. `group` is for a sampler in a thread, whose collectives must not meet the trainer's."""

    engine: Engine
    chat: Chat
    seed: int
    judges: Judges
    group: dist.ProcessGroup | None = None
    generate_s: float = field(default=0.0, init=False)  # seconds since `take_times`
    verify_s: float = field(default=0.0, init=False)  # waited for verdicts when all was generated
    prefix_counts: tuple[int, int] = field(default=(0, 0), init=False)  # at the last `take_prefix_hit_rate`

    def groups(self, prompts: Sequence[Prompt], n: int, sampling: Sampling, step: int, purpose: str) -> list[Group]:
        mine = share(prompts)
        found = self._judged([p.token_ids for p in mine], [p.problem for p in mine], n, sampling, step, purpose)
        groups = [Group(p.problem, p.token_ids, *judged) for p, judged in zip(mine, found, strict=True)]
        return gather(groups, self.group)

    def nudged(
        self, prompts: Sequence[Prompt], hints: Sequence[list[Hint]], sampling: Sampling, step: int, purpose: str
    ) -> list[Group]:
        """`groups` whose rollout i was sampled with the hint hints[prompt][i] after the problem, or without one."""
        mine = share(list(zip(prompts, hints, strict=True)))
        asked = [(p, hint) for p, seen in mine for hint in seen]
        contexts = [p.token_ids if hint is None else p.hinted[hint] for p, hint in asked]
        found = self._judged(contexts, [p.problem for p, _ in asked], 1, sampling, step, purpose)
        groups = [Group(p.problem, p.token_ids, []) for p, _ in mine]
        owners = [group for group, (_, seen) in zip(groups, mine, strict=True) for _ in seen]
        for group, (_, hint), (rollouts, failures) in zip(owners, asked, found, strict=True):
            group.rollouts += [replace(rollout, hint=hint) for rollout in rollouts]
            group.failures += failures
        return gather(groups, self.group)

    def correct(self, anchors: list[Anchor], n: int, sampling: Sampling, step: int, purpose: str) -> None:
        """Give every anchor its `n` corrections, as far as they could be judged."""
        mine = share(anchors)
        contexts = [
            a.prompt_ids if a.glue_ids is None else a.prompt_ids + a.rollout.token_ids + a.glue_ids for a in mine
        ]
        found = self._judged(contexts, [a.rollout.problem for a in mine], n, sampling, step, purpose)
        for anchor, judged in zip(anchors, gather(found, self.group), strict=True):
            anchor.corrections, anchor.failures = judged

    def take_times(self) -> tuple[float, float]:
        """(generate, verify) seconds since the last call."""
        times = self.generate_s, self.verify_s
        self.generate_s = self.verify_s = 0.0
        return times

    def take_prefix_hit_rate(self) -> float | None:
        """Share of prompt tokens found in this rank's prefix cache since the last call; None when there is no telling:
        without a cache, and when the engine was restarted meanwhile or does not say."""
        counts = self.engine.prefix_cache()
        if counts is None:
            return None
        looked_up, found = counts
        before, self.prefix_counts = self.prefix_counts, counts
        return (found - before[1]) / (looked_up - before[0]) if looked_up > before[0] and found >= before[1] else None

    def _judged(
        self, prompts: list[list[int]], problems: list[Problem], n: int, sampling: Sampling, step: int, purpose: str
    ) -> list[tuple[list[Rollout], list[str]]]:
        """Of each prompt the rollouts that were judged, and a line for each of the others."""
        marking = Marking(self.judges, self.chat, problems)
        started = time.perf_counter()
        seed = seed_for(self.seed, step, purpose, dist.get_rank())
        sampled = self.engine.generate(prompts, n, sampling, seed, marking.finished)
        self.generate_s += time.perf_counter() - started

        def collect() -> list[tuple[list[Rollout], list[str]]]:
            started = time.perf_counter()
            marking.submit(sampled)
            found = [marking.rollouts(i, ids, sampled[i]) for i, ids in enumerate(prompts)]
            self.verify_s += time.perf_counter() - started
            return found

        return together(collect, self.group)
