"""What an update tells of its tokens, against plain loops; and that nothing waits for the device between packs."""

import math
import traceback
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import cipo_kernels
import pytest
import torch
from conversations import random_conversations
from long_act_on_ranks import settings
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._python_dispatch import TorchDispatchMode

from cipo_fast.embedded.model import new_model
from cipo_fast.learner import Learner
from cipo_fast.packing import build_trees, make_pack
from cipo_fast.policy import ATTENTION, Policy
from cipo_fast.records import STREAMS, TokenStats

VOCAB = 20
KERNELS = str(Path(cipo_kernels.__file__).parent)


def learner_of() -> Learner:
    torch.manual_seed(0)
    config = settings()
    return Learner(Policy(new_model(config, ATTENTION), config), config.optim, 9)


def packs_of(n: int) -> list:
    return [make_pack(build_trees(random_conversations(seed, vocab=VOCAB))) for seed in range(n)]


class Waits(TorchDispatchMode):
    """Operators whose result, or its shape, a host can only have when the device is done; those of the kernels'
    implementations for CPUs aside."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function)
        by_mask = name.startswith("aten.index.") and any(i is not None and i.dtype is torch.bool for i in args[1])
        if by_mask or name.split(".")[1] in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal"):
            on_cpu = any(frame.filename.startswith(KERNELS) for frame in traceback.extract_stack())
            self.found[name] += not on_cpu
        return function(*args, **(kwargs or {}))


def test_no_pack_waits_for_the_one_before(mesh: DeviceMesh) -> None:
    found = []
    for n in (1, 4):
        learner, packs = learner_of(), packs_of(n)
        learner.watched = {id(c.sampler_logps): TokenStats() for pack in packs for c in pack.conversations}
        with Waits() as waits:
            learner.update(packs, 0)
        assert all(tokens.logps for tokens in learner.watched.values())
        found.append(waits.found)
    assert found[0] == found[1]
    assert found[0]  # loss and norm are waited for, once an update


@pytest.mark.parametrize("old", [False, True])
def test_sums_over_all_that_was_sampled(mesh: DeviceMesh, old: bool) -> None:
    learner, packs = learner_of(), packs_of(3)
    if old:
        packs = [replace(pack, old_logp=learner.policy.log_probs(pack) - 0.3) for pack in packs]
    answers = [c for pack in packs for c in pack.conversations]
    for c in answers[::3]:  # partly supervised
        c.sampler_logps[:] = [math.nan] * len(c.sampler_logps)
    packs = [replace(make_pack(build_trees(list(pack.conversations))), old_logp=pack.old_logp) for pack in packs]
    learner.watched = {id(c.sampler_logps): TokenStats() for c in answers[::2]}
    wanted = {stream: [0.0] * 5 for stream in STREAMS}
    for pack in packs:
        logps, entropies = (x.tolist() for x in learner.policy.measure(pack))
        olds = logps if pack.old_logp is None else pack.old_logp.tolist()
        for i, (now, entropy, before) in enumerate(zip(logps, entropies, olds, strict=True)):
            sampler = pack.sampler_logp[i].item()
            if math.isnan(sampler):
                continue
            d, gap = now - before, before - sampler
            new = [1.0, entropy, math.exp(d) - d - 1, math.exp(gap) - gap - 1, abs(math.exp(gap) - 1) > 0.1]
            stream = pack.conversations[pack.conversation[i]].stream
            wanted[stream] = [a + b for a, b in zip(wanted[stream], new, strict=True)]
    sampled = learner.measure(packs)
    for stream in STREAMS:
        assert sampled[stream] == pytest.approx(wanted[stream], rel=1e-4, abs=1e-5)
    for pack in packs:
        values = learner.policy.measure(pack)[0] if pack.old_logp is None else pack.old_logp
        for i, c in enumerate(pack.conversations):
            kept = learner.watched.get(id(c.sampler_logps))
            if kept is not None:
                assert kept.logps == values[pack.conversation == i].tolist()
