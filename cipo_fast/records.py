"""What flows through a step: Problem -> Rollout -> Anchor -> correction Rollouts."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

Message = dict[str, str]  # {"role": "user" | "assistant" | "system", "content": text}
STREAMS = ("rollout", "correction")  # of answers, each with its own normaliser


@dataclass(frozen=True)
class Problem:
    """One question and what its verifier needs.

    `verifier` is `exact`, `math`, `code` or `path/to/file.py:function`; `answer` the text that exact and math compare
    with ("" where there is none); `fields` all else that the verifier reads, plain JSON: tests, policies, a row as it
    stood in its file. `where` is what an error calls it: file and line. `weight`: how often an epoch has it. `hints`:
    how it may be solved; no verifier reads them."""

    id: str
    messages: tuple[Message, ...]
    answer: str
    source: str
    where: str = field(default="", compare=False)
    verifier: str = "exact"
    fields: Mapping[str, Any] = field(default_factory=dict, hash=False)
    weight: float = field(default=1.0, compare=False)
    hints: tuple[str, ...] = field(default=(), compare=False)

    @cached_property
    def row(self) -> dict[str, Any]:
        """What verify/ judges an answer by: the same as a line of the judge's input, less its response. One object for
        all answers, so that it is encoded for workers once; it is not changed."""
        return {"answer": self.answer, **self.fields, "verifier": self.verifier}

    @property
    def content(self) -> tuple[tuple[str, str], ...]:
        """What is asked, in a form that can be compared: (role, text) of each message."""
        return tuple((m["role"], m["content"]) for m in self.messages)


@dataclass(frozen=True)
class Completion:
    """One sampled answer as the engine made it.

    token_ids include the end-of-turn token unless `truncated`; logps are the engine's own log-probs of those ids,
    at the sampling temperature, natural log.
    """

    token_ids: list[int]
    logps: list[float]
    truncated: bool
    policy_version: int


@dataclass
class TokenStats:
    """What the trainer saw of an answer's tokens, before the update that learns from them: log-probs at the sampling
    temperature and entropies, natural log. Empty where the step measured nothing (train.measure_every)."""

    logps: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)


@dataclass
class Rollout:
    """A verified completion of `prompt_ids`. A correction is a rollout whose prompt is a correction prompt."""

    problem: Problem
    prompt_ids: list[int]
    token_ids: list[int]
    sampler_logps: list[float]
    text: str
    reward: float
    truncated: bool
    policy_version: int
    verdict: str = ""  # right, wrong, unparsable or timeout
    why: str = ""
    hint: int | None = None  # which of the problem's hints `prompt_ids` has after the problem
    advantage: float | None = None  # what training gave it; None before, and where only cross-entropy learns from it
    tokens: TokenStats | None = None  # of the answers that run.save_tokens has room for


@dataclass
class Group:
    """G rollouts of one problem; fewer, where some could not be judged: `failures` has a line for each of those.
    `prompt_ids` are the problem's without a hint."""

    problem: Problem
    prompt_ids: list[int]
    rollouts: list[Rollout]
    failures: list[str] = field(default_factory=list)


@dataclass
class Anchor:
    """A rollout shown back to the policy. `glue_ids` follow the attempt in layout=followup; in layout=quoted the
    attempt is inside `prompt_ids` and `glue_ids` is None."""

    rollout: Rollout
    group: int  # index of its group in the step's batch
    index: int  # index of the rollout in its group
    prompt_ids: list[int]
    glue_ids: list[int] | None
    corrections: list[Rollout] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)  # of corrections that could not be judged

    @property
    def right(self) -> bool:
        return self.rollout.reward > 0


@dataclass(eq=False)
class Segment:
    """A run of tokens that conversations may share. Sharing is by identity, never by content: two equal rollouts
    stay two segments."""

    token_ids: list[int]


@dataclass(eq=False)
class Conversation:
    """One sampled answer to learn from: `segments[:-1]` is its context, `segments[-1]` the sampled tokens, its targets.

    advantage, rl_weight and ce_weight hold for each of the targets; the weights already hold every normaliser, so a
    loss is a plain sum over targets.
    """

    segments: tuple[Segment, ...]
    sampler_logps: list[float] | None  # None: not sampled by an engine (supervised)
    stream: str  # of STREAMS
    advantage: float
    rl_weight: float
    ce_weight: float


def blank(text: str) -> bool:
    """Nothing to see: whitespace, control and zero-width characters."""
    return all(c.isspace() or unicodedata.category(c) in ("Cc", "Cf") for c in text)
