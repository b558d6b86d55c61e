"""docs/metrics.md explains what a run writes: every column of metrics.jsonl, and no other."""

from pathlib import Path

from test_train import SMALL, metrics, run_dir

from cipo_fast.metric_docs import columns, reference, unexplained
from cipo_fast.train import main

FILE = Path(__file__).parents[1] / "docs" / "metrics.md"
NOT_ALWAYS = {"source/NAME/accuracy", "nudge/hinted", "nudge/hinted_accuracy", "nudge/bare_accuracy"}


def test_it_is_not_stale() -> None:
    assert FILE.read_text(encoding="utf-8") == reference(), f"python -m cipo_fast.metric_docs > {FILE}"


def test_a_runs_columns_and_no_other(tmp_path: Path, warm: Path) -> None:
    folder = run_dir(tmp_path, warm)
    assert main([*SMALL, f"run.dir={folder}", "train.steps=1", "eval.problems=4"]) == 0
    found = set(metrics(folder)[0])
    assert unexplained(found) == set()
    assert set(columns()) - NOT_ALWAYS == found
    assert unexplained({"source/a/b/accuracy", "nudge/hinted", "rollout/lenght"}) == {"rollout/lenght"}
