"""The head with its vocabulary split over 2 and 3 ranks: on each the loss, log-probs and gradients of the whole head.

torchrun runs this file itself as the ranks' program.
"""

import os
import subprocess
import sys
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

N, T, H, V = 23, 17, 12, 53
SHARDS = {2: [20, 33], 3: [7, 45, 1]}  # columns of each rank: unequal, and one of them has a single one
BACK_ENDS = {"torch": torch.float64, "triton": torch.float32}
EXACT = {"torch": 1e-12, "triton": 2e-6}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "every term": {"beta": 0.1, "entropy_coef": 0.05, "is_cap": 2.0, "dual_clip": 3.0, "softcap": 5.0},
    "sequence": {"ratio": "sequence", "row_lengths": [9, 5, 6, 3], "chunk_targets": 8},
    "cispo": {"clip": "cispo", "chunk_targets": 7},
}


@pytest.mark.parametrize("back_end", BACK_ENDS)
@pytest.mark.parametrize("ranks", SHARDS)
def test_every_rank_has_what_one_process_has(ranks: int, back_end: str) -> None:
    torchrun = Path(sys.executable).with_name("torchrun")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CIPO_KERNELS": back_end, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [str(torchrun), "--standalone", f"--nproc-per-node={ranks}", __file__, back_end],
        env=environment, timeout=200, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def inputs(dtype: torch.dtype, scale: float = 1.0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    return {
        "hidden": normal(T, H) * scale,
        "weight": normal(V, H),
        "bias": normal(V),
        "pred_index": torch.randint(T, (N,), generator=g),
        "target_id": torch.randint(V, (N,), generator=g),
        "temperature": torch.rand(N, generator=g, dtype=torch.float64).to(dtype) + 0.5,
    }


def terms(dtype: torch.dtype) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    log_probs = {name: -4 * torch.rand(N, generator=g, dtype=torch.float64) for name in ("old_logp", "ref_logp")}
    weights = {
        "rl_weight": torch.rand(N, generator=g) * (torch.arange(N) % 5 > 0),
        "ce_weight": torch.rand(N) * 0 + 0.1,
    }
    given = log_probs | weights | {"advantage": torch.randn(N, generator=g)}
    return {name: x.to(dtype) for name, x in (given | {"sampler_logp": log_probs["old_logp"] - 0.1}).items()}


def with_gradients(values: dict[str, Tensor], sums: Any) -> list[Tensor]:
    """The detached results of sums(values), and the gradients that its first gives hidden, weight and bias."""
    leaves = {name: values[name].clone().requires_grad_() for name in ("hidden", "weight", "bias")}
    results = sums(values | leaves)
    results[0].sum().backward()
    return [x.detach() for x in results] + [x.grad for x in leaves.values() if x.grad is not None]


def close(found: list[Tensor], expected: list[Tensor], start: int, end: int, bar: float, what: str) -> None:
    *same, d_weight, d_bias = expected
    for i, (mine, whole) in enumerate(zip(found, [*same, d_weight[start:end], d_bias[start:end]], strict=True)):
        error = (mine.double() - whole.double()).abs().max()
        assert error <= bar * max(1.0, float(whole.abs().max())), f"{what}, {i}: {error}"


def main(back_end: str) -> None:
    from cipo_kernels import fused_linear_cipo_loss, fused_linear_logprob
    from cipo_kernels.lm_head import VocabShard

    rank, group, dtype = dist.get_rank(), dist.group.WORLD, BACK_ENDS[back_end]
    sizes = SHARDS[dist.get_world_size()]
    end = list(accumulate(sizes))[rank]
    start = end - sizes[rank]
    shard = VocabShard(group, start)

    def part(values: dict[str, Tensor]) -> dict[str, Tensor]:
        return values | {name: values[name][start:end] for name in ("weight", "bias")}

    def whole(call: Any, values: dict[str, Tensor]) -> list[Tensor]:
        os.environ["CIPO_KERNELS"] = "reference"
        try:
            return with_gradients({k: v.double() if v.is_floating_point() else v for k, v in values.items()}, call)
        finally:
            os.environ["CIPO_KERNELS"] = back_end

    for name, options in OPTIONS.items():
        values, given = inputs(dtype), terms(dtype)

        def loss(x: dict[str, Tensor], options: Any = options, given: Any = given, **more: Any) -> list[Tensor]:
            weights = {k: v.to(x["hidden"].dtype) for k, v in given.items()}
            output = fused_linear_cipo_loss(**x, **weights, **options, **more)
            return [output.loss, output.logp, output.entropy, output.ratio, output.clip_fraction, output.approx_kl]

        expected = whole(loss, values)
        found = with_gradients(part(values), lambda x, loss=loss: loss(x, shard=shard))
        close(found, expected, start, end, EXACT[back_end], name)
        with torch.no_grad():
            again = loss(part(values), shard=shard)
        assert all((a - b).abs().max() <= 1e-6 for a, b in zip(again, found, strict=False))

    def log_probs(x: dict[str, Tensor], **more: Any) -> list[Tensor]:
        logp, entropy = fused_linear_logprob(**x, return_entropy=True, softcap=30.0, **more)
        return [logp + 0.3 * entropy, logp, entropy]

    values = inputs(dtype)
    expected = whole(log_probs, values)
    close(
        with_gradients(part(values), lambda x: log_probs(x, shard=shard)), expected, start, end, EXACT[back_end], "log"
    )
    confident(dtype, part, whole, shard)

    values["target_id"][3:5] = torch.tensor([-1, V])
    logp = fused_linear_logprob(**part(values), shard=shard)
    assert logp.isnan().nonzero().flatten().tolist() == [3, 4]


def confident(dtype: torch.dtype, part: Any, whole: Any, shard: Any) -> None:
    """1 - p from 0.1 to 1e-9: log-probs within 1% of it, whichever rank has the others' columns."""
    from cipo_kernels import fused_linear_logprob

    values = inputs(dtype, scale=0.01)
    del values["temperature"]
    values["hidden"][:, 0] = 1.0
    values["weight"][:, 0] = 0.0
    values["pred_index"] = torch.arange(N) % T
    values["hidden"][:, 1] = torch.linspace(1, 10, T).to(dtype)
    values["weight"][:, 1] = 0.0
    target = 30  # the one column that column 1 of hidden counts for
    values["weight"][target, 1] = 2.5
    values["target_id"] = torch.full((N,), target)

    def logp(x: dict[str, Tensor], **more: Any) -> list[Tensor]:
        return [fused_linear_logprob(**x, **more)]

    found, expected = with_gradients(part(values), lambda x: logp(x, shard=shard))[0], whole(logp, values)[0]
    assert expected.max() > -1e-8
    assert ((found.double() - expected) / expected).abs().max() < 0.01


if __name__ == "__main__":
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    main(sys.argv[1])
    dist.destroy_process_group()
