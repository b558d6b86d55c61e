"""From `model.path=embedded` to a model folder: tokenizer, warm-started weights, and the problems of the task."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

from torch.distributed.device_mesh import DeviceMesh

from cipo_fast.chat import Chat
from cipo_fast.checkpoint import export
from cipo_fast.config import Config
from cipo_fast.distributed import on_main
from cipo_fast.embedded.model import embedded_tokenizer, new_model
from cipo_fast.embedded.problems import embedded_problems
from cipo_fast.embedded.tasks import task_named
from cipo_fast.embedded.tasks.edits import edited
from cipo_fast.embedded.tasks.task import Start
from cipo_fast.embedded.warm_start import warm_start
from cipo_fast.errors import UserError
from cipo_fast.marking import build_judges
from cipo_fast.records import Problem
from cipo_fast.sampling import encode_dataset, fitting
from cipo_fast.tasks import Dataset, load_dataset, quiet

TRAIN, HELD_OUT = "train.jsonl", "held_out.jsonl"
Say = Callable[[str], None]


def prepare(config: Config, mesh: DeviceMesh, note: Say, check: Callable[[], None] = lambda: None) -> Config:
    """`config` with a model folder for `embedded`, and the task's files where no data is given. The folder is made
    once, under `<run.dir>/warm_start/`, and named by all that is in it. A collective, which `check` may end between
    steps; raises UserError."""
    folder = config.run_dir / "warm_start" / digest(config)
    if not folder.is_dir():
        _make(config, mesh, folder, note, check)
    prepared = config.model_copy(deep=True)
    prepared.model.path = str(folder)
    if config.data.train is None:
        prepared.data.train, prepared.data.eval = folder / TRAIN, folder / HELD_OUT
    return prepared


def start_of(config: Config) -> Start:
    """The task's own, but for what the settings say."""
    own = task_named(config.data.task).start if config.data.train is None else Start()
    asked = {f.name: getattr(config.model.embedded, f"warm_{f.name}") for f in fields(Start)}
    return replace(own, **{name: value for name, value in asked.items() if value is not None})


def digest(config: Config) -> str:
    """Of all that the folder depends on."""
    files = [path.stat() for path in config.data.sources("train") if isinstance(path, Path)]
    key = [
        config.seed,
        config.model.dtype,
        config.model.embedded,
        start_of(config),
        config.data.model_dump(exclude={"date"}),  # its template prints none
        config.eval.problems,
        [(file.st_size, file.st_mtime_ns) for file in files],
        config.rollout.max_tokens,
        config.correction.model_dump(include={"layout", "followup", "verdict", "max_prompt_tokens"}),
    ]
    return hashlib.sha256(repr(key).encode()).hexdigest()[:12]


def _make(config: Config, mesh: DeviceMesh, folder: Path, note: Say, check: Callable[[], None]) -> None:
    chat = Chat(embedded_tokenizer(), config.data)
    if config.data.train is None:
        data = config.data
        dataset = Dataset(*embedded_problems(data.task, config.seed, config.held_out, data.task_size))
        near_miss = task_named(data.task).near_miss
    else:
        dataset = load_dataset(config)
        dataset = Dataset(imitable(dataset.train), dataset.held_out)
        near_miss = edited
    prompts, _ = encode_dataset(dataset, chat, config, quiet)  # the run that follows says the same
    prompts = fitting(prompts, config.data.max_prompt_tokens, "data.train", quiet)
    model = new_model(config, "cipo_tree")
    with build_judges(config, note) as judges:
        weights = warm_start(model, chat, prompts, config, mesh, note, judges, near_miss, start_of(config), check)

    def write() -> None:
        part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        export(part, model, weights, chat.tokenizer)
        if config.data.train is None:
            _write(part / TRAIN, dataset.train)
            _write(part / HELD_OUT, dataset.held_out)
        try:
            part.rename(folder)
        except OSError:  # another run of the same experiment was first, with the same weights
            if not folder.is_dir():
                raise
            shutil.rmtree(part)

    on_main(write)


def imitable(problems: list[Problem]) -> list[Problem]:
    """The problems whose rows have an answer, to be given word for word, whatever verifies it later. Raises
    UserError."""
    answers = [(p, p.answer or p.fields.get("answer")) for p in problems]  # a user's function has all of its row there
    found = [replace(p, answer=a, verifier="exact", fields={}) for p, a in answers if a and isinstance(a, str)]
    if not found:
        raise UserError(
            "model.path=embedded: its first steps imitate answers, and no row of data.train has one: give some rows an "
            "answer, or name a model"
        )
    return found


def _write(path: Path, problems: list[Problem]) -> None:
    rows = [
        {"id": p.id, "prompt": p.messages[-1]["content"], "answer": p.answer, "verifier": p.verifier} for p in problems
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
