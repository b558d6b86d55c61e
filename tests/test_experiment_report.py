"""Figures over seeds, their intervals, and the report, against records made by hand."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from cipo_fast.errors import UserError
from cipo_fast.evaluation.records import Answer, Chain, Record
from cipo_fast.experiment.grid import Grid, read_grid
from cipo_fast.experiment.report import as_json, as_markdown, make_report, publish, write_report
from cipo_fast.experiment.results import Sample, differences, estimates, sample_of

GRID = """
name: by_hand
about: Two arms.
settings: {train.steps: 20, eval.every: 10}
seeds: [0, 1]
control: plain
arms:
  plain: {configs: [grpo.yaml]}
  ours: {}
"""


def answer(right: bool) -> Answer:
    return Answer("x", 3, float(right), "right" if right else "wrong", False, "x")


def record(problem: str, right: int, n: int = 8, corrected: bool = False) -> Record:
    """`right` of n attempts are right; the last attempt, shown back, becomes `corrected`."""
    attempts = [answer(i < right) for i in range(n)]
    return Record(problem, "test", n, 1, answer(right > 0), attempts, [Chain(n - 1, [answer(corrected)])])


def shares(*rows: float, problems: str = "abcdefgh") -> Sample:
    """A figure `f` that is rows[p] for each problem."""
    ones = np.ones((len(rows), 1))
    return Sample(tuple(problems[: len(rows)]), ("f",), np.array(rows)[:, None], ones)


# ------------------------------------------------------------------------------------------------------- statistics


def test_a_mean_over_seeds_is_of_the_runs_own_ratios() -> None:
    samples = [sample_of([record("a", 8), record("b", 0)]), sample_of([record("a", 2), record("b", 2)])]
    found = estimates(samples)
    assert found["t1"].seeds == (0.5, 0.25)
    assert found["t1"].value == pytest.approx(0.375)
    assert found["pass_at_8"].seeds == (0.5, 1.0)


def test_seeds_that_disagree_make_the_interval() -> None:
    """Problems alike, seeds at 0 and 1: a mean of two draws is 0, 1/2 or 1, the ends a quarter of the time each."""
    found = estimates([shares(0, 0, 0, 0), shares(1, 1, 1, 1)])["f"]
    assert (found.value, found.low, found.high) == (0.5, 0.0, 1.0)


def test_one_seed_has_the_interval_of_its_problems() -> None:
    rng = np.random.default_rng(0)
    rows = rng.random(200)
    names = tuple(str(i) for i in range(200))
    found = estimates([Sample(names, ("f",), rows[:, None], np.ones((200, 1)))])["f"]
    error = rows.std() / np.sqrt(200)
    assert found.value == pytest.approx(rows.mean())
    assert (found.low, found.high) == pytest.approx(
        (rows.mean() - 1.96 * error, rows.mean() + 1.96 * error), abs=0.15 * error
    )


def test_a_difference_is_paired_over_problems_and_seeds() -> None:
    """Each arm varies over problems and seeds alone; what they differ by does not."""
    control = [shares(0, 0.2, 0.9, 0.1), shares(0.8, 0.3, 0.7, 0.6, problems="efgh")]
    arm = [shares(0.1, 0.3, 1.0, 0.2), shares(0.9, 0.4, 0.8, 0.7, problems="efgh")]
    found = differences(arm, control)["f"]
    assert (found.value, found.low, found.high) == pytest.approx((0.1, 0.1, 0.1))
    assert found.seeds == pytest.approx((0.1, 0.1))
    alone = estimates(arm)["f"]
    assert alone.high - alone.low > 0.3


def test_the_order_of_problems_does_not_matter_and_others_are_left_out() -> None:
    control = shares(0.0, 0.5, 1.0, problems="abc")
    turned = shares(1.0, 0.5, 0.0, 0.7, problems="cbax")
    found = differences([turned], [control])["f"]
    assert (found.value, found.low, found.high) == (0.0, 0.0, 0.0)


def test_a_figure_that_counts_nothing_has_no_value() -> None:
    nothing = Sample(("a", "b"), ("f",), np.zeros((2, 1)), np.zeros((2, 1)))
    found = estimates([nothing, nothing])["f"]
    assert (found.value, found.low, found.high, found.seeds) == (None, None, None, (None, None))


# ----------------------------------------------------------------------------------------------------------- report


@pytest.fixture
def grid(tmp_path: Path) -> Grid:
    """`plain` samples 100 tokens a step and gets 4 of 8 right at the end; `ours` 200, and 6."""
    file = tmp_path / "by_hand.yaml"
    file.write_text(GRID)
    found = read_grid(str(file), tmp_path / "out")
    for run in found.runs:
        ours = run.arm == "ours"
        rate = 200 if ours else 100
        run.dir.mkdir(parents=True)
        rows = [
            {"step": s, "tokens/sampled": rate, "tokens/forwarded": 2 * rate, "replay/rho": 0.3} for s in range(1, 21)
        ]
        (run.dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        evaluated = []
        for step in (0, 10, 20):
            right = 2 + (step // 10) * (2 if ours else 1)
            folder = run.dir / "evaluations" / f"step-{step:05d}"
            folder.mkdir(parents=True)
            lines = [record(f"{run.seed}-{p}", right, corrected=ours).line() for p in range(4)]
            (folder / "samples.jsonl").write_text("".join(lines))
            spent = {"tokens/sampled": rate * step, "flops/total": 1e6 * step, "seconds": 0.5 * step}
            evaluated.append({"step": step, **spent, "eval/t1": right / 8})
        (run.dir / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in evaluated))
        (run.dir / "summary.json").write_text("{}")
    return found


def test_equal_steps_and_equal_tokens(grid: Grid) -> None:
    report = make_report(grid)
    assert (report.step, report.budget) == (20, 2000)
    assert [row.figures["t1"].value for row in report.equal_steps] == [0.5, 0.75]
    assert report.equal_steps[1].against["t1"].seeds == (0.25, 0.25)
    plain, ours = report.equal_tokens
    assert [point.step for point in plain.points] == [20, 20]
    assert [(point.step, point.sampled, point.trained) for point in ours.points] == [(10, 2000, 4000)] * 2
    assert ours.against["t1"].value == 0.0
    assert plain.against == {}


def test_an_arm_that_runs_longer_is_given_its_tokens(grid: Grid) -> None:
    """`plain` goes on to step 40, where it has sampled what `ours` has at step 20."""
    for run in grid.of("plain"):
        for name, more in (("metrics.jsonl", range(21, 41)), ("eval.jsonl", (40,))):
            lines = (run.dir / name).read_text().splitlines()
            rows = [{**json.loads(lines[-1]), "step": step} for step in more]
            rows = [{**row, "tokens/sampled": 100 if name == "metrics.jsonl" else 4000} for row in rows]
            (run.dir / name).write_text("".join(f"{line}\n" for line in [*lines, *map(json.dumps, rows)]))
        samples = (run.dir / "evaluations" / "step-00020").rename(run.dir / "evaluations" / "step-00040")
        shutil.copytree(samples, samples.with_name("step-00020"))
    report = make_report(grid)
    assert (report.step, report.budget) == (20, 4000)
    assert [[point.step for point in row.points] for row in report.equal_tokens] == [[40, 40], [20, 20]]


@pytest.mark.parametrize(
    ("name", "kept", "said"),
    [
        ("eval.jsonl", 0, "eval.jsonl: holds no evaluation"),
        ("metrics.jsonl", 9, "not those of one whole run of this version (IndexError"),
    ],
)
def test_files_that_are_not_a_runs(grid: Grid, name: str, kept: int, said: str) -> None:
    file = grid.runs[0].dir / name
    file.write_text("".join(f"{line}\n" for line in file.read_text().splitlines()[:kept]))
    with pytest.raises(UserError, match=re.escape(said)):
        make_report(grid)


def test_a_run_from_before_compute_was_accounted_is_named(grid: Grid) -> None:
    file = grid.runs[0].dir / "eval.jsonl"
    file.write_text(file.read_text().replace("tokens/sampled", "tokens/other"))
    with pytest.raises(UserError, match=r"plain-seed0: .* \(KeyError: 'tokens/sampled'\)"):
        make_report(grid)


def test_what_is_written(grid: Grid, tmp_path: Path) -> None:
    write_report(make_report(grid))
    text = (grid.out / "results.md").read_text()
    arms = {line.split(" | ")[0].strip("| ") for line in text.splitlines()}
    assert "| .750<br>[.750, .750] | 1.000<br>[1.000, 1.000] |" in text
    assert text.count("| +.250<br>[+.250, +.250]<br>+.250 +.250 |") == 1
    assert "`correction.lambda_corr=0.0`" in text
    assert "| 10 | 2.0k | 4.0k | 1.00e+07 | 5 |" in text
    assert {"before (plain)", "before (ours)"} <= arms  # their checks differ before training already
    found = json.loads((grid.out / "results.json").read_text())
    assert found["equal_tokens"]["arms"][1]["figures"]["t1"]["value"] == 0.5
    assert found["curves"]["ours"]["1"][2]["sampled"] == 4000
    publish(grid.out, tmp_path / "docs" / "by_hand")
    copied = {path.name for path in (tmp_path / "docs" / "by_hand").iterdir()}
    assert {"results.md", "results.json"} <= copied <= {path.name for path in grid.out.iterdir()}
    assert not [name for name in copied if "seed" in name]


def test_plots_are_drawn(grid: Grid) -> None:
    pytest.importorskip("matplotlib")
    write_report(make_report(grid))
    for name in ("curves-by-steps.png", "curves-by-tokens.png", "differences.png"):
        assert (grid.out / name).read_bytes().startswith(b"\x89PNG")
        assert f"]({name})" in (grid.out / "results.md").read_text()


def test_a_report_without_matplotlib(
    grid: Grid, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    write_report(make_report(grid))
    assert "cipo-fast[plots]" in capsys.readouterr().err
    assert ".png" not in (grid.out / "results.md").read_text()


def test_runs_that_have_not_ended_are_named_and_left_out(grid: Grid) -> None:
    (grid.of("ours")[1].dir / "summary.json").unlink()
    report = make_report(grid)
    assert [row.seeds for row in report.equal_steps] == [(0, 1), (0,)]
    assert report.equal_steps[1].against["t1"].seeds == (0.25,)
    write_report(report)
    assert "**Not in it, since they have not ended: ours-seed1.**" in (grid.out / "results.md").read_text()


def test_files_below_this_folder_are_named_from_it(grid: Grid, tmp_path: Path, monkeypatch) -> None:
    """Results are committed: elsewhere the folder has another name."""
    for run in grid.runs:
        run.config.data.train = [str(tmp_path / "rows.jsonl"), "/elsewhere/rows.jsonl"]
    monkeypatch.chdir(tmp_path)
    text = as_markdown(make_report(grid), [])
    assert 'data.train=["./rows.jsonl", "/elsewhere/rows.jsonl"]' in text
    assert as_json(make_report(grid))["settings"]["ours"]["data.train"][0] == "./rows.jsonl"
