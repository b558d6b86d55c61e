"""`python -m cipo_fast.embedded [configs/x.yaml ...] [key.path=value ...]`: make the model folder, print its name."""

from __future__ import annotations

import sys

from cipo_fast.config import Config, parse_args
from cipo_fast.distributed import is_main, leave, prepared_group, starts_first
from cipo_fast.embedded.prepare import prepare
from cipo_fast.errors import UserError, command, note, put
from cipo_fast.run_dir import check_writable


def main() -> int:
    """The command. Exit code 2 for bad input, with one line."""
    return command(run)


def run() -> None:
    if {"-h", "--help"} & set(sys.argv[1:]):
        if starts_first():
            put(__doc__ or "")
        return
    with prepared_group(checked) as (mesh, config):
        folder = prepare(config, mesh, lambda line: note(line) if is_main() else None).model.path
        if is_main():
            put(folder)


def checked() -> Config:
    config = parse_args(sys.argv[1:])
    if config.model.path != "embedded":
        raise UserError(f"model.path={config.model.path}: only `embedded` is made")
    if starts_first():
        check_writable(config.run_dir)
    return config


if __name__ == "__main__":
    leave(main())
