"""Where a run's numbers go besides its own files: TensorBoard, Weights & Biases. Numbers alone; rollouts are the
report's."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from cipo_fast.config import Config
from cipo_fast.errors import UserError

WANDB_RUN = "wandb_run"  # its id, so that a run that goes on goes on there, too


class Tracker(Protocol):
    def log(self, values: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    def __init__(self, folder: Path, resume_step: int | None):
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        purge = None if resume_step is None else resume_step + 1
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """As WANDB_MODE, WANDB_PROJECT and its other variables say; `offline` needs no account."""

    def __init__(self, config: Config, resume_step: int | None):
        import wandb

        file = config.run_dir / WANDB_RUN
        if resume_step is None or not file.is_file():
            file.write_text(secrets.token_hex(4), encoding="ascii")
        self.run: Any = wandb.init(
            project="cipo_fast",
            name=config.run.name,
            id=file.read_text(encoding="ascii"),
            resume="allow",
            dir=config.run_dir,
            config=config.model_dump(mode="json"),
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()


def check_trackers(config: Config) -> None:
    """UserError for one that is not installed, before anything is written."""
    if "wandb" in config.run.trackers:
        try:
            import wandb  # noqa: F401
        except ImportError:
            raise UserError("run.trackers: wandb is not installed; `pip install -e .[wandb]`") from None


def open_trackers(config: Config, resume_step: int | None) -> list[Tracker]:
    """Those of `run.trackers`, in the run's folder; `resume_step`: the step that the run goes on after."""
    found: list[Tracker] = []
    if "tensorboard" in config.run.trackers:
        found.append(TensorBoard(config.run_dir, resume_step))
    if "wandb" in config.run.trackers:
        found.append(Wandb(config, resume_step))
    return found
