"""Run by torchrun: gradients of unequal packs, and what ranks tell each other; rank 0 writes argv[1]/*.pt.

Imported by test_ranks.py and test_bf16.py too, which compute the same in one process.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from conversations import random_conversations
from torch import Tensor
from torch.distributed.tensor import DTensor

from cipo_fast.config import Config, load_config
from cipo_fast.distributed import gather, leave, process_group, raise_together, share
from cipo_fast.embedded.model import new_model
from cipo_fast.learner import Learner, Update
from cipo_fast.packing import Node, Pack, build_trees, make_pack
from cipo_fast.policy import ATTENTION, Policy, build_policy

CASES = {
    "float32": [],
    "checkpointed": ["model.activation_checkpointing=true"],
    "bfloat16": ["model.dtype=bfloat16"],
    "bfloat16_checkpointed": ["model.dtype=bfloat16", "model.activation_checkpointing=true"],
}
# Trees of each pack of each of three ranks: unequal, and the last rank has a pack of nothing.
PACKS_OF_RANK = [[[0, 1, 2], [3]], [[4], [5]], [[6], []]]


def settings(case: str) -> Config:
    """Gradients are clipped nowhere: a norm of 1 would hide any factor between them."""
    small = ["model.embedded.hidden=32", "model.embedded.mlp=48", "loss.entropy_coef=0.1", "optim.max_grad_norm=1e9"]
    return load_config([], [*small, *CASES[case]])


def trees() -> list[Node]:
    found = build_trees(random_conversations(3, n_trees=7, depth=3))
    assert len({tree.num_tokens for tree in found}) > 3
    return found


def packs_of_rank(rank: int) -> list[Pack]:
    every = trees()
    return [make_pack([every[i] for i in members]) for members in PACKS_OF_RANK[rank]]


@contextmanager
def gradients_of(learner: Learner) -> Iterator[dict[str, Tensor]]:
    """Every whole gradient as the optimiser gets it, filled in by the `update` inside."""
    found: dict[str, Tensor] = {}

    def take(*_: Any) -> None:
        for name, parameter in learner.policy.model.named_parameters():
            grad = parameter.grad
            assert grad is not None, name
            found[name] = (grad.full_tensor() if isinstance(grad, DTensor) else grad).clone()

    hook = learner.optimizer.register_step_pre_hook(take)
    yield found
    hook.remove()


def gradients(policy: Policy, config: Config, packs: list[Pack]) -> tuple[Update, dict[str, Tensor]]:
    """What `Learner.update` does with the packs."""
    learner = Learner(policy, config.optim, 1)
    with gradients_of(learner) as found:
        return learner.update(packs, 0), found


def first_error(mine: Exception | None) -> str:
    try:
        raise_together(mine)
    except Exception as error:
        return repr(error)
    return "none"


def main(folder: Path) -> None:
    with process_group() as mesh:
        rank = dist.get_rank()
        for case in CASES:
            config = settings(case)
            policy = build_policy(new_model(config, ATTENTION), config, mesh)
            result = gradients(policy, config, packs_of_rank(rank))
            if rank == 0:
                torch.save(result, folder / f"{case}.pt")
        heard = [
            first_error(ValueError(f"of rank {rank}") if rank else None),  # ranks 1 and 2 fail, 0 does not
            first_error(None),
            gather(list(share(range(8)))),  # 3, 3 and 2 of them
        ]
        by_rank: list[Any] = [None] * mesh.size()
        dist.all_gather_object(by_rank, heard)
        if rank == 0:
            torch.save(by_rank, folder / "heard.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave(0)
