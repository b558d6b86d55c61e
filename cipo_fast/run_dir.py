"""A run's folder: one run at a time, begun anew or gone on with, and nothing of an earlier one overwritten.

`lock` is held with flock by the first rank for as long as the run lives; the kernel lets go of it, however the process
ends, so a file left over does not matter. config.yaml and inputs.json record what started the run, and no later run
changes them. A run that goes on with other settings writes config-from-step-N.yaml and inputs-from-step-N.json.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from cipo_fast.checkpoint import saved
from cipo_fast.config import Config, read_config
from cipo_fast.config.config import flat
from cipo_fast.config.settings import FUNCTION
from cipo_fast.distributed import from_main, on_main
from cipo_fast.errors import UserError, note
from cipo_fast.tasks.hub import fingerprint
from cipo_fast.tasks.sources import Role

# What one run writes, and the next one sets aside; checkpoints first: without them nobody goes on with the rest.
OUTPUTS = (
    "checkpoints", "config.yaml", "config-from-step-*.yaml", "inputs.json", "inputs-from-step-*.json", "held_out.jsonl",
    "eval.jsonl", "metrics.jsonl", "rollouts", "rollouts.judged.jsonl", "rollouts.judged.jsonl.part", "tensorboard",
    "wandb", "wandb_run", "profile-step-*.json.gz", "summary.json", "summary-until-step-*.json", "model", "model.part",
    "failed", "shape", "shape.part", "evaluations", "exported", "started.jsonl", "report.html",
)  # fmt: skip
LOCK_WAIT_S = 5.0  # for a process of this run that torchrun has killed and restarted
# A run that goes on may change these: where and how it is computed and shown, not what. Resources and the number of
# ranks give other draws of the same distribution, or other rounding.
FREE = (
    "checkpoint.", "eval.every", "model.activation_checkpointing", "ranks", "rollout.batch_sequences",
    "rollout.server.", "rollout.vllm.cpu_kv_gib", "rollout.vllm.gpu_memory", "rollout.vllm.max_sequences", "run.",
    "sandbox.tier", "sync.", "train.pack_tokens", "verify.max_failed", "verify.workers",
)  # fmt: skip
NOT_COMPARED = ("checkpoint.resume", "checkpoint.allow_changes")  # they are about going on, not about the run
WHOLE = 2**25  # bytes of a model's file up to which all of it is hashed, otherwise both ends


@dataclass(frozen=True)
class Opened:
    """How a run's folder is entered."""

    resume: bool
    inputs: dict[str, Any]
    changed: bool = False  # settings or inputs differ from those recorded last
    lines: tuple[str, ...] = ()  # what the user is told


def check_writable(folder: Path, setting: str = "run.dir") -> None:
    """Raise UserError unless files can be made in `folder`, which `setting` names, to be asked first of all; nothing is
    left behind."""
    made: list[Path] = []
    try:
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0" * 4096)
    except OSError as error:
        raise UserError(f"{setting}={folder}: cannot write there: {error.strerror}; name another folder") from None
    finally:
        for path in made:
            with suppress(OSError):  # another run begins in it, or it was not made
                path.rmdir()


@contextmanager
def opened(config: Config, ranks: int) -> Iterator[Opened]:
    """Lock `run.dir` and decide whether its run is gone on with; nothing is moved or written yet. Raises UserError on
    every rank. A collective."""
    with ExitStack() as held:
        on_main(lambda: held.enter_context(locked(config.run_dir)))
        yield from_main(lambda: decide(config, inputs_of(config, ranks)))


@contextmanager
def locked(folder: Path, setting: str = "run.dir") -> Iterator[None]:
    """Make `folder` and hold its lock; a folder that was made for nothing is removed again. `setting` names it in
    errors."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _lock(folder / "lock", setting)
    except OSError as error:
        raise UserError(f"{setting}={folder}: cannot be written ({error.strerror or error})") from None
    try:
        yield
    finally:
        with suppress(OSError):
            (folder / "lock").unlink()
            for path in made:
                path.rmdir()  # fails, and ends this, where something has been written
        file.close()


def _lock(path: Path, setting: str) -> TextIO:
    deadline = time.monotonic() + LOCK_WAIT_S
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                file.seek(0)
                holder = file.read().strip() or "another process"
                raise UserError(
                    f"{setting}={path.parent}: in use by {holder}; end that run first, or name another {setting}"
                ) from None
            file.close()
            time.sleep(0.1)
            continue
        except OSError as error:
            note(f"{path}: no locks on this file system ({error.strerror}): start no second run here")
            return file
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                file.truncate(0)
                file.write(f"pid {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
                file.flush()
                return file
        file.close()  # its last holder has just removed it


# -------------------------------------------------------------------------------------------------- go on, or anew


def decide(config: Config, inputs: dict[str, Any]) -> Opened:
    """checkpoint.resume, applied to what is in the folder; raises UserError."""
    folder, resume = config.run_dir, config.checkpoint.resume
    anew = Opened(False, inputs)
    found = saved(folder / "checkpoints")
    if resume is False or (resume == "auto" and ((folder / "summary.json").exists() or not found)):
        return anew
    if not found:
        raise UserError(f"checkpoint.resume=true: no checkpoint in {folder / 'checkpoints'}; start without it")
    recorded = _recorded(folder, config.checkpoint.allow_changes)
    different = differences(recorded, {**flat(config), **inputs}) if recorded else {}
    hard = [line for key, line in different.items() if not _moved(key, recorded, inputs) and not _free(key, config)]
    if hard and not config.checkpoint.allow_changes:
        if resume == "auto":
            line = f"{folder} holds an unfinished run of other settings, which is set aside under previous/"
            return Opened(False, inputs, lines=(f"{line}: {'; '.join(hard)}",))
        raise UserError(
            f"checkpoint.resume=true, but the run in {folder} has other settings: {'; '.join(hard)}; give its own, or "
            "checkpoint.allow_changes=true to go on with these"
        )
    newest = int(found[-1].name[5:])
    if newest > config.train.steps:
        raise UserError(
            f"the run in {folder} is at step {newest}, beyond train.steps={config.train.steps}: raise train.steps, or "
            "checkpoint.resume=false begins anew and sets it aside"
        )
    return Opened(
        True, inputs, bool(different) or not recorded, tuple(f"changed: {line}" for line in different.values())
    )


def of_other_settings(config: Config, inputs: dict[str, Any]) -> list[str]:
    """What makes the finished run in `config`'s folder another one than `config` asks for, as "key: old -> new".
    Raises UserError where its settings cannot be read."""
    recorded = _recorded(config.run_dir, lenient=False)
    ends = ("train.steps", "eval.every")  # free to one that goes on
    return [
        line
        for key, line in differences(recorded, {**flat(config), **inputs}).items()
        if key in ends or not (_moved(key, recorded, inputs) or _free(key, config))
    ]


def differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, str]:
    """{key: "key: old -> new"} of two flat records of settings and inputs."""
    return {
        key: f"{key}: {_short(old.get(key))} -> {_short(new.get(key))}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and key not in NOT_COMPARED and (key != "data.date" or new.get(key))
    }


def inputs_of(config: Config, ranks: int) -> dict[str, Any]:
    """What a run starts from that its settings only name: the number of ranks, and hashes of files and of a local
    model (of a hub model the name alone is known, of a hub data set its version)."""
    found: dict[str, Any] = {"ranks": ranks}
    roles: tuple[Role, ...] = ("train", "eval")
    for role in roles:
        sources = config.data.sources(role)
        if sources:
            found[f"data.{role} content"] = _hash_sources(sources, role)
    function = FUNCTION.fullmatch(config.data.verifier or "")
    if function:
        found["data.verifier content"] = hash_files([Path(function["file"])])
    content = hash_model(config.model.path)
    if content is not None:
        found["model.path content"] = content
    return found


def hash_model(path: str) -> str | None:
    """Of a local model's files; None for a hub's name."""
    folder = Path(path)
    return hash_files(sorted(p for p in folder.iterdir() if p.is_file()), WHOLE) if folder.is_dir() else None


def _hash_sources(sources: list[Path | str], role: Role) -> str:
    """Of files, their contents; of a hub data set, its name and the fingerprint of its version."""
    parts = [hash_files([s]) if isinstance(s, Path) else f"{s} {fingerprint(s, role)}" for s in sources]
    return parts[0] if len(parts) == 1 else hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def hash_files(paths: list[Path], whole: float = float("inf")) -> str:
    """Of names, sizes and contents; of a file longer than `whole` bytes, of its first and last `whole` / 2."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            size = path.stat().st_size
            digest.update(f"{path.name if len(paths) > 1 else ''}\0{size}\0".encode())
            with path.open("rb") as file:
                if size <= whole:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
                else:
                    digest.update(file.read(int(whole) // 2))
                    file.seek(-int(whole) // 2, os.SEEK_END)
                    digest.update(file.read())
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    return digest.hexdigest()[:16]


def _recorded(folder: Path, lenient: bool) -> dict[str, Any]:
    """Settings and inputs that the run in `folder` last went on with, flat; `lenient`: {} where they cannot be read."""
    later = max(folder.glob("config-from-step-*.yaml"), key=_step, default=None)
    path = later or folder / "config.yaml"
    inputs = path.with_name(path.name.replace("config", "inputs").replace(".yaml", ".json"))
    try:
        settings = read_config(path)
        files = json.loads(inputs.read_text(encoding="utf-8")) if inputs.exists() else {}
        return {**flat(settings), **files}
    except (OSError, ValueError, UserError) as error:
        if lenient:
            return {}
        why = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path}: not the settings of a run ({why}), so nothing tells whether to go on with its checkpoints: "
            "checkpoint.resume=false sets them aside, checkpoint.resume=true checkpoint.allow_changes=true goes on"
        ) from None


def _free(key: str, config: Config) -> bool:
    if key == "train.steps":  # the horizon of the other schedules
        return config.optim.schedule == "constant"
    return any(key == free or (free.endswith(".") and key.startswith(free)) for free in FREE)


def _moved(key: str, recorded: dict[str, Any], inputs: dict[str, Any]) -> bool:
    """Whether the files that a setting names are the same, wherever they are now."""
    found = inputs.get(f"{key} content") if key in ("data.train", "data.eval", "model.path") else None
    return found is not None and found == recorded.get(f"{key} content")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


# ----------------------------------------------------------------------------------------- an earlier run's files


def enter(config: Config, opened: Opened, resume_step: int | None) -> None:
    """Make the folder ready to be written to: an earlier run's files go to previous/, or (resume_step) what they hold
    from after that step goes; then the settings are recorded."""
    folder, suffix = config.run_dir, ""
    if resume_step is None:
        set_aside(folder)
    else:
        forget_after(folder, resume_step)
        suffix = f"-from-step-{resume_step}"
    if resume_step is None or opened.changed:
        (folder / f"config{suffix}.yaml").write_text(config.to_yaml(), encoding="utf-8")
        (folder / f"inputs{suffix}.json").write_text(json.dumps(opened.inputs, indent=1), encoding="utf-8")


def set_aside(run_dir: Path) -> None:
    """Move an earlier run's files to `previous/<time it ended>/`: nothing is overwritten."""
    found = [path for pattern in OUTPUTS for path in sorted(run_dir.glob(pattern))]
    if found:
        ended = max(path.stat().st_mtime for path in found)
        stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(ended))
        target = run_dir / "previous" / stamp
        while target.exists():
            target = target.with_name(target.name + "+")
        target.mkdir(parents=True)
        for path in found:
            shutil.move(path, target / path.name)


def forget_after(run_dir: Path, step: int) -> None:
    """Drop what was recorded after `step`, and a line that the end of the process cut short."""
    for rows in (run_dir / "metrics.jsonl", run_dir / "eval.jsonl"):
        if rows.exists():
            part = rows.with_suffix(".part")
            part.write_bytes(b"".join(_rows_until(rows.read_bytes(), step)))
            part.rename(rows)
    for pattern in ("rollouts/step-*.jsonl", "config-from-step-*.yaml", "inputs-from-step-*.json"):
        for path in run_dir.glob(pattern):
            if _step(path) > step:
                path.unlink()
    for folder in run_dir.glob("evaluations/step-[0-9]*"):
        if int(folder.name.split("-")[1]) > step:
            shutil.rmtree(folder)
    summary = run_dir / "summary.json"
    if summary.exists():  # of a run that had ended and is prolonged: until the new end there is none
        summary.rename(run_dir / f"summary-until-step-{step}.json")


def _rows_until(content: bytes, step: int) -> Iterator[bytes]:
    for line in content.split(b"\n")[:-1]:
        try:
            if json.loads(line)["step"] <= step:
                yield line + b"\n"
        except ValueError:  # after a power cut a file may hold zeros
            continue


def _step(path: Path) -> int:
    return int(path.stem.rsplit("-", 1)[1])
