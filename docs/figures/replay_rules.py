"""docs/figures/replay_rules.png: the two rules of the replay controller on simulated, noisy retention.

    python docs/figures/replay_rules.py          (from the repository's root; needs matplotlib)

A step has 32 anchors, round(32 rho) of them right, each with 8 corrections that stay right with a given probability:
retention does not answer to rho here, so that what moves rho is the rule alone. Both rules aim at 0.8 (a retry attains
0.6, tau_beyond is set to 0.5). Prints the mean drift of log rho a step, and the retention at which there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from cipo_fast.cipo.replay import ReplayState, update_replay
from cipo_fast.config import ReplayConfig

ANCHORS, CORRECTIONS, STEPS, SEEDS = 32, 8, 240, 50
RULES = {
    "literal, not smoothed [f2f]": ReplayConfig(rule="literal", rho_min=0.2, ema_decay=0.0, n_min=1),
    "literal, smoothed": ReplayConfig(rule="literal", rho_min=0.2),
    "attainable": ReplayConfig(tau_beyond=0.5, rho_min=0.2),
}
RETENTIONS = (0.70, 0.77, 0.80, 0.83, 0.90)
Course = Callable[[int], tuple[float, float]]  # step -> (retention, what a retry attains)


def states(config: ReplayConfig, course: Course, seed: int, rho: float | None = None) -> Iterator[ReplayState]:
    """The controller's states after each step; with `rho` every step starts from it, so that only drift shows."""
    rng, state = np.random.default_rng(seed), ReplayState(config.rho0)
    for step in range(STEPS):
        state = state if rho is None else replace(state, rho=rho)
        retention, attainable = course(step)
        kept = rng.random(CORRECTIONS * round(ANCHORS * state.rho)) < retention
        retried = rng.binomial(7 * ANCHORS, attainable) / (7 * ANCHORS)
        state = update_replay(state, kept.astype(float).tolist(), retried, config)
        yield state


def constant(retention: float) -> Course:
    return lambda step: (retention, 0.6)


def learning(step: int) -> tuple[float, float]:
    """T=1 accuracy rises from 0.2 to 0.6; retention is half of the way from it to 1 throughout."""
    attainable = 0.2 + 0.4 * step / STEPS
    return (1 + attainable) / 2, attainable


def plot_courses(axes: Axes, config: ReplayConfig, course: Course, label: str, color: object, line: str = "-") -> None:
    """Median over seeds, and the middle four fifths of them."""
    rho = np.array([[state.rho for state in states(config, course, seed)] for seed in range(SEEDS)])
    low, middle, high = np.quantile(rho, [0.1, 0.5, 0.9], axis=0)
    steps = np.arange(1, STEPS + 1)
    axes.fill_between(steps, low, high, color=color, alpha=0.18, linewidth=0)
    axes.plot(steps, middle, line, color=color, label=label)


def figure() -> None:
    fig, panels = plt.subplots(2, 2, figsize=(10, 6.4), sharex=True, sharey=True, layout="constrained")
    colors = plt.get_cmap("viridis")(np.linspace(0.0, 0.9, len(RETENTIONS)))
    for axes, (name, config) in zip(panels.flat, RULES.items(), strict=False):
        for retention, color in zip(RETENTIONS, colors, strict=True):
            plot_courses(axes, config, constant(retention), f"{retention:.2f}", color)
        axes.set_title(name)
    panels[0, 0].legend(title="retention (aim: 0.80)", ncols=2, loc="center right", framealpha=0.9)
    last = panels[1, 1]
    looks = (("tab:red", "-"), ("black", ":"), ("tab:blue", "-"))
    for (name, config), (color, line) in zip(RULES.items(), looks, strict=True):
        plot_courses(last, config, learning, name, color, line)
    last.set_title("a policy that learns: T=1 from 0.2 to 0.6,\nretention half of the way from there to 1", fontsize=10)
    last.legend(loc="upper left", bbox_to_anchor=(0.02, 0.88))
    for axes in panels.flat:
        axes.grid(alpha=0.3)
        axes.set_ylim(0.15, 0.85)
    for axes in panels[1]:
        axes.set_xlabel("step")
    for axes in panels[:, 0]:
        axes.set_ylabel("rho")
    fig.savefig(Path(__file__).with_suffix(".png"), dpi=110)


def drift(config: ReplayConfig, retention: float, rho: float) -> float:
    """Mean change of log rho a step, away from its bounds."""
    free = config.model_copy(update={"rho_min": 1e-6, "rho_max": 1.0})
    return float(np.mean([np.log([s.rho / rho for s in states(free, constant(retention), n, rho)]) for n in range(20)]))


def without_drift(config: ReplayConfig, rho: float) -> float:
    """The retention at which log rho stays, by bisection."""
    low, high = 0.7, 0.95
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (middle, high) if drift(config, middle, rho) > 0 else (low, middle)
    return (low + high) / 2


if __name__ == "__main__":
    print("drift of log rho a step at rho 0.3, by retention; the retention without drift at rho 0.2, 0.3, 0.6")
    for rule, settings in RULES.items():
        drifts = "  ".join(f"{r:.2f}: {drift(settings, r, 0.3):+.3f}" for r in RETENTIONS)
        print(f"{rule:<28} {drifts};  " + ", ".join(f"{without_drift(settings, rho):.3f}" for rho in (0.2, 0.3, 0.6)))
    figure()
