"""Save, exact resume, Hugging Face export.

A checkpoint is a folder `checkpoints/step-N/`: torch.distributed.checkpoint's shards of weights and optimiser, and
state.json. Nothing else is needed: every random choice is a function of seed and step. It is written beside its final
name, to the disk, with the checksums of all its files in manifest.json last, and renamed when whole. Before it is read
every file is compared, so one that was cut short or has rotted is passed over for the one before.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
import transformers
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from cipo_fast.cipo.replay import ReplayState
from cipo_fast.distributed import from_main, gather, on_main, share
from cipo_fast.errors import RankFailure, TrainingStopped, UserError
from cipo_fast.learner import Learner
from cipo_fast.model import named_tensors


@dataclass(frozen=True)
class Progress:
    """What the loop carries from step to step, besides weights and optimiser."""

    step: int  # steps done
    replay: ReplayState
    skipped: int = 0  # non-finite updates so far
    skipped_in_a_row: int = 0  # at the end of the step
    most_in_a_row: int = 0  # at any time of the step
    before: dict[str, float | None] | None = None  # the evaluation before training
    evaluated: int = 0  # step of the last evaluation that was recorded
    seconds: float = 0.0  # of training, over all of the run's processes
    sampled_tokens: int = 0  # of all answers that training sampled
    flops: float = 0.0  # of sampling and training (updates.py says what counts)

    def after_step(self, replay: ReplayState, applied: Sequence[bool], seconds: float) -> Progress:
        """One step on; `applied` says which of its updates were finite."""
        in_a_row, most = self.skipped_in_a_row, 0
        for good in applied:
            in_a_row = 0 if good else in_a_row + 1
            most = max(most, in_a_row)
        return replace(
            self,
            step=self.step + 1,
            replay=replay,
            skipped=self.skipped + sum(not good for good in applied),
            skipped_in_a_row=in_a_row,
            most_in_a_row=most,
            seconds=self.seconds + seconds,
        )


class CheckpointFailed(TrainingStopped):
    """A checkpoint could not be written; earlier ones are whole, nothing of it is left."""


class Checkpoints:
    """The checkpoints of a run, in `folder`. `keep` of them are kept, not counting damaged ones, which stay as they are
    found; `say` gets a line for each that is passed over. Every method is a collective."""

    def __init__(self, folder: Path, keep: int, say: Callable[[str], None]):
        self.folder = folder
        self.keep = keep
        self.say = say
        self.held: Progress | None = None  # what the newest one, saved or loaded by this process, holds
        self.damaged: dict[str, str] = {}  # name -> what is wrong with it

    def save(self, learner: Learner, progress: Progress) -> Path:
        """Write `step-N`, unless it holds this very state; then remove the oldest. Raises CheckpointFailed."""
        final = self.folder / f"step-{progress.step}"
        part = final.with_suffix(".part")
        if progress == self.held:
            return final
        try:
            on_main(lambda: _empty(part))
            model, optimizer = get_state_dict(learner.policy, learner.optimizer)
            dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=part)
            on_main(lambda: _write(part / STATE, json.dumps(asdict(progress), indent=1)))
            files = _checksums(part, from_main(lambda: sorted(path.name for path in part.iterdir())))
            on_main(lambda: self._publish(part, final, files))
        except (Exception, CheckpointException) as error:
            on_main(lambda: shutil.rmtree(part, ignore_errors=True))
            raise CheckpointFailed(f"{final} cannot be saved ({_reason(error)})") from None
        self.held = progress
        self.damaged.pop(final.name, None)
        on_main(self._remove_old)
        return final

    def load_newest(self, learner: Learner) -> Progress:
        """Restore weights and optimiser from the newest checkpoint that is whole; raises UserError if none is."""
        on_main(self._say_unfinished)
        for name in reversed(from_main(lambda: [path.name for path in _candidates(self.folder)])):
            wrong = _damage(self.folder / name)
            if wrong is None:
                try:
                    self.held = _load(self.folder / name, learner)
                    return self.held
                except (Exception, CheckpointException) as error:
                    wrong = f"it does not fit this model ({_reason(error)})"
            self.damaged[name] = wrong
            self.say(f"{self.folder / name} is passed over: {wrong}")
        found = "; ".join(f"{name}: {wrong}" for name, wrong in self.damaged.items()) or "there is none"
        raise UserError(
            f"{self.folder}: no checkpoint to go on from ({found}); checkpoint.resume=false sets them aside and begins "
            "anew"
        )

    def _publish(self, part: Path, final: Path, files: dict[str, Checksum]) -> None:
        """Give a whole checkpoint its name. What has that name steps aside, and counts until the new one is there."""
        _write(part / MANIFEST, json.dumps({"files": files}, indent=1))
        _sync_folder(part)
        if final.exists():
            final.rename(_unused(final, "damaged") if final.name in self.damaged else _unused(final, "old"))
        part.rename(final)
        _sync_folder(self.folder)

    def _remove_old(self) -> None:
        """What cannot be removed stays: the new checkpoint is there."""
        whole = [path for path in saved(self.folder) if path.name not in self.damaged]
        for path in whole[: -self.keep]:
            with suppress(OSError):
                path.rename(path.with_suffix(".part"))  # half removed it must not count
        for path in self.folder.iterdir():
            if re.fullmatch(r"step-\d+\.(part|old)", path.name):
                shutil.rmtree(path, ignore_errors=True)

    def _say_unfinished(self) -> None:
        for path in sorted(self.folder.glob("step-*.part")):
            self.say(f"{path} is passed over: it was not finished")


Checksum = tuple[int | None, str]  # bytes, sha256; None: cannot be read
STATE, MANIFEST = "state.json", "manifest.json"
SHAPE = "shape"  # folder of a run: what model its checkpoints are of, as `export_shape` writes it


def saved(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first; whether they are whole is another question."""
    return [path for path in _candidates(folder) if path.suffix != ".old"]


def _candidates(folder: Path) -> list[Path]:
    """`saved`, and `step-N.old`: what a newer step-N was about to replace when the process ended."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if re.fullmatch(r"step-\d+(\.old)?", path.name)]
    return sorted(found, key=lambda path: (int(path.stem[5:]), path.suffix != ".old"))


def _load(folder: Path, learner: Learner) -> Progress:
    model, optimizer = get_state_dict(learner.policy, learner.optimizer)
    state: dict[str, Any] = {"model": model, "optimizer": optimizer}
    dcp.load(state, checkpoint_id=folder)
    record = from_main(lambda: json.loads((folder / STATE).read_text(encoding="utf-8")))
    progress = Progress(**{**record, "replay": ReplayState(**record["replay"])})
    set_state_dict(
        learner.policy, learner.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    return progress


def _damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files; each rank reads its share of them."""
    manifest = from_main(lambda: _manifest(folder))
    if isinstance(manifest, str):
        return manifest
    found = _checksums(folder, list(manifest), strict=False)
    for file, (size, digest) in manifest.items():
        there, hashed = found[file]
        if there is None:
            return f"{file} is missing or cannot be read"
        if there != size:
            return f"{file} has {there:,} bytes of {size:,}"
        if hashed != digest:
            return f"{file} is not what was written (another checksum)"
    return None


def load_weights(folder: Path, model: PreTrainedModel) -> None:
    """Put the weights of the checkpoint in `folder`, alone, into a model of the same shape in fp32. A collective;
    raises UserError where the checkpoint is not whole or of another model."""
    wrong = _damage(folder)
    if wrong is None:
        own = {
            f"model.{name}": tensor.detach() for name, tensor in named_tensors(model)
        }  # the learner's are a Policy's
        try:
            dcp.load({"model": own}, checkpoint_id=folder)
        except (Exception, CheckpointException) as error:
            wrong = f"it does not fit this model ({_reason(error)})"
    if wrong is not None:
        raise UserError(f"{folder} cannot be read: {wrong}")


def fingerprint(folder: Path) -> str:
    """16 hexadecimal digits that follow from all of a checkpoint's files. Raises UserError."""
    try:
        return hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {MANIFEST}: {error.strerror}") from None


def _manifest(folder: Path) -> dict[str, tuple[int, str]] | str:
    """{file: (bytes, sha256)}, or what is wrong."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        return {str(name): (int(size), str(digest)) for name, (size, digest) in files.items()}
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({_reason(error)})"


def _checksums(folder: Path, names: list[str], strict: bool = True) -> dict[str, Checksum]:
    """Of every file; each rank reads its share. `strict`: one that cannot be read is an OSError on every rank."""
    mine: list[tuple[str, Checksum]] = []
    for name in share(names):
        try:
            with (folder / name).open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                mine.append((name, (size, hashlib.file_digest(file, "sha256").hexdigest())))
        except OSError as error:
            mine.append((name, (None, str(error))))
    found = dict(gather(mine))
    lost = [why for size, why in found.values() if size is None]
    if strict and lost:
        raise OSError(lost[0])
    return found


def _empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _unused(path: Path, suffix: str) -> Path:
    target = path.with_name(f"{path.name}.{suffix}")
    if suffix == "old":
        shutil.rmtree(target, ignore_errors=True)
    while target.exists():
        target = target.with_name(target.name + "+")
    return target


def _write(path: Path, text: str) -> None:
    """To the disk, not to its cache."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Names are on the disk when their folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: BaseException) -> str:
    """One line: of a checkpoint's failure on some ranks, the first rank's; of what wraps a system's error, that."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    inner: BaseException | None = None if isinstance(error, RankFailure) else error  # told on all ranks alike
    while inner is not None and not isinstance(inner, OSError):
        inner = inner.__cause__ or inner.__context__
    lines = str(inner or error).strip().splitlines()
    return lines[0].strip()[:200] if lines else type(error).__name__


def export(
    folder: Path, model: PreTrainedModel, weights: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Write what `AutoModelForCausalLM.from_pretrained(folder)` loads: `model`'s config with whole `weights`. The
    folder gets its name when all is in it. Raises OSError."""
    transformers.utils.logging.disable_progress_bar()
    # transformers refuses to write generation configs that it reads (a temperature without do_sample, as many models
    # have it): a run would fail with its last line. The model's own goes along as it is.
    own, model.generation_config = model.generation_config, GenerationConfig()
    part = folder.with_name(folder.name + ".part")
    _empty(part)
    try:
        model.save_pretrained(part, state_dict=weights)
        tokenizer.save_pretrained(part)
    except SafetensorError as error:
        raise OSError(str(error)) from None
    finally:
        model.generation_config = own
    _write_generation(part, own)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def export_shape(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """An `export` without weights: what a checkpoint's weights are loaded into. Raises OSError."""
    part = folder.with_name(folder.name + ".part")
    _empty(part)
    model.config.save_pretrained(part)
    tokenizer.save_pretrained(part)
    _write_generation(part, model.generation_config)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def _write_generation(folder: Path, own: GenerationConfig | None) -> None:
    if own is not None:
        own.to_json_file(folder / "generation_config.json", keys_to_pop=["compile_config"])
