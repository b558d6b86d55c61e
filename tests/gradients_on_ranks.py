"""Run by torchrun: gradients of unequal packs, and what ranks tell each other; rank 0 writes argv[1]/*.pt.

Imported by test_ranks.py and test_bf16.py too, which compute the same in one process.
"""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from conversations import random_conversations
from torch import Tensor, nn
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from cipo_fast.config import Config, load_config
from cipo_fast.distributed import gather, leave, process_group, raise_together, share
from cipo_fast.embedded.model import new_model
from cipo_fast.learner import Learner, Update
from cipo_fast.packing import Node, Pack, build_trees, make_pack
from cipo_fast.policy import ATTENTION, Policy, build_policy

CASES = {
    "float32": [],
    "checkpointed": ["model.activation_checkpointing=true"],
    "untied": [],
    "untied_checkpointed": ["model.activation_checkpointing=true"],
    "bfloat16": ["model.dtype=bfloat16"],
    "bfloat16_checkpointed": ["model.dtype=bfloat16", "model.activation_checkpointing=true"],
}
# Trees of each pack of each of three ranks: unequal, and the last rank has a pack of nothing.
PACKS_OF_RANK = [[[0, 1, 2], [3]], [[4], [5]], [[6], []]]


def settings(case: str) -> Config:
    """Gradients are clipped nowhere: a norm of 1 would hide any factor between them."""
    small = ["model.embedded.hidden=32", "model.embedded.mlp=48", "loss.entropy_coef=0.1", "optim.max_grad_norm=1e9"]
    return load_config([], [*small, *CASES[case]])


def model_of(case: str) -> PreTrainedModel:
    model = new_model(settings(case), ATTENTION)
    if case.startswith("untied"):
        model.config.tie_word_embeddings = False
        head = model.get_output_embeddings()
        head.weight = nn.Parameter(head.weight.detach().flip(0))
    return model


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


@contextmanager
def order_of_groups() -> Iterator[list[str]]:
    """What FSDP2's groups do meanwhile, in order: "gather head", "reduce layers.0"..."""
    events: list[str] = []
    names = {"unshard": "gather", "post_forward": "forward", "post_backward": "reduce"}
    with ExitStack() as patches:
        for method, name in names.items():
            inner = getattr(FSDPParamGroup, method)

            def noted(group: Any, *args: Any, _inner: Any = inner, _name: str = name, **kwargs: Any) -> Any:
                where = (group._module_fqn or "root").removeprefix("model.").removeprefix("model.")
                events.append(f"{_name} {where}")
                return _inner(group, *args, **kwargs)

            patches.enter_context(mock.patch.object(FSDPParamGroup, method, noted))
        yield events


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
            policy = build_policy(model_of(case), config, mesh)
            with order_of_groups() as order:
                result = gradients(policy, config, packs_of_rank(rank))
            if rank == 0:
                torch.save((*result, order), folder / f"{case}.pt")
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
