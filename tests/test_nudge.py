"""NudgeRL, alone and beside corrections: its formulas by hand and by a reference in fp64, its prompts, its runs.

The reference shares no code with the trainer: every conversation is a padded row of a stock model with its own
attention. It takes the judged rollouts and writes the whole loss down once more.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_cipo import CHAT
from test_grpo_reference import (
    TOLERANCE,
    Row,
    Seen,
    context_of,
    correction_rows,
    cross_entropy,
    fp64_model,
    log_probs,
    rl,
    sampled,
    trainers_gradients,
)
from torch import Tensor

from cipo_fast.cipo.metrics import correction_gap, nudge_metrics
from cipo_fast.cipo.nudge import draw_hints, nudge_advantages, prompt_segments
from cipo_fast.cipo.objective import conversations, left_out
from cipo_fast.config import Config, NudgeConfig, load_config
from cipo_fast.embedded import hints
from cipo_fast.errors import UserError
from cipo_fast.packing import build_trees, row_tokens
from cipo_fast.records import Anchor, Group, Problem
from cipo_fast.sampling import encode_dataset, encode_prompts, fitting_hints
from cipo_fast.tasks import Dataset
from cipo_fast.tasks.problems import read_problems

NUDGE = ["nudge.hints=2", "loss.eps_high=0.2", "loss.advantage_eps=1e-5"]

# ------------------------------------------------------------------------------------------------------ by hand


def test_advantages_by_hand() -> None:
    """Two bare rollouts and two of each hint: m = 4/6, m_0 = 1, m_1 = 1/2."""
    rewards, hints, m = np.array([1.0, 0, 1, 1, 1, 0]), [None, None, 0, 0, 1, 1], 4 / 6
    a = np.array([1 - m, -m, 1.1 * (1 - m), 1.1 * (1 - m), 0.5 + 1.1 * (0.5 - m), -0.5 + 1.1 * (0.5 - m)])
    expected = (a - a.mean()) / (np.sqrt(((a - a.mean()) ** 2).mean()) + 1e-5)
    found = nudge_advantages(rewards, hints, between=1.1, scale=True, eps=1e-5)
    assert found == pytest.approx(expected, abs=1e-12)
    assert found.sum() == pytest.approx(0, abs=1e-12)
    unscaled = nudge_advantages(rewards, hints, between=1.1, scale=False, eps=1e-5)
    assert unscaled == pytest.approx(a - a.mean(), abs=1e-12)
    assert (nudge_advantages(np.ones(6), hints, between=1.1, scale=True, eps=1e-5) == 0).all()


def test_hints_that_part_the_rewards_teach_by_between_alone() -> None:
    rewards, hints = np.array([1.0, 1, 0, 0]), [0, 0, 1, 1]
    assert (nudge_advantages(rewards, hints, between=0.0, scale=True, eps=1e-5) == 0).all()
    assert nudge_advantages(rewards, hints, between=2.0, scale=False, eps=1e-5).tolist() == [1, 1, -1, -1]


def test_slots_are_the_hints_less_a_binomial_share() -> None:
    config, rng = NudgeConfig(hints=2, dropout=0.5), np.random.default_rng(0)
    drawn = [draw_hints([0, 1, 2], 8, config, rng) for _ in range(4000)]
    assert {len(hints) for hints in drawn} == {8}
    assert {hint for hints in drawn for hint in hints} == {None, 0, 1}
    of_first = np.array([hints.count(0) for hints in drawn])  # 4 - Binomial(4, 1/2): mean 2, variance 1
    assert of_first.mean() == pytest.approx(2, abs=0.06)
    assert of_first.var() == pytest.approx(1, abs=0.1)
    assert draw_hints([0, 1], 8, NudgeConfig(hints=2, dropout=0), rng) == [0] * 4 + [1] * 4
    assert draw_hints([0, 1], 8, NudgeConfig(hints=2, dropout=1), rng) == [None] * 8
    assert draw_hints([3], 8, config, rng) == [None] * 8
    random = NudgeConfig(hints=2, dropout=0, choose="random")
    seen = {tuple(sorted(set(draw_hints([1, 4, 7], 4, random, rng)))) for _ in range(60)}
    assert seen == {(1, 4), (1, 7), (4, 7)}


# -------------------------------------------------------------------------------------------------- hints are data


def problem(i: int, hints: tuple[str, ...]) -> Problem:
    return Problem(f"p{i}", ({"role": "user", "content": f"what {i}"},), "yes", "t", f"file:{i}", hints=hints)


def test_hints_follow_the_problem_in_its_turn() -> None:
    config = load_config([], [*NUDGE, "rollout.samples_per_prompt=4"])
    said: list[str] = []
    prompts = encode_prompts([problem(0, ("try yes", "no", "long" * 50)), problem(1, ("one",))], CHAT, hints=True)
    found = fitting_hints(prompts, config, said.append)
    assert [list(p.hinted) for p in found] == [[0, 1], [0]]  # 64 tokens are most
    shown = CHAT.prompt([{"role": "user", "content": "what 0\n\ntry yes"}], "")
    assert found[0].hinted[0] == shown
    assert said == ["data.train: 1 of 2 problems have fewer than nudge.hints=2 hints: sampled without"]
    with pytest.raises(UserError, match=r"no row of data\.train has a field 'hints'"):
        fitting_hints(prompts[1:], config, said.append)
    with pytest.raises(UserError, match=r"no row of data\.train has a field 'hints'"):  # before an engine starts
        encode_dataset(Dataset([problem(1, ("one",))], [problem(2, ())]), CHAT, config, said.append)
    with pytest.raises(UserError, match=r"file:2: field 'hints\[1\]': the text spells the control token"):
        encode_prompts([problem(2, ("a", "<|end|>"))], CHAT, hints=True)
    assert fitting_hints(prompts, load_config([], []), said.append) is prompts


@pytest.mark.parametrize(
    ("hints", "error"),
    [
        ('"sort"', "rows.jsonl:2: field 'hints' is not a list of texts"),
        ('["a", 5]', r"rows.jsonl:2: field 'hints\[1\]' is not text"),
        ('["  "]', r"rows.jsonl:2: field 'hints\[0\]' is blank"),
    ],
)
def test_a_bad_field_is_named(hints: str, error: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    row = '{"prompt": "q", "answer": "a"'
    path.write_text(f'{row}, "hints": ["b", "c"]}}\n{row}, "hints": {hints}}}\n', encoding="utf-8")
    with pytest.raises(UserError, match=error):
        read_problems(path)
    path.write_text(f'{row}, "hints": ["b", "c"]}}\n{row}, "hints": null}}\n{row}}}\n', encoding="utf-8")
    problems = read_problems(path)
    assert [p.hints for p in problems] == [("b", "c"), (), ()]
    assert all("hints" not in p.row for p in problems)


def test_parquet_and_other_forms_have_hints(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "rows.parquet"
    rows = [{"question": "q", "answer": "#### 4", "hints": ["two twos"]}]
    parquet.write_table(pa.Table.from_pylist(rows), path)
    assert [p.hints for p in read_problems(path)] == [("two twos",)]


def test_rollouts_that_cannot_be_shared_out_are_refused() -> None:
    with pytest.raises(UserError, match=r"rollout\.samples_per_prompt=8 is no multiple of nudge.hints=3"):
        load_config([], ["nudge.hints=3"])


# ------------------------------------------------------------------------------------------- trees, and a reference


def batch(config: Config) -> tuple[list[Group], list[Anchor]]:
    """Four prompts of six rollouts: hinted and bare, without variance, bare alone; anchors of either kind."""
    rng, model = np.random.default_rng(7), fp64_model("sdpa")

    @torch.no_grad()
    def score(prompt: list[int], answer: list[int]) -> list[float]:
        logp, _, mask = log_probs(model, [Row(prompt, answer, [], 0.0)], config.rollout.temperature)
        return logp[mask > 0].tolist()

    def ids(n: int) -> list[int]:
        return rng.integers(1, 50, size=n).tolist()

    groups = []
    for seen, rewards in (
        ([None, None, 0, 0, 1, 1], [1, 0, 1, 1, 0, 1]),
        ([None, 0, 0, 0, 2, 2], [0, 0, 1, 0, 1, 0]),
        ([None, None, None, 0, 1, 1], [0, 0, 0, 0, 0, 0]),
        ([None] * 6, [1, 0, 0, 1, 0, 0]),
    ):
        asked, end = ids(5), [3, 4]
        prompts = {None: asked + end, **{hint: asked + ids(4) + end for hint in range(3)}}
        members = [
            replace(sampled(rng, prompts[hint], float(reward), score), hint=hint)
            for hint, reward in zip(seen, rewards, strict=True)
        ]
        groups.append(Group(members[0].problem, prompts[None], members))
    anchors = []
    for g, i, rewards in ((0, 4, [1, 0, 1]), (0, 1, [0, 1, 1]), (1, 5, [1, 0, 0]), (1, 2, [1, 0, 1]),
                          (2, 3, [0, 1, 0])):  # fmt: skip
        anchor = Anchor(groups[g].rollouts[i], g, i, groups[g].prompt_ids, ids(3))
        anchor.corrections = [sampled(rng, context_of(anchor), float(reward), score) for reward in rewards]
        anchors.append(anchor)
    return groups, anchors


def reference(config: Config, groups: list[Group], anchors: list[Anchor]) -> dict[str, Tensor]:
    """Every gradient of RL(rollouts) + distill * L_d + lambda_corr * L_corr."""
    model, n = fp64_model("sdpa"), config.nudge
    rows, distilled = [], []
    for group in groups:
        rewards = torch.tensor([r.reward for r in group.rollouts], dtype=torch.float64)
        m, a = rewards.mean(), torch.zeros(len(rewards), dtype=torch.float64)
        for i, r in enumerate(group.rollouts):
            same = torch.stack([rewards[j] for j, o in enumerate(group.rollouts) if o.hint == r.hint])
            a[i] = rewards[i] - m
            if r.hint is not None:
                a[i] = (rewards[i] - same.mean()) + n.between * (same.mean() - m)
        advantages = (a - a.mean()) / (a.std(unbiased=False) + config.loss.advantage_eps)
        for r, advantage in zip(group.rollouts, advantages.tolist(), strict=True):
            rows.append(Row(r.prompt_ids, r.token_ids, r.sampler_logps, advantage))
            distilled.append(Row(group.prompt_ids, r.token_ids, r.sampler_logps, advantage))
    loss = rl(model, rows, config, None, None, Seen())
    logp, _, mask = log_probs(model, distilled, config.rollout.temperature)
    mean_logp = (logp * mask).sum(1) / mask.sum(1)
    loss = loss - n.distill * (torch.tensor([r.advantage for r in distilled]) * mean_logp).mean()
    c = config.correction
    if anchors and c.loss != "ce":
        loss = loss + c.lambda_corr * rl(model, correction_rows(anchors, config), config, None, None, Seen())
    if anchors and c.loss != "rl":
        shown = [replace(a, rollout=replace(a.rollout, prompt_ids=a.prompt_ids)) for a in anchors]
        loss = loss + c.lambda_corr * (c.mu if c.loss == "both" else 1) * cross_entropy(model, shown, config)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("corrections", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        [], ["train.packing=rows"], ["loss.normalize=sequences", "rollout.temperature=0.7", "nudge.distill=0.7"],
        ["correction.loss=both", "correction.context=bare"], ["nudge.distill=0", "nudge.between=0.4"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_the_step_is_the_references(mesh, settings: list[str], corrections: bool) -> None:
    """Alone and with CIPO: every gradient, in trees and in rows, with packs that hold one tree or part of one."""
    off = [] if corrections else ["correction.lambda_corr=0"]
    more = ["train.pack_tokens=140", "optim.max_grad_norm=1e9", "rollout.samples_per_prompt=6", *settings]
    config = load_config([], [*NUDGE, *off, *more])
    groups, anchors = batch(config)
    anchors = anchors if corrections else []
    _, (ours,) = trainers_gradients(config, groups, anchors)
    theirs = reference(config, groups, anchors)
    for name, expected in theirs.items():
        assert (ours[name] - expected).abs().max() <= TOLERANCE * expected.abs().max(), name


def test_the_problem_is_shared_and_a_hinted_attempt_has_two_places() -> None:
    config = load_config([], [*NUDGE, "rollout.samples_per_prompt=6"])
    groups, anchors = batch(config)
    prompts = prompt_segments(groups[0])
    first = {segments[0] for segments in prompts.values()}
    assert len(first) == 1
    assert first.pop().token_ids == groups[0].prompt_ids[:5]
    assert [t for s in prompts[1] for t in s.token_ids] == groups[0].rollouts[4].prompt_ids
    assert [len(s) for s in prompt_segments(groups[3]).values()] == [1]

    found = conversations(groups, anchors, config, 1)
    trees = build_trees(found)
    assert len(trees) == 4  # one of each problem
    assert sum(tree.num_tokens for tree in trees) < row_tokens(found)
    hinted = groups[0].rollouts[4]
    places = [c for c in found if c.segments[-1].token_ids == hinted.token_ids and c.stream == "rollout"]
    by_logps = {c.sampler_logps is None: c for c in places}
    assert by_logps[False].ce_weight == 0
    assert by_logps[True].rl_weight == 0
    corrected = [c for c in found if c.stream == "correction" and c.segments[-3] is by_logps[True].segments[-1]]
    assert len(corrected) == 3  # they follow the attempt where it stands after the bare prompt
    assert min(c.ce_weight for c in found) < 0 < max(c.ce_weight for c in found)
    rest = left_out(groups, anchors, found)
    assert len([c for c in rest if c.stream == "rollout"]) == 6  # those without variance
    build_trees(found + rest)


def test_without_hints_the_conversations_are_grpos() -> None:
    """Bare rollouts alone, and no distillation: the segments of a run without hints."""
    config = load_config([], [])
    groups, _ = batch(config)
    found = conversations(groups[3:], [], config, 1)
    assert all(len(c.segments) == 2 and c.ce_weight == 0 for c in found)


# ---------------------------------------------------------------------------------------------------------- figures


def test_the_gap_compares_with_bare_retries() -> None:
    config = load_config([], [])
    groups, anchors = batch(config)
    assert correction_gap(groups, [anchors[0]]) == pytest.approx(2 / 3 - 1 / 2)  # a hinted attempt: both bare ones
    assert correction_gap(groups, [anchors[1]]) == pytest.approx(2 / 3 - 1)  # a bare one: the other
    only = [replace(groups[1], rollouts=groups[1].rollouts[1:])]
    assert correction_gap(only, [replace(anchors[2], group=0, index=4)]) is None
    seen = nudge_metrics(groups)
    assert seen == {
        "nudge/hinted": pytest.approx(12 / 24),
        "nudge/hinted_accuracy": pytest.approx(5 / 12),
        "nudge/bare_accuracy": pytest.approx(3 / 12),
    }


# ------------------------------------------------------------------------------------------------------------- runs


def test_hints_of_the_toy_tell_a_quarter() -> None:
    assert hints.hints_of("abfkmpqz") == ["begins ab", "ends qz"]
    assert hints.hints_of("46") == ["begins 4", "ends 6"]
