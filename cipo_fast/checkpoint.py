"""Save, exact resume, Hugging Face export.

A checkpoint is a folder `checkpoints/step-N/`: torch.distributed.checkpoint's shards of weights and optimiser, and
state.json. Nothing else is needed: every random choice is a function of seed and step. It is written beside its final
name and renamed when whole, so a folder with that name is complete.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
import transformers
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from cipo_fast.cipo.replay import ReplayState
from cipo_fast.distributed import on_main
from cipo_fast.errors import TrainingStopped, UserError
from cipo_fast.learner import Learner


@dataclass(frozen=True)
class Progress:
    """What the loop carries from step to step, besides weights and optimiser."""

    step: int  # steps done
    replay: ReplayState
    skipped: int = 0  # non-finite updates so far
    skipped_in_a_row: int = 0
    before: dict[str, float | None] | None = None  # the evaluation before training
    seconds: float = 0.0  # of training, over all of the run's processes

    def after_step(self, replay: ReplayState, applied: Sequence[bool], seconds: float) -> Progress:
        """One step on; `applied` says which of its updates were finite."""
        in_a_row = self.skipped_in_a_row
        for good in applied:
            in_a_row = 0 if good else in_a_row + 1
        return replace(
            self,
            step=self.step + 1,
            replay=replay,
            skipped=self.skipped + sum(not good for good in applied),
            skipped_in_a_row=in_a_row,
            seconds=self.seconds + seconds,
        )


def save(folder: Path, learner: Learner, progress: Progress, keep: int) -> Path:
    """Write `folder/step-N`, then remove all but the newest `keep`. A collective."""
    final = folder / f"step-{progress.step}"
    part = folder / f"step-{progress.step}.part"

    def begin() -> None:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)

    def end() -> None:
        (part / "state.json").write_text(json.dumps(asdict(progress), indent=1), encoding="utf-8")
        shutil.rmtree(final, ignore_errors=True)
        part.rename(final)
        for old in saved(folder)[:-keep]:
            shutil.rmtree(old)

    on_main(begin)
    model, optimizer = get_state_dict(learner.policy, learner.optimizer)
    try:
        dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=part)
    except CheckpointException as failure:  # of any rank, told on all; no Exception, to torch
        rank, (error, _) = next(iter(failure.failures.items()))
        raise TrainingStopped(f"{part}: rank {rank} could not write it: {type(error).__name__}: {error}") from None
    on_main(end)
    return final


def saved(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if re.fullmatch(r"step-\d+", p.name)), key=lambda p: int(p.name[5:]))


def load_newest(folder: Path, learner: Learner) -> Progress:
    """Restore weights and optimiser from the newest checkpoint; raises UserError where there is none. A collective."""
    found = saved(folder)
    if not found:
        raise UserError(f"checkpoint.resume=true, but {folder} holds no checkpoint: start without it")
    model, optimizer = get_state_dict(learner.policy, learner.optimizer)
    state: dict[str, Any] = {"model": model, "optimizer": optimizer}
    try:
        dcp.load(state, checkpoint_id=found[-1])
        record = json.loads((found[-1] / "state.json").read_text(encoding="utf-8"))
    except Exception as error:
        reason = str(error).strip().splitlines()[-1][:200]
        raise UserError(
            f"{found[-1]}: cannot be loaded into this model ({reason}); was it saved by another config?"
        ) from None
    set_state_dict(
        learner.policy, learner.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    return Progress(**{**record, "replay": ReplayState(**record["replay"])})


def export(
    folder: Path, model: PreTrainedModel, weights: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Write what `AutoModelForCausalLM.from_pretrained(folder)` loads: `model`'s config with whole `weights`."""
    transformers.utils.logging.disable_progress_bar()
    # transformers refuses to write generation configs that it reads (a temperature without do_sample, as many models
    # have it): a run would fail with its last line. The model's own goes along as it is.
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        model.save_pretrained(folder, state_dict=weights)
    finally:
        model.generation_config = own
    if own is not None:
        own.to_json_file(folder / "generation_config.json", keys_to_pop=["compile_config"])
    tokenizer.save_pretrained(folder)
