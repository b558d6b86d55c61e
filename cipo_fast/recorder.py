"""What a run writes to its directory: config, metrics, TensorBoard, rollouts, the summary."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from cipo_fast.config import Config
from cipo_fast.errors import UserError
from cipo_fast.records import Anchor, Group, Rollout

# What one run writes, and the next one sets aside.
OUTPUTS = ("config.yaml", "metrics.jsonl", "rollouts", "tensorboard", "checkpoints", "summary.json", "model", "failed")


class Recorder:
    """Opens `config.run_dir`. A new run moves an earlier one's files to `previous/`; a resumed one goes on in them,
    without what they hold from after `resume_step`."""

    def __init__(self, config: Config, resume_step: int | None):
        self.config = config
        self.dir = config.run_dir
        self.save_rollouts_every = config.run.save_rollouts_every
        self.dir.mkdir(parents=True, exist_ok=True)
        if resume_step is None:
            set_aside(self.dir)
        else:
            _forget_after(self.dir, resume_step)
        (self.dir / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
        self.metrics = (self.dir / "metrics.jsonl").open("a", buffering=1, encoding="utf-8")
        self.tensorboard = None
        if config.run.tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            purge = None if resume_step is None else resume_step + 1
            self.tensorboard = SummaryWriter(str(self.dir / "tensorboard"), purge_step=purge)

    def step(self, metrics: dict[str, Any], groups: list[Group], anchors: list[Anchor]) -> None:
        self.metrics.write(json.dumps(metrics) + "\n")
        step = metrics["step"]
        if self.tensorboard is not None:
            for key, value in metrics.items():
                if isinstance(value, int | float) and key not in ("step", "seed"):
                    self.tensorboard.add_scalar(key, value, step)
        if self.save_rollouts_every and step % self.save_rollouts_every == 0:
            self._rollouts(step, groups, anchors)

    def evaluation(self, result: dict[str, float | None], step: int) -> None:
        if self.tensorboard is not None:
            for key, value in result.items():
                if value is not None:
                    self.tensorboard.add_scalar(f"eval/{key}", value, step)

    def summary(self, summary: dict[str, Any]) -> None:
        part = self.dir / "summary.json.part"
        part.write_text(json.dumps(summary, indent=1), encoding="utf-8")
        part.rename(self.dir / "summary.json")

    def tokens_saved(self) -> float | None:
        """Share of tokens that sharing saved, over all steps of the run."""
        lines = [json.loads(line) for line in (self.dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        rows = sum(line["tokens/rows"] for line in lines)
        return 1 - sum(line["tokens/forwarded"] for line in lines) / rows if rows else None

    def close(self) -> None:
        self.metrics.close()
        if self.tensorboard is not None:
            self.tensorboard.close()

    def _rollouts(self, step: int, groups: list[Group], anchors: list[Anchor]) -> None:
        """rollouts/step-N.jsonl: one object a rollout, its corrections (if it was an anchor) inside it."""
        corrections = {(a.group, a.index): [_record(c) for c in a.corrections] for a in anchors}
        folder = self.dir / "rollouts"
        folder.mkdir(exist_ok=True)
        with (folder / f"step-{step:05d}.jsonl").open("w", encoding="utf-8") as file:
            for g, group in enumerate(groups):
                asked = {
                    "problem": group.problem.id,
                    "prompt": group.problem.messages[-1]["content"],
                    "answer": group.problem.answer,
                }
                for i, rollout in enumerate(group.rollouts):
                    record = {**asked, **_record(rollout), "corrections": corrections.get((g, i))}
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")


def _record(rollout: Rollout) -> dict[str, Any]:
    return {
        "text": rollout.text,
        "reward": rollout.reward,
        "prompt_tokens": len(rollout.prompt_ids),
        "tokens": len(rollout.token_ids),
        "truncated": rollout.truncated,
        "policy_version": rollout.policy_version,
    }


def check_writable(folder: Path) -> None:
    """Raise UserError unless files can be made in `folder`, to be asked first of all; nothing is left behind."""
    made: list[Path] = []
    try:
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0" * 4096)
    except OSError as error:
        raise UserError(f"run.dir={folder}: cannot write there: {error.strerror}; name another folder") from None
    finally:
        for path in made:
            with suppress(OSError):  # another run begins in it, or it was not made
                path.rmdir()


def set_aside(run_dir: Path) -> None:
    """Move an earlier run's files to `previous/<time it ended>/`: nothing is overwritten."""
    found = [run_dir / name for name in OUTPUTS if (run_dir / name).exists()]
    if found:
        ended = max(path.stat().st_mtime for path in found)
        stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(ended))
        target = run_dir / "previous" / stamp
        while target.exists():
            target = target.with_name(target.name + "+")
        target.mkdir(parents=True)
        for path in found:
            shutil.move(path, target / path.name)


def _forget_after(run_dir: Path, step: int) -> None:
    metrics = run_dir / "metrics.jsonl"
    if metrics.exists():
        lines = [line for line in metrics.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
        part = metrics.with_suffix(".part")
        kept = "".join(line for line in lines if json.loads(line)["step"] <= step)
        part.write_text(kept, encoding="utf-8")
        part.rename(metrics)
    for path in (run_dir / "rollouts").glob("step-*.jsonl"):
        if int(path.stem[5:]) > step:
            path.unlink()
