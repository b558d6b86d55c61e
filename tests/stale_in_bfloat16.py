"""vLLM in bfloat16: an update at lr 1e-6 that did not arrive. `stale_in_bfloat16.py FOLDER true|false (fp32 head)`."""

import os
import sys
from pathlib import Path

import torch
from test_sync import update
from vllm_setup import Setup

from cipo_fast.distributed import process_group
from cipo_fast.errors import TrainingStopped


def main(folder: Path, fp32_head: str) -> None:
    torch.set_num_threads(1)
    with process_group() as mesh:
        more = ["rollout.engine=vllm", "model.dtype=bfloat16", f"rollout.vllm.fp32_head={fp32_head}"]
        setup = Setup(folder, mesh, *more)
        setup.change_weights(0)
        assert setup.sync.publish(0)["sync/changed"] is None
        stale = dict(setup.policy.full_weights(torch.bfloat16))
        for i, name in enumerate(stale):
            stale = {n: w.clone() for n, w in setup.policy.full_weights(torch.bfloat16)}
            update(setup.policy, i, name)
            now = dict(setup.sync._sending())
            if torch.equal(now[name], stale[name]):
                continue  # too small a step for any of its bfloat16 values
            setup.engine.sync({**now, name: stale[name]}.items(), 1)
            assert name in setup.sync.differing(), name
            assert set(setup.sync.differing()) <= {name, "lm_head.weight"}
        setup.sync.publish(1)
        update(setup.policy, 100)
        list(setup.sync._sending())  # and no sync
        assert setup.sync.gap().mean < 0.05  # log-probs do not show it
        try:
            setup.sync._probe()
        except TrainingStopped as stop:
            print(stop, "all caught")
        setup.engine.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
    sys.stdout.flush()
    os._exit(0)
