"""A vLLM server for `rollout.server.url`, in the foreground.

    python -m cipo_fast.serve [configs/x.yaml ...] [key.path=value ...]

Give it the trainer's own settings: the model, the lengths, the type and the way weights travel must be the same. It
listens on 127.0.0.1 unless `rollout.vllm.args={host: 0.0.0.0}`; whoever reaches its port controls it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import torch
from transformers import AutoConfig

from cipo_fast.config import parse_args
from cipo_fast.engines import write_shape
from cipo_fast.errors import UserError, command
from cipo_fast.model import load_tokenizer
from cipo_fast.recorder import check_writable


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Exit code 2 for bad input, with one line."""
    return command(lambda: run(sys.argv[1:] if argv is None else argv))


def run(args: Sequence[str]) -> None:
    config = parse_args(args)
    from cipo_fast.rollout.vllm import check_version

    check_version()
    if config.model.path == "embedded":
        raise UserError("model.path=embedded: name a folder; `python -m cipo_fast.embedded` makes one and prints it")
    check_writable(config.run_dir)
    folder = config.run_dir / "engine"
    write_shape(folder, AutoConfig.from_pretrained(config.model.path), load_tokenizer(config))
    from cipo_fast.rollout.vllm_server import ENVIRONMENT, serve_command

    os.environ.update(ENVIRONMENT)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sys.argv = [sys.argv[0], *serve_command(folder, config, device)]
    from vllm.entrypoints.launchers.api_server.entry import main as serve

    serve()


if __name__ == "__main__":
    sys.exit(main())
