"""A run's checkpoint as a Hugging Face folder.

    python -m cipo_fast.export RUN [--step N] [--out DIR]

The newest checkpoint, or that of step N, into RUN/exported/step-N or DIR, which `AutoModelForCausalLM.from_pretrained`
and vLLM load. Every file of the checkpoint is compared with its checksum first.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from cipo_fast.checkpoint import export, saved
from cipo_fast.config import Config
from cipo_fast.config.settings import expand
from cipo_fast.distributed import leave_after, prepared_group
from cipo_fast.errors import TrainingStopped, UserError, command, put
from cipo_fast.evaluation.model import Weights, is_run, load_policy, weights_of_run
from cipo_fast.model import load_tokenizer, named_tensors
from cipo_fast.run_dir import check_writable


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Exit codes: 0 done, 1 it could not be written, 2 bad input, with one line."""
    return command(lambda: run(list(sys.argv[1:] if argv is None else argv)))


def run(args: list[str]) -> None:
    if not args or {"-h", "--help"} & set(args):
        put((__doc__ or "").strip())
        return
    weights, out = asked(args)
    with prepared_group(lambda: _settings(weights)) as (_, config):
        model = load_policy(config, weights.checkpoint)
        try:
            export(out, model, dict(named_tensors(model)), load_tokenizer(config))
        except OSError as error:
            raise TrainingStopped(f"{out} cannot be written ({error})") from None
    put(f"{weights.checkpoint} is now {out}/, {sum(p.numel() for p in model.parameters()):,} parameters")


def asked(args: Sequence[str]) -> tuple[Weights, Path]:
    """The checkpoint, and where it goes; raises UserError."""
    rest, given = list(args), {"--step": "", "--out": ""}
    names = []
    while rest:
        arg = rest.pop(0)
        if arg in given:
            given[arg] = rest.pop(0) if rest else ""
            if not given[arg]:
                raise UserError(f"{arg}: a value is expected")
        elif arg.startswith("-"):
            raise UserError(f"unknown option {arg}; --help says which there are")
        else:
            names.append(expand(arg, "RUN"))
    if len(names) != 1:
        raise UserError("one run's folder is expected")
    folder, step = Path(names[0]), given["--step"]
    if not is_run(folder):
        raise UserError(f"{folder}: not a run's folder (no config.yaml in it)")
    if step and not re.fullmatch(r"[0-9]{1,9}", step):
        raise UserError(f"--step: a whole number is expected, not {step!r}")
    newest = max((int(path.name[5:]) for path in saved(folder / "checkpoints")), default=0)
    weights = weights_of_run(folder, int(step) if step else newest)
    out = Path(expand(given["--out"], "--out")) if given["--out"] else folder / "exported" / weights.name
    if out.exists():
        raise UserError(f"{out}: exists; name another folder, --out DIR")
    check_writable(out.parent, "--out")
    return weights, out


def _settings(weights: Weights) -> Config:
    config = Config()
    config.model.path = weights.path
    return config


if __name__ == "__main__":
    leave_after(main)
