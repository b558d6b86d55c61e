"""Run by torchrun from test_train.py: the command, with samples that depend on the prompt and not on who samples."""

import sys
import zlib
from collections.abc import Sequence

from cipo_fast.distributed import leave
from cipo_fast.records import Completion
from cipo_fast.rollout import Finished, Sampling
from cipo_fast.rollout.local import LocalEngine
from cipo_fast.train import main

_generate = LocalEngine.generate


def generate_by_prompt(
    self: LocalEngine,
    prompts: Sequence[list[int]],
    n: int,
    sampling: Sampling,
    seed: int,
    finished: Finished | None = None,
) -> list[list[Completion]]:
    """The local engine's, a prompt at a time, seeded by the prompt: any split of the prompts gives the same. Nobody
    hears of answers before the last has ended."""
    return [_generate(self, [ids], n, sampling, zlib.crc32(repr(ids).encode()))[0] for ids in prompts]


if __name__ == "__main__":
    LocalEngine.generate = generate_by_prompt  # type: ignore[method-assign]
    leave(main(sys.argv[1:]))
