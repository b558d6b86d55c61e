"""What a run writes to its directory: config, metrics, rollouts, the summary."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from cipo_fast.checkpoint import Progress
from cipo_fast.config import Config
from cipo_fast.provenance import commit, machine, software
from cipo_fast.recorded_rows import RowWriter
from cipo_fast.records import Anchor, Group, Problem, Rollout
from cipo_fast.run_dir import Opened, enter
from cipo_fast.tasks.own import ORIGINAL
from cipo_fast.trackers import Tracker, open_trackers

STARTED = "started.jsonl"  # a line each time that the run is begun or gone on with: when, by what, on what


class Recorder:
    """Writes to `config.run_dir`. Every rank has one; all but the construction is the first rank's."""

    def __init__(self, config: Config, pieces: Callable[[Sequence[int]], list[str]] | None = None):
        """`pieces` gives the text of each token; without it no tokens are written."""
        self.config = config
        self.pieces = pieces
        self.dir = config.run_dir
        self.save_rollouts_every = config.run.save_rollouts_every
        self.rows = RowWriter(self.dir / "rollouts")
        self.metrics: TextIO | None = None
        self.trackers: list[Tracker] = []

    def open(self, opened: Opened, resume_step: int | None, held_out: Sequence[Problem]) -> None:
        """A new run moves an earlier one's files to `previous/`; a resumed one goes on in them, without what they hold
        from after `resume_step`. `held_out`, what its tables are of, is written as rows for `data.eval`."""
        enter(self.config, opened, resume_step)
        if resume_step is None:
            text = "".join(json.dumps(_row(p), ensure_ascii=False) + "\n" for p in held_out)
            (self.dir / "held_out.jsonl").write_text(text, encoding="utf-8")
        started = {"step": resume_step or 0, "ranks": opened.inputs.get("ranks"), **software(), "commit": commit()}
        with (self.dir / STARTED).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"date": time.strftime("%Y-%m-%d %H:%M"), **started, **machine()}) + "\n")
        self.metrics = (self.dir / "metrics.jsonl").open("a", buffering=1, encoding="utf-8")
        self.trackers = open_trackers(self.config, resume_step)

    def step(self, metrics: dict[str, Any], groups: list[Group], anchors: list[Anchor]) -> None:
        assert self.metrics is not None
        self.metrics.write(json.dumps(metrics) + "\n")
        step = metrics["step"]
        self._track({key: value for key, value in metrics.items() if key not in ("step", "seed")}, step)
        if self.save_rollouts_every and step % self.save_rollouts_every == 0:
            self._rollouts(step, groups, anchors)

    def evaluation(self, result: dict[str, float | None], progress: Progress) -> None:
        """A row of eval.jsonl: the figures, and what training had taken till then. A run that ended between this and
        its next checkpoint evaluates this step again: the new row takes the old one's place."""
        step = progress.step
        spent = {
            "tokens/sampled": progress.sampled_tokens,
            "flops/total": progress.flops,
            "seconds": progress.seconds,
        }
        row = {"step": step, **spent, **{f"eval/{key}": value for key, value in result.items()}}
        path = self.dir / "eval.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        others = [line for line in lines if json.loads(line)["step"] != step]
        _write_whole(path, "".join(f"{line}\n" for line in [*others, json.dumps(row)]))
        self._track({f"eval/{key}": value for key, value in result.items()}, step)

    def summary(self, summary: dict[str, Any]) -> None:
        _write_whole(self.dir / "summary.json", json.dumps(summary, indent=1))

    def tokens_saved(self) -> float | None:
        """Share of tokens that sharing saved, over all steps of the run."""
        lines = [json.loads(line) for line in (self.dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        rows = sum(line["tokens/rows"] for line in lines)
        return 1 - sum(line["tokens/forwarded"] for line in lines) / rows if rows else None

    def close(self) -> None:
        if self.metrics is not None:
            with suppress(OSError):  # a full disk: what it holds back has been reported
                self.metrics.close()
        for tracker in self.trackers:
            tracker.close()

    def _track(self, values: dict[str, Any], step: int) -> None:
        for tracker in self.trackers:
            tracker.log({key: value for key, value in values.items() if isinstance(value, int | float)}, step)

    def _rollouts(self, step: int, groups: list[Group], anchors: list[Anchor]) -> None:
        """rollouts/step-N.jsonl: one object a rollout, its corrections (if it was an anchor) inside it. The row that it
        was judged by is in problems.jsonl: enough to judge it again."""
        corrections = {(a.group, a.index): [self._record(c) for c in a.corrections] for a in anchors}
        folder = self.dir / "rollouts"
        folder.mkdir(exist_ok=True)
        names = self.rows.write(group.problem for group in groups)
        with (folder / f"step-{step:05d}.jsonl").open("w", encoding="utf-8") as file:
            for g, group in enumerate(groups):
                asked = {
                    "problem": names[group.problem.id],
                    "prompt": group.problem.messages[-1]["content"],
                    "answer": group.problem.row.get("answer"),
                    "source": group.problem.source,
                }
                for i, rollout in enumerate(group.rollouts):
                    seen = {"hint": rollout.hint} if self.config.nudge.hints else {}  # its place; null: none
                    record = {**asked, **seen, **self._record(rollout), "corrections": corrections.get((g, i))}
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def _record(self, rollout: Rollout) -> dict[str, Any]:
        record = _record(rollout)
        if rollout.tokens is None or self.pieces is None:
            return record
        return record | {
            "token_texts": self.pieces(rollout.token_ids),
            "sampler_logps": _rounded(rollout.sampler_logps),
            "trainer_logps": _rounded(rollout.tokens.logps) or None,
            "entropies": _rounded(rollout.tokens.entropies) or None,
        }


def _rounded(values: Sequence[float]) -> list[float | None]:
    """To 1e-4, what a colour needs: by `round` it would take ten times as long. JSON has no NaN."""
    if math.isfinite(sum(values)):
        return [int(value * 1e4 + (0.5 if value > 0 else -0.5)) / 1e4 for value in values]
    return [round(value, 4) if math.isfinite(value) else None for value in values]


def _write_whole(path: Path, text: str) -> None:
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.rename(path)


def _row(problem: Problem) -> dict[str, Any]:
    """As `data.eval` takes it. The row of a user's function is kept as it stood in its file; inside another where that
    would not ask the same again (a data set's own form, an instruction added)."""
    asked = {"id": problem.id, "messages": problem.messages}
    if problem.verifier == "exact":
        return {**asked, "answer": problem.answer}
    if ".py:" not in problem.verifier:
        return {**problem.row, **asked}
    if _asked_by(problem.row) == list(problem.messages):
        return {**problem.row, "id": problem.id}
    return {**asked, "verifier": problem.verifier, ORIGINAL: dict(problem.fields)}


def _asked_by(row: dict[str, Any]) -> Any:
    shown = row.get("prompt") if row.get("messages") is None else row["messages"]
    return [{"role": "user", "content": shown}] if isinstance(shown, str) else shown


def _record(rollout: Rollout) -> dict[str, Any]:
    return {
        "text": rollout.text,
        "reward": rollout.reward,
        "verdict": rollout.verdict,
        "why": rollout.why,
        "prompt_tokens": len(rollout.prompt_ids),
        "tokens": len(rollout.token_ids),
        "truncated": rollout.truncated,
        "policy_version": rollout.policy_version,
        "advantage": rollout.advantage,
    }
