"""A run with hints, from the toy's rows to what is recorded."""

import json
from pathlib import Path

from test_cipo import CHAT
from test_train import SMALL, metrics

from cipo_fast.embedded import hints
from cipo_fast.tasks.problems import read_problems
from cipo_fast.train import main


def test_a_run_with_hints_and_corrections(tmp_path: Path) -> None:
    """From the toy's rows to what is recorded; evaluation and corrections see no hint."""
    small = [*SMALL, "model.embedded.warm_steps=30"]  # answers that end, few of them right
    assert main([*small, f"run.dir={tmp_path / 'bare'}", "train.steps=0", "eval.problems=2"]) == 0
    (folder,) = (tmp_path / "bare" / "warm_start").iterdir()
    rows, hinted, shown = (tmp_path / f"{name}.jsonl" for name in ("rows", "hinted", "shown"))
    rows.write_text("".join((folder / "train.jsonl").open().readlines()[:40]))
    assert hints.main([str(rows), str(hinted)]) == 0
    assert hints.main([str(rows), str(shown), "--shown"]) == 0
    assert [len(read_problems(path)) for path in (hinted, shown)] == [40, 80]
    assert {len(p.hints) for p in read_problems(hinted)} == {2}

    run, data = tmp_path / "run", [f"data.train={hinted}", f"data.eval={folder / 'held_out.jsonl'}"]
    assert main(["embedded.yaml", "nudge.yaml", *SMALL, *data, f"model.path={folder}", f"run.dir={run}"]) == 0
    assert all(0 < row["nudge/hinted"] < 1 for row in metrics(run))
    assert "hints" not in (run / "held_out.jsonl").read_text()
    recorded = [json.loads(line) for path in (run / "rollouts").glob("step-*.jsonl") for line in path.open()]
    assert {r["hint"] for r in recorded} == {None, 0, 1}
    for r in recorded:
        bare = len(CHAT.prompt([{"role": "user", "content": r["prompt"]}], ""))
        told = {None: "", 0: "\n\nbegins 1", 1: "\n\nends 1"}[r["hint"]]  # a token a character
        assert r["prompt_tokens"] == bare + len(told)
        for correction in r["corrections"] or []:  # ... attempt, user turn, its text and end, start of an answer
            assert correction["prompt_tokens"] == bare + r["tokens"] + 1 + len("check") + 2
    assert any(r["corrections"] and r["hint"] is not None for r in recorded)
