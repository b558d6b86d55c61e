"""The fused loss under FSDP2, on two ranks: the head is gathered once, and a tied table gets both its gradients.

torchrun runs this file itself as the ranks' program.
"""

import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from cipo_kernels.lm_head import chunked
from conversations import random_conversations
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.debug import CommDebugMode

from cipo_fast.config import load_config
from cipo_fast.distributed import leave, process_group
from cipo_fast.embedded.model import new_model
from cipo_fast.packing import Pack, build_trees, make_pack
from cipo_fast.policy import ATTENTION, build_policy


def test_the_head_is_gathered_once_and_tied_gradients_add_up() -> None:
    torchrun = Path(sys.executable).with_name("torchrun")
    environment = {k: v for k, v in os.environ.items() if k != "CIPO_KERNELS"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(torchrun), "--standalone", "--nproc-per-node=2", __file__],
        env=environment, timeout=100, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def step(impl: str, chunk_targets: int, pack: Pack, mesh: DeviceMesh) -> tuple[int, int, torch.Tensor]:
    """All-gathers of the forward and of the backward pass, and the gradient of the tied table."""
    os.environ["CIPO_KERNELS"] = impl
    chunked.auto_chunk_targets = lambda weight: chunk_targets
    config = load_config([], ["model.embedded.hidden=32", "model.embedded.mlp=48", "loss.entropy_coef=0.1"])
    model = new_model(config, ATTENTION)
    policy = build_policy(model, config, mesh)
    with CommDebugMode() as forward:
        loss = policy(pack).loss
    with CommDebugMode() as backward:
        loss.backward()
    table = model.get_input_embeddings().weight
    assert model.get_output_embeddings().weight is table
    counts = [
        sum(n for op, n in mode.get_comm_counts().items() if "allgather" in str(op)) for mode in (forward, backward)
    ]
    return counts[0], counts[1], table.grad.full_tensor()


def main() -> None:
    with process_group() as mesh:
        pack = make_pack(build_trees(random_conversations(dist.get_rank(), n_trees=3)))
        assert len(pack.target_id) > 20
        layers = load_config([], []).model.embedded.layers
        _, _, expected = step("reference", 1000, pack, mesh)
        for chunk_targets in (3, 1000):
            forward, backward, gradient = step("torch", chunk_targets, pack, mesh)
            # each layer, and the root, which holds the table; backward each layer again: the root stays gathered
            assert (forward, backward) == (layers + 1, layers), (chunk_targets, forward, backward)
            torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item())


if __name__ == "__main__":
    main()
    leave(0)
