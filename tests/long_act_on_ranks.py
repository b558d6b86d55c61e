"""Run by torchrun from test_long_act.py: updates with LongAct's mask; rank 0 writes the whole weights to argv[1]."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from conversations import random_conversations
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from cipo_fast.config import Config, load_config
from cipo_fast.distributed import leave, process_group
from cipo_fast.embedded.model import new_model
from cipo_fast.learner import Learner
from cipo_fast.packing import Pack, build_trees, make_pack
from cipo_fast.policy import ATTENTION, build_policy
from cipo_fast.records import Conversation

HEADS = {"q_proj": 4, "k_proj": 2}
KEPT = 2  # of a head's 8 dimensions: round(0.3 * 8)
UPDATES = 4


def settings(*more: str) -> Config:
    """Heads of 8 dimensions; two ranks cut the 16 rows of keys and the 32 of queries across heads."""
    small = ["model.embedded.hidden=32", "model.embedded.mlp=48", "optim.long_act=0.3", "optim.lr=0.01"]
    return load_config([], [*small, "optim.weight_decay=0.1", "optim.max_grad_norm=0.5", *more])


def conversations_of(update: int) -> list[Conversation]:
    return random_conversations(update, n_trees=4, depth=3)


def packs_of(update: int) -> list[Pack]:
    """Two packs of an update's trees."""
    trees = build_trees(conversations_of(update))
    return [make_pack(trees[0::2]), make_pack(trees[1::2])]


def weights_after(mesh: DeviceMesh, rank: int, world: int) -> dict[str, Tensor]:
    """Whole weights after all updates, each rank having its share of the packs."""
    config = settings()
    learner = Learner(build_policy(new_model(config, ATTENTION), config, mesh), config.optim, UPDATES)
    for update in range(1, UPDATES + 1):
        assert learner.update(packs_of(update)[rank::world], update - 1).applied
    return {name: weight.clone() for name, weight in learner.policy.full_weights()}


def main(path: Path) -> None:
    with process_group() as mesh:
        weights = weights_after(mesh, dist.get_rank(), mesh.size())
        if dist.get_rank() == 0:
            torch.save(weights, path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave(0)
