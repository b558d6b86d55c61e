"""`python -m cipo_fast.embedded [configs/x.yaml ...] [key.path=value ...]`: make the model folder, print its name."""

from __future__ import annotations

import sys

from cipo_fast.config import parse_args
from cipo_fast.distributed import leave, process_group
from cipo_fast.embedded.prepare import prepare
from cipo_fast.errors import UserError


def main() -> int:
    """The command. Exit code 2 for bad input, with one line."""
    try:
        config = parse_args(sys.argv[1:])
        if config.model.path != "embedded":
            raise UserError(f"model.path={config.model.path}: only `embedded` is made")
        with process_group() as mesh:
            print(prepare(config, mesh, lambda line: print(line, file=sys.stderr)).model.path)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    leave(main())
