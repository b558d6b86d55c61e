"""How good a model is on problems, alone and as its own corrector; docs/evaluation.md explains the figures.

    python -m cipo_fast.evaluate MODEL_OR_RUN [--checkpoint N] --tasks FILE... [--n 64] [--checked 4] [--checks 3]
            [--out DIR] [configs/x.yaml ...] [key.path=value ...]
        MODEL_OR_RUN: a model's folder, a hub name, or a run's folder: then its settings are the run's, its weights
        those of checkpoints/step-N, of model/ without --checkpoint, and its held_out.jsonl stands for --tasks.
        --n: answers a problem at T=1. --checked: how many of them are checked, --checks: in so many rounds.
        --out: where samples.jsonl, results.json and results.md go; RUN/evaluations/NAME if not given. The same command
        goes on with what a killed one has left there.

    python -m cipo_fast.evaluate --compare DIR_A DIR_B
        The second less the first, paired over the problems that both have; written into the second.

Under torchrun the ranks share the work.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from cipo_fast.checkpoint import fingerprint
from cipo_fast.cipo.prompts import CorrectionPrompts
from cipo_fast.config import OVERRIDE, Config, load_config
from cipo_fast.config.settings import as_setting, expand
from cipo_fast.distributed import is_main, leave_after, on_main, prepared_group, starts_first
from cipo_fast.errors import TrainingStopped, UserError, command, put
from cipo_fast.evaluation.model import Weights, is_run, sampler_of, weights_of_run
from cipo_fast.evaluation.report import Results, compare, left_out
from cipo_fast.evaluation.sample import evaluate
from cipo_fast.run_dir import check_writable, hash_model, locked
from cipo_fast.view import Steps, Terminal, comparison_table, figures_table

NUMBERS = {"--n": "eval.samples", "--checked": "eval.checked", "--checks": "eval.checks"}
DEFAULTS = ["eval.samples=64", "eval.checks=3", "eval.problems=null", "data.train=null", "data.weights=null"]


@dataclass
class Asked:
    """What a command line says."""

    model: str = ""
    checkpoint: int | None = None
    tasks: list[str] = field(default_factory=list)
    out: str = ""
    files: list[str] = field(default_factory=list)
    settings: list[str] = field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Exit codes as train.py's."""
    return command(
        lambda: run(list(sys.argv[1:] if argv is None else argv)), "interrupted: the same command goes on with it"
    )


def run(args: list[str]) -> None:
    if not args or {"-h", "--help"} & set(args):
        put((__doc__ or "").strip())
        return
    if args[0] == "--compare":
        if len(args) != 3:
            raise UserError("--compare: two evaluations' folders are expected")
        compare_command(*map(Path, args[1:]))
        return
    found: list[tuple[Weights, Path]] = []

    def prepare() -> Config:
        config, weights, out = prepared(parse(args))
        found.append((weights, out))
        return config

    with prepared_group(prepare) as (mesh, config):
        weights, out = found[0]
        results = evaluate_model(config, weights, out, mesh.device_type)
        if is_main():
            Terminal().print(figures_table(results.figures))
            for source, figures in results.sources.items():
                Terminal().print(figures_table(figures, source))
            put(f"everything sampled is in {out}/")


def evaluate_model(config: Config, weights: Weights, out: Path, device: str) -> Results:
    """`evaluate` of those weights on the config's held-out problems, by the config's engine. A collective."""
    about = {
        "model": str(weights.checkpoint or weights.path),
        "weights_sha256": fingerprint(weights.checkpoint) if weights.checkpoint else hash_model(weights.path),
        "tasks": [str(source) for source in config.data.sources("eval")],
        "engine": config.rollout.engine,
        "dtype": config.model.dtype,
    }
    with ExitStack() as opened:
        sampler, prompts, fitted = opened.enter_context(sampler_of(config, device, weights.checkpoint))
        on_main(lambda: opened.enter_context(locked(out, "--out")))
        steps = opened.enter_context(Steps(len(prompts), "problems", quiet=not is_main()))
        correct = CorrectionPrompts(sampler.chat, fitted.correction)
        return evaluate(sampler, prompts, correct, fitted, out, about, progress=steps.at, anew=False)


def compare_command(a: Path, b: Path) -> None:
    try:
        found = compare(a, b)
    except OSError as error:
        raise TrainingStopped(f"{b} cannot be written ({error})") from None
    terminal = Terminal()
    terminal.print(comparison_table(found.differences, a.name, b.name))
    for source, differences in found.sources.items():
        terminal.print(comparison_table(differences, a.name, b.name, source))
    put(left_out(found))


# ---------------------------------------------------------------------------------------------------- the arguments


def parse(args: Sequence[str]) -> Asked:
    """Raises UserError. --tasks takes what follows it, up to an option or a setting."""
    asked, rest = Asked(), list(args)
    while rest:
        arg = rest.pop(0)
        if arg == "--tasks":
            asked.tasks += [expand(one, "--tasks") for one in _taken(rest)]
            if not asked.tasks:
                raise UserError("--tasks: a file of problems is expected")
        elif arg in (*NUMBERS, "--checkpoint", "--out"):
            value = rest.pop(0) if rest else ""
            if arg == "--out":
                if not value:
                    raise UserError("--out: a folder is expected")
                asked.out = expand(value, "--out")
                continue
            if not re.fullmatch(r"[0-9]{1,9}", value):
                raise UserError(f"{arg}: a whole number is expected, not {value!r}")
            if arg == "--checkpoint":
                asked.checkpoint = int(value)
            else:
                asked.settings.append(f"{NUMBERS[arg]}={value}")
        elif arg.startswith("-"):
            raise UserError(f"unknown option {arg}; --help says which there are")
        elif _is_setting(arg):
            (asked.settings if OVERRIDE.match(arg) else asked.files).append(arg)
        elif asked.model:
            raise UserError(f"{arg}: one model or run is expected, and {asked.model} is named already")
        else:
            asked.model = expand(arg, "MODEL_OR_RUN")
    if not asked.model:
        raise UserError("name a model's folder, a hub name or a run's folder first")
    return asked


def _taken(rest: list[str]) -> list[str]:
    found = []
    while rest and not rest[0].startswith("-") and not _is_setting(rest[0]):
        found.append(rest.pop(0))
    return found


def _is_setting(arg: str) -> bool:
    return bool(OVERRIDE.match(arg)) or arg.endswith((".yaml", ".yml"))


def prepared(asked: Asked) -> tuple[Config, Weights, Path]:
    """Settings, weights and the folder to write to; raises UserError."""
    path, files, defaults = Path(asked.model), asked.files, DEFAULTS
    if is_run(path):
        weights = weights_of_run(path, asked.checkpoint)
        files = [str(path / "config.yaml"), *files]
        defaults = [*defaults, f"data.eval={as_setting(path / 'held_out.jsonl')}"]
        if not asked.tasks and not (path / "held_out.jsonl").is_file():
            raise UserError(f"{path}: holds no held_out.jsonl; name the problems: --tasks FILE")
    elif asked.checkpoint is not None:
        raise UserError(f"--checkpoint: {path} is no run's folder (no config.yaml in it)")
    else:
        weights = Weights(asked.model, path.name)
    model = as_setting(Path(weights.path)) if Path(weights.path).is_dir() else weights.path
    tasks = [task if task.startswith("hub:") else as_setting(Path(task)) for task in asked.tasks]
    last = [f"model.path={model}", *([f"data.eval={json.dumps(tasks)}"] if tasks else [])]
    config = load_config(files, [*defaults, *asked.settings, *last])
    if config.data.eval is None:
        raise UserError("--tasks: name the files of problems to evaluate on")
    if config.eval.checked > config.eval.samples and any(s.startswith("eval.checked=") for s in asked.settings):
        raise UserError(f"--checked {config.eval.checked}: more than --n {config.eval.samples} answers a problem")
    name = f"{weights.name}-n{config.eval.samples}"
    out = Path(asked.out) if asked.out else (path if is_run(path) else config.run_dir) / "evaluations" / name
    config.run.dir = out  # where an engine starts from, too
    if starts_first():
        check_writable(out, "--out")
    return config, weights, out


if __name__ == "__main__":
    leave_after(main)
