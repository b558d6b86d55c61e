"""Answers judged beside generation: each as it comes to its end, not after the last one."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

from cipo_fast.chat import Chat
from cipo_fast.config import Config
from cipo_fast.errors import TrainingStopped
from cipo_fast.records import Anchor, Completion, Group, Problem, Rollout
from cipo_fast.tasks import Say
from cipo_fast.verify import Judgement, VerifierFailure
from cipo_fast.verify.workers.pool import Judges


def build_judges(config: Config, say: Say) -> Judges:
    """This rank's judges: a node's workers are shared among its ranks."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    verify = config.verify.model_copy(update={"workers": max(1, workers_of_node(config) // ranks)})
    return Judges(verify, config.sandbox, say)


def workers_of_node(config: Config) -> int:
    return config.verify.workers or len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class _Answer:
    text: str
    judgement: Future[Judgement]


class Marking:
    """The answers of one call to an engine, `problems` being those of its prompts. Equal answers to a prompt are judged
    once, however often an engine tells of them."""

    def __init__(self, judges: Judges, chat: Chat, problems: Sequence[Problem]):
        self.judges = judges
        self.chat = chat
        self.problems = problems
        self.answers: dict[tuple[int, tuple[int, ...]], _Answer] = {}
        self.lock = threading.Lock()

    def finished(self, prompt: int, token_ids: list[int]) -> None:
        """Have an answer judged, if it is not already. From any thread; returns at once."""
        self._answer(prompt, token_ids)

    def submit(self, sampled: Sequence[Sequence[Completion]]) -> None:
        """What an engine has not told of, before any of it is waited for."""
        for prompt, completions in enumerate(sampled):
            for completion in completions:
                if not completion.truncated:
                    self._answer(prompt, completion.token_ids)

    def rollout(self, prompt: int, prompt_ids: list[int], completion: Completion) -> Rollout:
        """The completion with its verdict, waited for. Raises VerifierFailure. What was cut off has no answer."""
        problem, ids = self.problems[prompt], completion.token_ids
        if completion.truncated:
            text, found = self.chat.text(ids), Judgement("unparsable", f"cut off at {len(ids)} tokens")
        else:
            answer = self._answer(prompt, ids)
            text, found = answer.text, answer.judgement.result()
        make = partial(Rollout, problem, prompt_ids, ids, completion.logps, text)
        return make(found.reward, completion.truncated, completion.policy_version, found.verdict, found.why)

    def rollouts(
        self, prompt: int, prompt_ids: list[int], completions: Sequence[Completion]
    ) -> tuple[list[Rollout], list[str]]:
        """(those that were judged, a line for each of the others)."""
        judged, failures = [], []
        for completion in completions:
            try:
                judged.append(self.rollout(prompt, prompt_ids, completion))
            except VerifierFailure as failure:
                problem = self.problems[prompt]
                failures.append(f"{problem.where or problem.id}: {failure}")
        return judged, failures

    def _answer(self, prompt: int, token_ids: list[int]) -> _Answer:
        key = (prompt, tuple(token_ids))
        with self.lock:
            if key not in self.answers:
                text = self.chat.text(token_ids)
                self.answers[key] = _Answer(text, self.judges.submit(self.problems[prompt].row, text))
            return self.answers[key]


def failures_of(groups: Sequence[Group], anchors: Sequence[Anchor] = ()) -> list[str]:
    """A line for each answer that nobody could judge."""
    return [line for members in (groups, anchors) for member in members for line in member.failures]


def refuse_failures(failures: Sequence[str], answers: int, most: float) -> None:
    """TrainingStopped where more than the share `most` of so many answers could not be judged, or none could."""
    if failures and (len(failures) > most * answers or len(failures) == answers):
        raise TrainingStopped(
            f"{len(failures)} of {answers} answers could not be judged (verify.max_failed={most:g}); the first: "
            f"{failures[0]}"
        )
