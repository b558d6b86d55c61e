"""The replay controller: both rules by hand and under noise, and what a fresh retry attains."""

import math
from dataclasses import replace

import numpy as np
import pytest
from test_cipo import fits, group, problem, rollout

from cipo_fast.cipo.anchors import select_anchors
from cipo_fast.cipo.replay import ReplayState, retention_target, retry_rate, update_replay
from cipo_fast.config import CorrectionConfig, ReplayConfig
from cipo_fast.records import Anchor, Group, Rollout

LITERAL = ReplayConfig(rule="literal", rho_min=0.2)
F2F = LITERAL.model_copy(update={"ema_decay": 0.0, "n_min": 1})
ATTAINABLE = ReplayConfig(rule="attainable", tau_beyond=0.5, rho_min=0.01, rho_max=1.0, ema_decay=0.0, n_min=1)


# --------------------------------------------------------------------------------------------------------- literal


@pytest.mark.parametrize(
    ("retention", "expected"),
    [
        (0.95, [0.264, 0.232, 0.204, 0.2]),
        (0.70, [0.339, 0.400, 0.492, 0.605, 0.744, 0.8]),
    ],
)
def test_rho_sequences(retention: float, expected: list[float]) -> None:
    kept = [1.0] * round(100 * retention) + [0.0] * round(100 * (1 - retention))
    state, found = ReplayState(0.3), []
    for _ in expected:
        state = update_replay(state, kept, 0.5, F2F)
        found.append(state.rho)
    assert found == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("rule", ["literal", "attainable"])
def test_rho_holds_below_n_min_and_when_fixed(rule: str) -> None:
    state = ReplayState(0.3, 0.9, 1, 0.5)
    assert update_replay(state, [0.0] * 15, 0.5, ReplayConfig(rule=rule)) == state
    assert update_replay(state, [0.0] * 16, 0.5, ReplayConfig(rule=rule)).rho != 0.3
    assert update_replay(state, [0.0] * 99, 0.5, ReplayConfig(rule=rule, adaptive=False)) == state


def test_retention_is_smoothed_and_a_drop_raises_rho() -> None:
    state = update_replay(ReplayState(0.3, 1.0, attainable=0.6), [0.0] * 16, 0.4, LITERAL)
    assert state.retention == pytest.approx(0.7)
    assert state.attainable == pytest.approx(0.54)  # measured whatever the rule
    # f1 = 0.8 - 0.7, f2 = 1.0 - 0.7, f3 = 1
    assert state.rho == pytest.approx(0.3 * (1 + 0.8 * 0.1 + 0.3 * 0.3 + 0.05))


# ------------------------------------------------------------------------------------------------------ attainable


@pytest.mark.parametrize(
    ("attainable", "tau_beyond", "kept"), [(0.5, 0.5, 6), (0.0, 0.75, 6), (0.75, 0.0, 6), (0.25, 1.0, 8), (1.0, 0.3, 8)]
)
def test_rho_stays_where_retention_is_its_target(attainable: float, tau_beyond: float, kept: int) -> None:
    config = ATTAINABLE.model_copy(update={"tau_beyond": tau_beyond})
    rewards = [1.0] * kept + [0.0] * (8 - kept)
    state = update_replay(ReplayState(0.3), rewards, attainable, config)
    assert retention_target(state, config) == kept / 8
    assert state == ReplayState(0.3, kept / 8, 0, attainable)


def test_below_its_target_rho_rises_above_it_sinks_by_as_much() -> None:
    """Errors that cancel leave nothing behind; those of the literal rule do."""
    low, high = [1.0] * 5 + [0.0] * 3, [1.0] * 7 + [0.0]  # an eighth either side of the target, 6/8
    state = update_replay(ReplayState(0.3), low, 0.5, ATTAINABLE)
    assert state.rho == pytest.approx(0.3 * math.exp(0.8 / 8))
    state = update_replay(state, high, 0.5, ATTAINABLE)
    assert state.rho == pytest.approx(0.3, abs=1e-15)
    literal, aimed = ReplayState(0.3), F2F.model_copy(update={"tau": 0.75})
    for kept in (low, high, low, high):
        literal = update_replay(literal, kept, 0.5, aimed)
    assert literal.rho > 0.31


def test_rho_is_bounded_and_a_policy_that_is_nearly_always_right_moves_it_little() -> None:
    near_1 = update_replay(ReplayState(0.3), [1.0] * 15 + [0.0], 0.99, ATTAINABLE)
    assert near_1.rho == pytest.approx(0.3 * math.exp(0.8 * (0.995 - 15 / 16)))  # (ret - a) / (1 - a) is -5.25
    narrow = ATTAINABLE.model_copy(update={"rho_min": 0.29, "rho_max": 0.31})
    assert update_replay(ReplayState(0.3), [0.0] * 8, 0.9, narrow).rho == 0.31
    assert update_replay(ReplayState(0.3), [1.0] * 8, 0.1, narrow).rho == 0.29


def test_rho_is_held_as_long_as_there_is_nothing_to_compare_with() -> None:
    state = update_replay(ReplayState(0.3), [0.0] * 8, None, ATTAINABLE)
    assert state == ReplayState(0.3, 0.0)
    assert retention_target(state, ATTAINABLE) is None
    known = update_replay(ReplayState(0.3, attainable=0.5), [0.0] * 8, None, ATTAINABLE)
    assert (known.attainable, known.rho) == (0.5, pytest.approx(0.3 * math.exp(0.8 * 0.75)))


def test_a_state_from_before_there_was_a_second_rule() -> None:
    old = {"rho": 0.4, "retention": 0.7, "steps_below": 2}
    state = update_replay(ReplayState(**old), [1.0] * 16, 0.5, ATTAINABLE.model_copy(update={"ema_decay": 0.7}))
    assert (state.attainable, state.retention) == (0.5, pytest.approx(0.79))
    assert state.rho < 0.4


def courses(config: ReplayConfig, retention: float, attainable: float, seeds: int = 40, steps: int = 150) -> np.ndarray:
    """rho [seeds] after so many steps of as many corrections as rho asks of 32 anchors, 8 each."""
    ends = []
    for seed in range(seeds):
        rng, state = np.random.default_rng(seed), ReplayState(0.3)
        for _ in range(steps):
            kept = (rng.random(8 * round(32 * state.rho)) < retention).astype(float).tolist()
            state = update_replay(state, kept, attainable, config)
        ends.append(state.rho)
    return np.array(ends)


def test_noise_around_the_target_ratchets_the_literal_rule_alone() -> None:
    """Retention 0.8 on average is what both aim at."""
    wide = {"rho_min": 0.01, "rho_max": 1.0}
    literal = courses(F2F.model_copy(update=wide), 0.8, 0.6)
    smoothed = courses(LITERAL.model_copy(update=wide), 0.8, 0.6)
    two_sided = ReplayConfig(rule="attainable", tau_beyond=0.5, **wide)
    attainable = courses(two_sided, 0.8, 0.6)
    assert np.median(literal) > 0.95
    assert np.median(smoothed) > 0.95
    assert np.exp(np.log(attainable).mean()) == pytest.approx(0.3, abs=0.02)
    # Above its target the literal rule still rises; the other sinks.
    assert np.median(courses(F2F.model_copy(update=wide), 0.82, 0.6)) > 0.4
    assert np.median(courses(two_sided, 0.82, 0.6)) < 0.1


# ------------------------------------------------------------------------------------------------------ retry rate


def anchored(groups: list[Group], chosen: list[tuple[int, int]]) -> list[Anchor]:
    return [Anchor(groups[g].rollouts[i], g, i, [1], [2], [rollout(1.0)]) for g, i in chosen]


def test_retry_rate_by_hand() -> None:
    groups = [group([1, 0, 0, 1], 0), group([0, 0, 0, 0], 1), group([1, 1, 1, 0], 2)]
    # m = 5/12; m2 = (2/12 + 0 + 6/12) / 3 = 2/9; M = (5/12 - 2/9) / (2/9 - 25/144) = 4
    assert retry_rate(groups, anchored(groups, [(0, 0), (2, 1), (2, 3)])) == pytest.approx(
        ((4 * 5 / 12 + 2) / 8 + (4 * 5 / 12 + 3) / 8) / 2  # the third anchor is a wrong one
    )


def test_retry_rate_of_problems_that_do_not_differ_of_certain_ones_and_of_none() -> None:
    alike = [group([1, 0, 1, 0], i) for i in range(3)]
    assert retry_rate(alike, anchored(alike, [(0, 0), (1, 2)])) == 0.5
    certain = [group([1, 1, 1], 0), group([0, 0, 0], 1)]
    assert retry_rate(certain, anchored(certain, [(0, 1)])) == 1.0
    solved = [group([1, 1, 1], 0)]
    assert retry_rate(solved, anchored(solved, [(0, 1)])) == 1.0
    assert retry_rate(alike, anchored(alike, [(0, 1)])) is None  # no right anchor
    lonely = [group([1.0], 0), group([0.0], 1)]
    assert retry_rate(lonely, anchored(lonely, [(0, 0)])) is None
    ragged = [*alike, group([1.0], 3)]  # one that nobody can compare with itself is like the others
    assert retry_rate(ragged, anchored(ragged, [(3, 0)])) == 0.5
    for r in (hinted := group([1, 0], 2)).rollouts:  # no bare try: it is like the others, certain as they are
        r.hint = 0
    mixed = [*certain, hinted]
    assert retry_rate(mixed, anchored(mixed, [(2, 0)])) == 0.5
    unjudged = [replace(anchor, corrections=[]) for anchor in anchored(alike, [(0, 0)])]
    assert retry_rate(alike, unjudged) is None


@pytest.mark.parametrize(("beta", "leave_one_out"), [((2, 2), -0.045), ((8, 2), -0.13), ((2, 8), 0.055)])
def test_retry_rate_is_unbiased_where_prompts_are_chosen_by_their_pass_rate(
    beta: tuple[int, int], leave_one_out: float
) -> None:
    rng, errors, asked = np.random.default_rng(0), [], problem()
    for _ in range(150):
        p = rng.beta(*beta, size=32)
        groups = [
            Group(
                asked, [0], [Rollout(asked, [0], [i], [0.0], "x", float(rng.random() < q), False, 0) for i in range(8)]
            )
            for q in p
        ]
        anchors, _ = select_anchors(groups, 10, 1.0, CorrectionConfig(), fits, rng)
        right = [a.group for a in anchors if a.right]
        others = [(sum(r.reward for r in groups[g].rollouts) - 1) / 7 for g in right]
        for anchor in anchors:
            anchor.corrections = [rollout(1.0)]
        errors.append((retry_rate(groups, anchors) - p[right].mean(), np.mean(others) - p[right].mean()))
    ours, usual = np.mean(errors, axis=0)
    assert abs(ours) < 0.02
    assert usual == pytest.approx(leave_one_out, abs=0.02)
