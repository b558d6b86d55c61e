"""The algorithm: numeric checks by hand, anchors, prompts, weights, metrics."""

from dataclasses import replace

import numpy as np
import pytest

from cipo_fast.chat import Chat
from cipo_fast.cipo.advantages import correction_advantages, group_advantages, shape_rewards
from cipo_fast.cipo.anchors import order_prompts, select_anchors
from cipo_fast.cipo.metrics import batch_metrics, correction_gap, verdict_metrics
from cipo_fast.cipo.objective import conversations, verified_corrections
from cipo_fast.cipo.prompts import CorrectionPrompts
from cipo_fast.config import Config, CorrectionConfig, DataConfig, load_config
from cipo_fast.embedded.model import embedded_tokenizer
from cipo_fast.records import Anchor, Group, Problem, Rollout

TOKENIZER = embedded_tokenizer()
CHAT = Chat(TOKENIZER, DataConfig())


def problem(i: int = 0) -> Problem:
    return Problem(f"p{i}", ({"role": "user", "content": f"ask {i}"},), "yes", "test")


def rollout(reward: float, text: str = "", p: Problem | None = None, truncated: bool = False, step: int = 0) -> Rollout:
    p = p or problem()
    text = text or ("yes" if reward else "no")
    ids = [*TOKENIZER(text, add_special_tokens=False)["input_ids"], *([] if truncated else [TOKENIZER.eos_token_id])]
    return Rollout(p, CHAT.prompt(p.messages, p.id), ids, [-1.0] * len(ids), text, reward, truncated, step)


def group(rewards: list[float], i: int = 0) -> Group:
    p = problem(i)
    rollouts = [rollout(r, f"{'yes' if r else 'no'}{n}", p) for n, r in enumerate(rewards)]
    return Group(p, rollouts[0].prompt_ids, rollouts)


def fits(r: Rollout) -> tuple[list[int], list[int]]:
    return r.prompt_ids, [1, 2, 3]


# ------------------------------------------------------------------------------------------------------ advantages


def test_group_advantages_by_hand() -> None:
    rewards = np.array([[1.0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0]])
    found = group_advantages(rewards, scale=True, eps=1e-12)
    assert found[0] == pytest.approx([1.5, -0.5, -0.5, -0.5])  # std (n-1) of one in four is 1/2
    assert (found[1] == 0).all()
    assert (found[2] == 0).all()
    assert found[3] == pytest.approx(np.array([0.5, 0.5, -0.5, -0.5]) / np.sqrt(1 / 3))
    assert group_advantages(rewards, scale=False, eps=1e-12)[0] == pytest.approx([0.75, -0.25, -0.25, -0.25])


def test_shaping_punishes_only_broken_right_anchors() -> None:
    shaped = shape_rewards(np.array([[1.0, 0], [1, 0]]), np.array([True, False]), 0.5)
    assert [group.tolist() for group in shaped] == [[1, -0.5], [1, 0]]


REWARDS = np.array([[1.0, 1, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
RIGHT = np.array([True, False, True, False])


def advantages(risk_norm: str, lambda_risk: float, eps: float = 1e-12, scale: bool = True) -> np.ndarray:
    return np.stack(
        correction_advantages(REWARDS, RIGHT, lambda_risk=lambda_risk, risk_norm=risk_norm, scale=scale, eps=eps)
    )


def test_literal_is_indifferent_to_lambda_risk_and_raw_std_is_not() -> None:
    assert advantages("literal", 0.0) == pytest.approx(advantages("literal", 3.0), abs=1e-10)
    plain, punished = advantages("raw_std", 0.0), advantages("raw_std", 1.0)
    assert punished[0] == pytest.approx(2 * plain[0])  # right-anchor groups weigh 1 + lambda_risk
    assert (punished[1] == plain[1]).all()


def test_groups_without_variance_teach_nothing_but_in_pooled() -> None:
    for norm in ("literal", "raw_std"):
        assert (advantages(norm, 1.0)[2:] == 0).all()
    pooled = advantages("pooled", 1.0)
    shaped = np.stack(shape_rewards(REWARDS, RIGHT, 1.0))
    std = shaped.std(ddof=1)
    assert pooled[2] == pytest.approx((-1 - shaped.mean()) / std)  # a right anchor that all corrections broke
    assert (pooled[2] < 0).all()
    assert pooled[1] == pytest.approx((shaped[1] - shaped[1].mean()) / std)


def test_dr_grpo_divides_nothing() -> None:
    shaped = shape_rewards(REWARDS, RIGHT, 1.0)
    assert advantages("raw_std", 1.0, scale=False)[0] == pytest.approx(shaped[0] - shaped[0].mean())


def test_no_corrections_no_advantages() -> None:
    for norm in ("literal", "raw_std", "pooled"):
        assert correction_advantages([], [], lambda_risk=1.0, risk_norm=norm, scale=True, eps=0.0) == []


def of_a_matrix(rewards: np.ndarray, right: np.ndarray, norm: str, scale: bool) -> np.ndarray:
    """The formulas for groups of one size, as matrices [groups, n]: what lists of groups must agree with to the bit."""

    def standardised(values: np.ndarray, spread: np.ndarray) -> np.ndarray:
        centred = values - values.mean(axis=1, keepdims=True)
        if scale:
            centred = centred / (spread.std(axis=1, ddof=1, keepdims=True) + 1e-6)
        return np.where((spread == spread[:, :1]).all(axis=1)[:, None], 0.0, centred)

    shaped = rewards - 1.5 * (right[:, None] & (rewards == 0))
    if norm == "pooled":
        baseline = np.where(right, shaped.mean(), shaped.mean(axis=1))
        return (shaped - baseline[:, None]) / ((shaped.std(ddof=1) + 1e-6) if scale else 1.0)
    return standardised(shaped, shaped if norm == "literal" else rewards)


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("norm", ["literal", "raw_std", "pooled"])
@pytest.mark.parametrize("size", [2, 3, 8, 37])
def test_equal_groups_have_the_advantages_of_a_matrix_to_the_bit(norm: str, size: int, scale: bool) -> None:
    draw = np.random.default_rng(size)
    rewards, right = (draw.random((25, size)) < 0.4).astype(np.float64), draw.random(25) < 0.5
    kept = {"lambda_risk": 1.5, "risk_norm": norm, "scale": scale, "eps": 1e-6}
    found = correction_advantages([*rewards], right.tolist(), **kept)
    assert (np.stack(found) == of_a_matrix(rewards, right, norm, scale)).all()
    plain = of_a_matrix(rewards, np.zeros(25, bool), "raw_std", scale)
    assert (np.stack(group_advantages([*rewards], scale=scale, eps=1e-6)) == plain).all()


@pytest.mark.parametrize("norm", ["literal", "raw_std", "pooled"])
def test_ragged_groups_stand_by_themselves(norm: str) -> None:
    """A group's advantages do not depend on how many the others have; one answer alone has none."""
    rewards = [np.array([1.0, 0, 0]), np.array([1.0]), np.array([0.0, 1])]
    kept = {"lambda_risk": 1.0, "risk_norm": norm, "scale": True, "eps": 1e-9}
    found = correction_advantages(rewards, [False, False, True], **kept)
    assert [len(group) for group in found] == [3, 1, 2]
    assert np.isfinite(np.concatenate(found)).all()
    assert found[1].tolist() == [0.0]
    if norm != "pooled":
        alone = correction_advantages(rewards[:1], [False], **kept)
        assert (found[0] == alone[0]).all()
        assert correction_advantages([np.array([0.0])], [True], **kept)[0].tolist() == [0.0]


# --------------------------------------------------------------------------------------------------------- anchors


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_rho_sets_the_share_of_right_anchors() -> None:
    groups = [group([1, 1, 0, 0], i) for i in range(10)]
    anchors, counts = select_anchors(groups, 10, 0.3, CorrectionConfig(), fits, rng())
    assert (counts.right_wanted, counts.right, counts.wrong) == (3, 3, 7)
    assert sum(a.right for a in anchors) == 3
    assert len({(a.group, a.index) for a in anchors}) == 10
    assert all(groups[a.group].rollouts[a.index] is a.rollout for a in anchors)


@pytest.mark.parametrize(("rewards", "right", "wrong"), [([0, 0, 0, 0], 0, 4), ([1, 1, 1, 1], 4, 0)])
def test_a_shortage_is_filled_from_the_other_side(rewards: list[float], right: int, wrong: int) -> None:
    _, counts = select_anchors([group(rewards), group(rewards, 1)], 4, 0.5, CorrectionConfig(), fits, rng())
    assert (counts.right, counts.wrong) == (right, wrong)


def test_no_prompt_gives_more_than_its_cap_and_all_give_one_first() -> None:
    groups = [group([1, 0, 1, 0], i) for i in range(4)]
    anchors, _ = select_anchors(groups, 100, 0.5, CorrectionConfig(max_anchors_per_prompt=2), fits, rng())
    assert [sum(a.group == g for a in anchors) for g in range(4)] == [2, 2, 2, 2]
    anchors, _ = select_anchors(groups, 4, 0.0, CorrectionConfig(), fits, rng())
    assert sorted(a.group for a in anchors) == [0, 1, 2, 3]


def test_medium_prompts_come_first() -> None:
    groups = [group([1] * k + [0] * (8 - k), k) for k in range(9)]  # pass rates 0/8 .. 8/8
    anchors, _ = select_anchors(groups, 4, 0.5, CorrectionConfig(), fits, rng())
    assert {a.group for a in anchors} == {3, 4, 5, 6}
    tiers = order_prompts([k / 8 for k in range(9)], CorrectionConfig(), rng())
    assert [sorted(t) for t in tiers] == [[3, 4, 5, 6], [0, 1, 2, 7, 8]]


def test_soft_preference_follows_its_weight() -> None:
    config = CorrectionConfig(preference="soft", kappa=2.0)
    first = [order_prompts([0.0, 0.5, 1.0], config, np.random.default_rng(i))[0][0] for i in range(200)]
    assert first.count(1) > 190  # weight 0.0676 against 0.0001 twice
    flat = CorrectionConfig(preference="soft", kappa=0.0)
    first = [order_prompts([0.0, 0.5, 1.0], flat, np.random.default_rng(i))[0][0] for i in range(300)]
    assert all(60 < first.count(i) < 140 for i in range(3))


def test_truncated_empty_and_duplicate_attempts_are_no_anchors() -> None:
    p = problem()
    rollouts = [rollout(0, "no", p), rollout(0, "no", p), rollout(0, "", p, truncated=True), rollout(0, " ", p)]
    rollouts[2] = replace(rollouts[2], text="cut")
    anchors, _ = select_anchors([Group(p, rollouts[0].prompt_ids, rollouts)], 4, 0.0, CorrectionConfig(), fits, rng())
    assert [a.index for a in anchors] == [0]


def test_an_anchor_that_does_not_fit_is_dropped_counted_and_replaced() -> None:
    seen = set()
    for seed in range(20):
        refused = []

        def all_but_no0(r: Rollout, refused: list = refused):
            if r.text == "no0":
                refused.append(r)
                return None
            return fits(r)

        draw = np.random.default_rng(seed)
        anchors, counts = select_anchors([group([0, 0, 0, 0])], 2, 0.0, CorrectionConfig(), all_but_no0, draw)
        assert len(anchors) == 2
        assert all(a.rollout.text != "no0" for a in anchors)
        assert counts.dropped == len(refused) <= 1
        seen.add(counts.dropped)
    assert seen == {0, 1}  # it is asked for only where the draw comes to it


# --------------------------------------------------------------------------------------------------------- prompts


def test_followup_joins_ids_and_never_renders_the_attempt_again() -> None:
    prompts = CorrectionPrompts(CHAT, CorrectionConfig(followup="check"))
    r = rollout(0, "no")
    prompt_ids, glue_ids = prompts(r)
    whole = TOKENIZER.apply_chat_template(
        [*r.problem.messages, {"role": "assistant", "content": "no"}, {"role": "user", "content": "check"}],
        add_generation_prompt=True,
        return_dict=False,
    )
    assert prompt_ids + r.token_ids + glue_ids == whole  # the end-of-turn token stands once


def test_the_verdict_is_hidden_unless_asked_for() -> None:
    hidden = CorrectionPrompts(CHAT, CorrectionConfig())
    assert hidden.glue[True] == hidden.glue[False]
    shown = CorrectionPrompts(CHAT, CorrectionConfig(verdict="shown"))
    assert "right" in TOKENIZER.decode(shown.glue[True].token_ids).split("It may")[0]
    assert "wrong" in TOKENIZER.decode(shown.glue[False].token_ids).split("It may")[0]


def test_quoted_is_one_user_turn() -> None:
    prompt_ids, glue_ids = CorrectionPrompts(CHAT, CorrectionConfig(layout="quoted", followup="check"))(
        rollout(0, "no")
    )
    assert glue_ids is None
    assert TOKENIZER.decode(prompt_ids) == "<|user|>ask 0\n\nno\n\ncheck<|end|><|assistant|>"


def test_a_correction_prompt_is_never_cut() -> None:
    for layout in ("followup", "quoted"):
        for limit, kept in ((19, True), (18, False)):
            config = CorrectionConfig(layout=layout, followup="check", max_prompt_tokens=limit)
            assert (CorrectionPrompts(CHAT, config)(rollout(0, "no")) is not None) == kept


# ------------------------------------------------------------------------------------------------------- objective


def batch(config: Config) -> tuple[list[Group], list[Anchor]]:
    groups = [group([1, 0, 0, 1], 0), group([0, 0, 1, 0], 1)]
    anchors = []
    for g, i, rewards in [(0, 1, [1, 0, 1, 1]), (1, 2, [1, 0, 0, 1])]:
        r = groups[g].rollouts[i]
        corrections = [
            replace(rollout(x, p=r.problem), prompt_ids=[*r.prompt_ids, *r.token_ids, 1, 2]) for x in rewards
        ]
        anchors.append(Anchor(r, g, i, r.prompt_ids, [1, 2], corrections))
    return groups, anchors


def test_each_stream_is_normalised_by_its_own_count() -> None:
    config = load_config([], ["correction.lambda_corr=0.5"])
    found = conversations(*batch(config), config, 1)
    for stream, weight in [("rollout", 1.0), ("correction", 0.5)]:
        members = [c for c in found if c.stream == stream]
        assert sum(c.rl_weight * len(c.segments[-1].token_ids) for c in members) == pytest.approx(weight)
        assert len({c.rl_weight for c in members}) == 1


def test_normalize_by_sequences() -> None:
    config = load_config([], ["loss.normalize=sequences"])
    members = [c for c in conversations(*batch(config), config, 1) if c.stream == "rollout"]
    assert [c.rl_weight * len(c.segments[-1].token_ids) for c in members] == pytest.approx([1 / 8] * 8)


def test_corrections_share_the_segments_of_their_attempt() -> None:
    config = load_config([], [])
    found = conversations(*batch(config), config, 1)
    attempt = next(
        c
        for c in found
        if c.stream == "rollout" and c.segments[1].token_ids == batch(config)[0][0].rollouts[1].token_ids
    )
    corrections = [c for c in found if c.stream == "correction"][:4]
    assert all(c.segments[:2] == attempt.segments for c in corrections)
    assert len({c.segments[2] for c in corrections}) == 1
    assert len({c.segments[3] for c in corrections}) == 4  # equal texts stay apart


def test_a_correction_sampled_from_another_prompt_is_refused() -> None:
    config = load_config([], [])
    groups, anchors = batch(config)
    anchors[0].corrections[1].prompt_ids = anchors[0].corrections[1].prompt_ids[:-1]
    with pytest.raises(RuntimeError, match="p0 was sampled from another prompt"):
        conversations(groups, anchors, config, 1)


def test_lambda_corr_0_is_grpo() -> None:
    config = load_config([], ["correction.lambda_corr=0"])
    assert {c.stream for c in conversations(*batch(config), config, 1)} == {"rollout"}
    assert config.anchors_per_step == 0


@pytest.mark.parametrize("context", ["anchor", "bare"])
@pytest.mark.parametrize("loss", ["ce", "both"])
def test_cross_entropy_weights(loss: str, context: str) -> None:
    config = load_config([], [f"correction.loss={loss}", f"correction.context={context}", "correction.lambda_corr=2"])
    groups, anchors = batch(config)
    found = [c for c in conversations(groups, anchors, config, 1) if c.ce_weight]
    assert len(found) == 2  # verified corrections of wrong anchors, at most 2 an anchor
    total = sum(c.ce_weight * len(c.segments[-1].token_ids) for c in found)
    assert total == pytest.approx(2 * (0.1 if loss == "both" else 1.0))
    for c in found:
        assert len(c.segments) == (2 if context == "bare" else 4)
        assert (c.rl_weight > 0) == (loss == "both" and context == "anchor")
    assert verified_corrections(anchors[1], 2) == []  # a right anchor


def test_truncated_corrections_are_not_imitated() -> None:
    _, anchors = batch(load_config([], []))
    anchors[0].corrections[0].truncated = True
    assert verified_corrections(anchors[0], 2) == [2, 3]


# --------------------------------------------------------------------------------------------------------- metrics


def test_metrics_by_hand() -> None:
    groups, anchors = batch(load_config([], []))
    m = batch_metrics(groups, anchors, None)
    assert m["rollout/accuracy"] == 3 / 8
    assert m["correction/wrong_to_right"] == 3 / 4
    assert m["correction/retention"] == 1 / 2
    assert m["correction/right_to_wrong"] == 1 / 2
    assert m["correction/gap"] == pytest.approx(3 / 4 - 2 / 3)  # two of the other three rollouts are right
    assert correction_gap(groups, anchors[1:]) is None
    assert batch_metrics(groups, [], None)["correction/retention"] is None


def ragged(config: Config) -> tuple[list[Group], list[Anchor]]:
    """`batch`, but a rollout of each prompt and some corrections could not be judged, and one prompt has one answer."""
    groups, anchors = batch(config)
    del groups[0].rollouts[2], groups[1].rollouts[3:]
    groups.append(group([1.0], 2))
    del anchors[0].corrections[1:], anchors[1].corrections[0]
    return groups, anchors


@pytest.mark.parametrize("normalize", ["tokens", "sequences"])
def test_what_could_not_be_judged_weighs_nothing(normalize: str) -> None:
    config = load_config([], [f"loss.normalize={normalize}", "correction.loss=both", "loss.beta=0.1"])
    groups, anchors = ragged(config)
    found = conversations(groups, anchors, config, 1)
    rollouts = [c for c in found if c.stream == "rollout"]
    assert len(rollouts) == 3 + 3 + 1
    assert len(found) - len(rollouts) == 1 + 3
    for stream in ("rollout", "correction"):  # the normalisers count what is left
        members = [c for c in found if c.stream == stream]
        assert sum(c.rl_weight * len(c.segments[-1].token_ids) for c in members) == pytest.approx(1.0)
    assert rollouts[-1].advantage == 0  # alone in its group
    assert all(np.isfinite(c.advantage) for c in found)


def test_metrics_of_ragged_groups() -> None:
    groups, anchors = ragged(load_config([], []))
    m = batch_metrics(groups, anchors, None)
    assert m["rollout/accuracy"] == 4 / 7
    assert m["rollout/no_variance"] == 1 / 3
    assert m["correction/wrong_to_right"] == 1.0
    assert m["correction/retention"] == 1 / 3
    assert m["correction/gap"] == pytest.approx(1.0 - 2 / 2)  # both other rollouts of the anchor's prompt are right
    lonely = Anchor(groups[2].rollouts[0], 2, 0, [1], None, [rollout(0.0)])
    lonely.rollout = replace(lonely.rollout, reward=0.0)
    assert correction_gap(groups, [lonely]) is None  # there is no other to compare with
    anchors, counts = select_anchors(groups, 6, 0.5, CorrectionConfig(), fits, rng())
    assert counts.right + counts.wrong == 5  # at most 2 a prompt, and one prompt has one


@pytest.mark.parametrize("reward", [0.5, -1.0, float("nan"), 2])
def test_no_other_reward_than_0_and_1_gets_into_the_algorithm(reward: float) -> None:
    config = load_config([], [])
    groups, anchors = batch(config)
    groups[1].rollouts[1].reward = reward
    for enters in (
        lambda: conversations(groups, anchors, config, 1),
        lambda: select_anchors(groups, 4, 0.5, CorrectionConfig(), fits, rng()),
        lambda: batch_metrics(groups, anchors, None),
    ):
        with pytest.raises(RuntimeError, match="only 0 and 1 exist"):
            enters()
    groups, anchors = batch(config)
    anchors[1].corrections[0].reward = reward
    with pytest.raises(RuntimeError, match="only 0 and 1 exist"):
        conversations(groups, anchors, config, 1)


def test_verdicts_and_sources_are_counted() -> None:
    groups, anchors = batch(load_config([], []))
    for r in groups[0].rollouts:
        r.verdict = "right" if r.reward else "unparsable"
        r.problem = replace(r.problem, source="a")
    for r in (*groups[1].rollouts, *(c for a in anchors for c in a.corrections)):
        r.verdict = "right" if r.reward else "wrong"
    m = verdict_metrics(groups, anchors, 3, ["a", "test"])
    assert (m["verify/right"], m["verify/unparsable"], m["verify/timeout"]) == (8 / 16, 2 / 16, 0.0)
    assert m["verify/wrong"] == 6 / 16
    assert m["verify/failed"] == 3
    assert (m["source/a/accuracy"], m["source/test/accuracy"]) == (2 / 4, 1 / 4)
    assert not [key for key in verdict_metrics(groups, anchors, 0, ["a"]) if key.startswith("source/")]
