"""Run by torchrun from test_resume.py on two ranks: what one rank alone finds wrong."""

import dataclasses
import re
import sys
from functools import partial

import pytest
import torch
import torch.distributed as dist
from conversations import random_conversations

from cipo_fast.config import OptimConfig, load_config
from cipo_fast.distributed import from_main, leave, on_main, process_group
from cipo_fast.embedded.model import new_model
from cipo_fast.errors import Ending, UserError
from cipo_fast.learner import Learner
from cipo_fast.packing import build_trees, make_pack
from cipo_fast.policy import ATTENTION, build_policy


def fail(error: Exception) -> None:
    raise error


def main() -> None:
    with process_group() as mesh:
        rank = dist.get_rank()
        config = load_config([], ["model.embedded.hidden=32", "model.embedded.mlp=48"])
        learner = Learner(build_policy(new_model(config, ATTENTION), config, mesh), OptimConfig(lr=1e-3), 9)
        packs = [make_pack(build_trees(random_conversations(10 * rank + i, n_trees=2, depth=2))) for i in range(3)]
        assert learner.update(packs, 0).bad_pack is None
        if rank == 1:
            packs[2] = dataclasses.replace(packs[2], rl_weight=torch.full_like(packs[2].rl_weight, torch.nan))
        update = learner.update(packs, 1)
        assert not update.applied
        assert update.bad_pack is (packs[2] if rank == 1 else None), f"rank {rank} keeps a pack"
        for error in (OSError(28, "full"), UserError("no"), ZeroDivisionError("x")):
            with pytest.raises(Ending, match=re.escape(str(error))):
                on_main(partial(fail, error))
        assert from_main(lambda: dist.get_rank()) == 0


if __name__ == "__main__":
    main()
    print("agreed", file=sys.stderr)
    leave(0)
