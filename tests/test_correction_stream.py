"""How much corrections weigh: the bound on right anchors, the warm-up of lambda_corr, the supervised start."""

import shutil
from pathlib import Path

import pytest
from test_cipo import batch
from test_train import assert_equal_weights, metrics, run_dir, timeless, train

from cipo_fast.cipo.objective import conversations, lambda_corr_at, right_weight
from cipo_fast.config import Config, CorrectionConfig, load_config
from cipo_fast.errors import UserError
from cipo_fast.records import Anchor, Conversation, Group

WRONG, RIGHT = 0, 1  # `batch` has an anchor of each, with 4 corrections


def corrections_of(config: Config, anchors: tuple[list[Group], list[Anchor]], step: int = 1) -> list[Conversation]:
    return [c for c in conversations(*anchors, config, step) if c.stream == "correction"]


def weight(found: list[Conversation], anchor: Anchor) -> float:
    """Of an anchor's corrections: sum of |advantage| * rl_weight over tokens."""
    return sum(
        abs(c.advantage) * c.rl_weight * len(c.segments[-1].token_ids)
        for c in found
        if c.segments[1].token_ids == anchor.rollout.token_ids
    )


# ------------------------------------------------------------------------------------------------------- the bound


@pytest.mark.parametrize("normalize", ["tokens", "sequences"])
@pytest.mark.parametrize("norm", ["literal", "raw_std", "pooled"])
@pytest.mark.parametrize("bound", [0.0, 0.1, 0.5])
def test_right_anchors_weigh_no_more_than_the_bound(bound: float, norm: str, normalize: str) -> None:
    settings = [f"correction.risk_norm={norm}", f"loss.normalize={normalize}", "correction.lambda_corr=0.7"]
    free, config = load_config([], settings), load_config([], [*settings, f"replay.right_weight_max={bound}"])
    made = batch(config)
    anchors = made[1]
    before, after = corrections_of(free, made), corrections_of(config, made)
    wrong, right = (weight(before, anchors[i]) for i in (WRONG, RIGHT))
    assert right_weight(anchors, config, 1) == right_weight(anchors, free, 1) == pytest.approx(right / (wrong + right))
    if right <= bound * (wrong + right):
        assert bound == 0.5
        assert norm == "literal"
        return
    assert weight(after, anchors[WRONG]) == wrong  # Z stays, so nobody gains
    assert weight(after, anchors[RIGHT]) == pytest.approx(bound / (1 - bound) * wrong, rel=1e-14)
    share = weight(after, anchors[RIGHT]) / sum(weight(after, a) for a in anchors)
    assert share == pytest.approx(bound, abs=1e-15)


def test_no_bound_and_one_that_is_not_reached_change_nothing() -> None:
    free = load_config([], [])
    made = batch(free)
    share = right_weight(made[1], free, 1)
    for bound in (1.0, share):
        found = corrections_of(load_config([], [f"replay.right_weight_max={bound!r}"]), made)
        expected = corrections_of(free, made)
        assert [(c.advantage, c.rl_weight) for c in found] == [(c.advantage, c.rl_weight) for c in expected]


def test_right_anchors_alone_teach_nothing_under_a_bound() -> None:
    """... and nothing divides by zero where nobody weighs."""
    config = load_config([], ["replay.right_weight_max=0.9"])
    groups, anchors = batch(config)
    assert corrections_of(config, (groups, anchors[RIGHT:])) == []
    assert len(corrections_of(load_config([], []), (groups, anchors[RIGHT:]))) == 4
    for r in (*anchors[WRONG].corrections, *anchors[RIGHT].corrections):
        r.reward = 1.0
    assert right_weight(anchors, config, 1) is None
    assert corrections_of(config, (groups, anchors)) == []
    assert right_weight([], config, 1) is None
    assert right_weight(anchors, load_config([], ["correction.loss=ce"]), 1) is None


# ----------------------------------------------------------------------------------------------- warm-up and start


def test_lambda_corr_rises_after_the_start() -> None:
    def of(steps: range, **settings: float) -> list[float]:
        return [lambda_corr_at(step, CorrectionConfig(**settings)) for step in steps]

    assert of(range(1, 4)) == [1.0, 1.0, 1.0]
    assert of(range(1, 7), lambda_corr=2.0, warmup_steps=4) == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    assert of(range(1, 7), start_steps=2, warmup_steps=3) == pytest.approx([0, 0, 1 / 3, 2 / 3, 1, 1])
    assert of(range(1, 4), start_steps=2) == [0.0, 0.0, 1.0]
    assert of(range(1, 1000), lambda_corr=0.3, warmup_steps=7)[6:] == [0.3] * 993  # to the bit


@pytest.mark.parametrize("loss", ["rl", "ce", "both"])
def test_warm_up_scales_corrections_alone(loss: str) -> None:
    config = load_config([], [f"correction.loss={loss}", "correction.warmup_steps=8"])
    made = batch(config)
    whole, early = (conversations(*made, config, step) for step in (8, 2))
    assert len(whole) == len(early)
    for a, b in zip(whole, early, strict=True):
        factor = 0.25 if a.stream == "correction" else 1.0
        assert (b.rl_weight, b.ce_weight) == (factor * a.rl_weight, factor * a.ce_weight)
        assert b.advantage == a.advantage


def test_the_start_learns_verified_corrections_alone_and_both_kinds_weigh_the_same() -> None:
    config = load_config([], ["correction.start_steps=3", "correction.context=bare", "loss.beta=0.1"])
    made = batch(config)
    anchors = made[1]
    anchors[RIGHT].corrections[0].truncated = True
    anchors[WRONG].corrections[0].token_ids = [*anchors[WRONG].corrections[0].token_ids, 5, 6]
    found = conversations(*made, config, 3)
    assert all(c.rl_weight == 0 and c.advantage == 0 and len(c.segments) == 4 for c in found)
    answers = {
        kind: [c for c in found if c.segments[1].token_ids == anchors[kind].rollout.token_ids]
        for kind in (WRONG, RIGHT)
    }
    assert [c.segments[-1].token_ids for c in answers[WRONG]] == [
        anchors[WRONG].corrections[j].token_ids for j in (0, 2)
    ]
    assert [c.segments[-1].token_ids for c in answers[RIGHT]] == [anchors[RIGHT].corrections[3].token_ids]
    for members in answers.values():
        assert sum(c.ce_weight * len(c.segments[-1].token_ids) for c in members) == pytest.approx(0.5)
        assert len({c.ce_weight for c in members}) == 1
    assert right_weight(anchors, config, 3) is None  # the start has no weights of that kind
    assert right_weight(anchors, config, 4) is not None
    assert {c.stream for c in conversations(*made, config, 4)} == {"rollout", "correction"}
    assert all(c.ce_weight == 0 for c in conversations(*made, config, 4))


def test_in_the_start_kept_answers_teach_only_beside_corrected_ones() -> None:
    config = load_config([], ["correction.start_steps=1"])
    groups, anchors = batch(config)
    alone = conversations(groups, anchors[:RIGHT], config, 1)
    assert sum(c.ce_weight * len(c.segments[-1].token_ids) for c in alone) == pytest.approx(1.0)
    for found in (conversations(groups, anchors[RIGHT:], config, 1), conversations(groups, [], config, 1)):
        assert [(c.rl_weight, c.ce_weight) for c in found] == [(0.0, 0.0)]  # a step, on gradient 0
    for correction in anchors[WRONG].corrections:
        correction.reward = 0.0
    assert [c.ce_weight for c in conversations(groups, anchors, config, 1)] == [0.0]


def test_a_start_without_corrections_is_refused() -> None:
    with pytest.raises(UserError, match=r"correction\.start_steps=5 learns from corrections"):
        load_config([], ["correction.start_steps=5", "correction.lambda_corr=0"])


def test_resume_over_the_end_of_the_start_is_exact(tmp_path: Path, warm: Path) -> None:
    args = [
        "correction.start_steps=2", "correction.warmup_steps=2", "replay.rule=attainable", "replay.n_min=1",
        "replay.tau_beyond=0.5", "replay.right_weight_max=0.4", "train.updates_per_step=2", "train.steps=4",
        "checkpoint.keep=9",
    ]  # fmt: skip
    straight, resumed = run_dir(tmp_path, warm, "straight"), run_dir(tmp_path, warm, "resumed")
    assert train(straight, *args, "checkpoint.every=0") == 0
    assert train(resumed, *args, "checkpoint.every=1") == 0
    for step in (3, 4):
        shutil.rmtree(resumed / "checkpoints" / f"step-{step}")
    assert train(resumed, *args, "checkpoint.every=1", "checkpoint.resume=true") == 0
    assert_equal_weights(straight, resumed)
    rows = metrics(straight)
    assert timeless(rows) == timeless(metrics(resumed))
    assert [row["correction/lambda_corr"] for row in rows] == [0.0, 0.0, 0.5, 1.0]
    corrected = [row["correction/wrong_to_right"] > 0 for row in rows[:2]]
    assert [row["loss/total"] > 0 for row in rows[:2]] == corrected  # a cross-entropy, where there is anything to learn
    measured = [row for row in rows if row["replay/attainable"] is not None]
    assert measured
    assert all(row["replay/target"] == pytest.approx((1 + row["replay/attainable"]) / 2) for row in measured)
