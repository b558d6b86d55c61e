"""Run by torchrun from test_train.py: two updates on fixed conversations, the weights written to argv[1]."""

import sys

import torch.distributed as dist
from conversations import random_conversations
from safetensors.torch import save_file
from torch.distributed.device_mesh import DeviceMesh

from cipo_fast.config import OptimConfig, load_config
from cipo_fast.distributed import leave, process_group
from cipo_fast.embedded.model import new_model
from cipo_fast.learner import Learner
from cipo_fast.packing import build_trees, make_pack, pack_trees
from cipo_fast.policy import ATTENTION, build_policy, cost_model


def main(target: str) -> None:
    with process_group() as mesh:
        update(mesh, target)


def update(mesh: DeviceMesh, target: str) -> None:
    config = load_config([], ["model.embedded.hidden=32", "model.embedded.mlp=48", "loss.entropy_coef=0.1"])
    model = new_model(config, ATTENTION)
    cost = cost_model(model.config, model.num_parameters())
    policy = build_policy(model, config, mesh)
    learner = Learner(policy, OptimConfig(lr=1e-3), 2)
    for step in range(2):
        trees = build_trees(random_conversations(step, n_trees=5, depth=3))
        packs = pack_trees(trees, 64, cost, mesh.size())[dist.get_rank()]
        assert len(packs) >= 1
        assert learner.update([make_pack(members) for members in packs], step).applied
    weights = {name: tensor.clone() for name, tensor in policy.full_weights()}
    if dist.get_rank() == 0:
        save_file(weights, target)


if __name__ == "__main__":
    main(sys.argv[1])
    leave(0)
