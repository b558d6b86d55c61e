"""A vLLM server for `rollout.server.url`, in the foreground.

    python -m cipo_fast.serve [configs/x.yaml ...] [key.path=value ...]

Give it the trainer's own settings: the model, the lengths, the type and the way weights travel must be the same. It
listens on 127.0.0.1, port 8100 (`rollout.server.port`). On another address (`rollout.vllm.args={host: ...}`) it needs
a key in the environment's VLLM_API_KEY, here and where the trainer runs: whoever may talk to it controls it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import torch

from cipo_fast.config import parse_args
from cipo_fast.engines import fit_to_model, write_shape
from cipo_fast.errors import UserError, command, put
from cipo_fast.model import load_shape, load_tokenizer
from cipo_fast.rollout.connection import is_loopback
from cipo_fast.rollout.vllm_guard import KEY
from cipo_fast.run_dir import check_writable


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Exit code 2 for bad input, with one line."""
    return command(lambda: run(sys.argv[1:] if argv is None else argv))


def run(args: Sequence[str]) -> None:
    if {"-h", "--help"} & set(args):
        put((__doc__ or "").strip())
        return
    config = parse_args(args)
    from cipo_fast.rollout.vllm import check_version, engine_arguments

    check_version()
    if config.model.path == "embedded":
        raise UserError("model.path=embedded: name a folder; `python -m cipo_fast.embedded` makes one and prints it")
    from cipo_fast.rollout.server_process import DEFAULT_PORT, ENVIRONMENT, refuse_taken, serve_command, served_name

    host = config.rollout.vllm.args.pop("host", "127.0.0.1")
    if not isinstance(host, str) or not host:
        raise UserError(f"rollout.vllm.args.host={host!r}: expected an address of this machine, such as 0.0.0.0")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    engine_arguments(config, device)  # what is refused is refused before anything is written
    if not is_loopback(host) and not os.environ.get(KEY):
        raise UserError(
            f"rollout.vllm.args.host={host}: others reach it there; set a key, {KEY}, here and for the trainer"
        )
    port = config.rollout.server.port or DEFAULT_PORT
    refuse_taken(host, port)
    shape = load_shape(config)
    config = fit_to_model(config, shape, put)
    check_writable(config.run_dir)
    folder = config.run_dir / "engine"
    write_shape(folder, shape, load_tokenizer(config))
    os.environ.update(ENVIRONMENT)
    sys.argv = [sys.argv[0], *serve_command(folder, config, device, host, port, served_name(folder, config))]
    from vllm.entrypoints.launchers.api_server.entry import main as serve

    serve()


if __name__ == "__main__":
    sys.exit(main())
