"""Learning curves against steps and against sampled tokens, and the differences to the control, as PNG."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cipo_fast.errors import note
from cipo_fast.experiment.results import Estimate, RunResult

if TYPE_CHECKING:
    from cipo_fast.experiment.report import Report

# Okabe and Ito's colours, told apart by colour-blind readers; black is the control's.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("-", "--", ":")
STYLE = {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
    "axes.titlesize": 10, "axes.titlelocation": "left", "legend.frameon": False, "figure.dpi": 150,
}  # fmt: skip
MOST_BANDS = 6  # arms: with more, bands hide one another


def draw(report: Report, out: Path) -> list[Path]:
    """Write the plots into `out`; without matplotlib none, and a line that says so. Raises OSError."""
    try:
        import matplotlib.figure as mpl
        from matplotlib import rc_context
    except ImportError:
        note("no plots: matplotlib is not installed (pip install 'cipo-fast[plots]')")
        return []
    paths = []
    with rc_context(STYLE):
        for against, label in (("steps", "step"), ("tokens", "sampled tokens, millions")):
            paths.append(out / f"curves-by-{against}.png")
            _curves(report, mpl.Figure(figsize=(10, 5.6)), against, label).savefig(paths[-1], bbox_inches="tight")
        if any(row.against for row in report.equal_steps):
            paths.append(out / "differences.png")
            size = (10, 1.4 + 0.32 * len(report.equal_steps))
            _differences(report, mpl.Figure(figsize=size)).savefig(paths[-1], bbox_inches="tight")
    return paths


def _curves(report: Report, figure: Any, against: str, label: str) -> Any:
    """A panel each of figures and rho: an arm's mean over seeds, and a band from its lowest seed to its highest."""
    panels = {name: f"accuracy {label}" if name.startswith("after") else label for name, label in _shown(report)}
    axes = figure.subplots(2, 3).flat
    looks = _looks(report)
    bands = len(looks) <= MOST_BANDS
    for (name, title), axis in zip([*panels.items(), ("rho", "rho, share of right anchors")], axes, strict=False):
        for arm, results in report.arms.items():
            curves = [_curve(result, name, against) for result in results]
            curves = [curve for curve in curves if curve.size]
            if not curves:
                continue
            shortest = min(len(curve) for curve in curves)
            x, y = np.stack([curve[:shortest] for curve in curves]).transpose(2, 0, 1)  # [seeds, points] each
            axis.plot(x.mean(0), y.mean(0), label=arm, **looks[arm])
            if bands and len(curves) > 1:
                axis.fill_between(x.mean(0), y.min(0), y.max(0), color=looks[arm]["color"], alpha=0.13, linewidth=0)
        axis.set_title(title)
        axis.set_xlabel(label)
    for axis in list(figure.axes)[len(panels) + 1 :]:
        axis.remove()
    about = "mean over seeds, band from the lowest to the highest" if bands else "mean over seeds"
    seeds = len(report.grid.experiment.seeds)
    figure.suptitle(f"{report.grid.experiment.name}: {about} ({seeds} seeds)", x=0.01, ha="left")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.tight_layout()
    figure.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=min(len(labels), 8))
    return figure


def _shown(report: Report) -> Iterator[tuple[str, str]]:
    """(figure, label) of the panels."""
    columns = report.columns
    largest = [name for name in columns if name.startswith("pass_at_")][-1:]
    for name in ("t1", *largest, "wrong_to_right", "right_to_wrong", "after_check_1"):
        if name in columns:
            yield name, columns[name]


def _curve(result: RunResult, name: str, against: str) -> np.ndarray:
    """[points, 2]: where, and the value."""
    if name == "rho":
        points = [(step if against == "steps" else sampled / 1e6, rho) for step, sampled, rho in result.rho]
    else:
        found = [(point, point.figures.get(name)) for point in result.points]
        points = [
            (point.step if against == "steps" else point.sampled / 1e6, value)
            for point, value in found
            if value is not None
        ]
    return np.array(points)


def _looks(report: Report) -> dict[str, dict[str, Any]]:
    """How each arm is drawn; the control in black."""
    control = report.grid.experiment.control
    looks: dict[str, dict[str, Any]] = {}
    for arm in report.arms:
        if arm == control:
            looks[arm] = {"color": "black", "linewidth": 1.8, "zorder": 3}
            continue
        n = len(looks) - (control in looks)
        looks[arm] = {"color": COLORS[n % len(COLORS)], "linestyle": DASHES[n // len(COLORS) % len(DASHES)]}
    return looks


def _differences(report: Report, figure: Any) -> Any:
    """A panel a figure: each arm minus the control, its interval, and the seeds' own differences as small dots."""
    panels = list(_shown(report))
    rows = [row for row in report.equal_steps if row.against][::-1]
    looks = _looks(report)
    for axis, (name, label) in zip(figure.subplots(1, len(panels), sharey=True), panels, strict=True):
        axis.axvline(0, color="black", linewidth=1)
        for y, row in enumerate(rows):
            _whisker(axis, y, row.against.get(name), looks[row.arm]["color"])
        axis.set_title(label)
        axis.locator_params(axis="x", nbins=4)  # labels that do not touch
        axis.set_yticks(range(len(rows)), [row.arm for row in rows])
        axis.set_ylim(-0.6, len(rows) - 0.4)
    control = report.grid.experiment.control
    figure.suptitle(f"minus {control} at step {report.step}: 95% intervals, and each seed", x=0.01, ha="left")
    figure.tight_layout()
    return figure


def _whisker(axis: Any, y: int, found: Estimate | None, color: str) -> None:
    if found is None or found.value is None:
        return
    axis.plot([found.low, found.high], [y, y], color=color, linewidth=2, solid_capstyle="butt")
    axis.plot(found.value, y, "o", color=color, markersize=5)
    own: Sequence[float] = [value for value in found.seeds if value is not None]
    axis.plot(own, [y + 0.22] * len(own), "o", color=color, markersize=2.5, alpha=0.6)
