"""`model.dtype=bfloat16`, as both large recipes have it, on a CPU: forward and backward passes in bfloat16 under
FSDP2's mixed precision; weights, gradients, optimiser and log-probs in float32.

Bounds. A bfloat16 rounding is 2^-9 = 0.2% of a number. From embedding to loss and back an activation is rounded some
forty times in two layers: as a random walk 40^0.5 * 0.2% = 1.2% of a gradient's norm. The bounds are three times that
for the norm of a parameter's gradient. In a run advantages have both signs and much of the gradient cancels, while
its roundings do not: 0.026 to 0.075 was seen, and twice that is the bound; a wrong factor of 2 is 0.5 or more.
"""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gradients_on_ranks import gradients, gradients_of, settings, trees
from safetensors.torch import load_file
from test_train import SMALL, metrics, problems_of, run_dir
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from cipo_fast.config import Config, configs_dir, load_config
from cipo_fast.distributed import process_group
from cipo_fast.embedded.model import new_model
from cipo_fast.embedded.prepare import prepare
from cipo_fast.learner import Learner
from cipo_fast.packing import Pack, make_pack
from cipo_fast.policy import ATTENTION, Policy, build_policy
from cipo_fast.rollout.local import LocalEngine
from cipo_fast.train import main

GRADIENT = 0.036  # |bfloat16 - float32| / |float32|, norms of a parameter's gradient
GRADIENT_IN_RUN = 0.15


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """A test's own: the command opens a process group itself."""
    with process_group() as mesh:
        yield mesh


def worst(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    assert found.keys() == exact.keys()
    return max(float((found[name] - exact[name]).norm() / exact[name].norm()) for name in exact)


@pytest.mark.parametrize("case", ["bfloat16", "bfloat16_checkpointed"])
def test_gradients_are_those_of_float32_up_to_rounding(case: str, mesh: DeviceMesh) -> None:
    exact, expected = gradients(
        Policy(new_model(settings("float32"), ATTENTION), settings("float32")),
        settings("float32"),
        [make_pack(trees())],
    )
    policy = build_policy(new_model(settings(case), ATTENTION), settings(case), mesh)
    update, found = gradients(policy, settings(case), [make_pack(trees())])
    assert update.loss == pytest.approx(exact.loss, rel=0.01)
    assert 0.001 < worst(found, expected) < GRADIENT  # the lower bound: it did compute in bfloat16
    assert {g.dtype for g in found.values()} == {p.dtype for p in policy.parameters()} == {torch.float32}


def test_log_probs_stay_float32_on_the_way_in_and_out(mesh: DeviceMesh) -> None:
    """FSDP2 would cast a pack's float32 tensors too, and a ratio of 1 would be one of 0.99 to 1.01."""
    policy = build_policy(new_model(settings("bfloat16"), ATTENTION), settings("bfloat16"), mesh)
    pack = make_pack(trees())
    old = policy.log_probs(pack)
    assert old.dtype == torch.float32
    assert not torch.equal(old, old.bfloat16().float())
    output = policy(Pack(**{**pack.__dict__, "old_logp": old}))
    assert output.logp.dtype == output.loss.dtype == torch.float32
    assert torch.equal(output.ratio, torch.ones_like(output.ratio))


class Watched:
    """What every update of a run computes in, and how far its gradients are from float32's on the same packs."""

    def __init__(self, config: Config, monkeypatch: pytest.MonkeyPatch):
        self.config = config
        self.kinds: dict[str, set[Any]] = {k: set() for k in ("weights", "optimiser", "hidden", "logp", "engine")}
        self.distances: list[float] = []
        self.losses: list[tuple[float, float]] = []
        update, generate = Learner.update, LocalEngine.generate

        def watched_update(learner: Learner, packs: list[Pack], step: int) -> Any:
            if not isinstance(learner.policy, FSDPModule):
                return update(learner, packs, step)
            twin = new_model(config, ATTENTION)
            twin.load_state_dict({k: v.clone() for k, v in learner.policy.full_weights()}, strict=False)
            with self.watch(learner.policy), gradients_of(learner) as found:
                done = update(learner, packs, step)
            exact, expected = gradients(Policy(twin, config), config, packs)
            self.distances.append(worst(found, expected))
            self.losses.append((done.loss, exact.loss))
            self.kinds["weights"] |= {p.dtype for p in learner.policy.parameters()}
            states = learner.optimizer.state.values()
            self.kinds["optimiser"] |= {s[k].dtype for s in states for k in ("exp_avg", "exp_avg_sq")}
            return done

        def watched_generate(engine: LocalEngine, *args: Any) -> Any:
            self.kinds["engine"].add(next(engine.model.parameters()).dtype)
            return generate(engine, *args)

        monkeypatch.setattr(Learner, "update", watched_update)
        monkeypatch.setattr(LocalEngine, "generate", watched_generate)

    def watch(self, policy: Policy) -> "Hooks":
        return Hooks(
            policy.model.base_model.register_forward_hook(
                lambda _m, _i, out: self.kinds["hidden"].add(out.last_hidden_state.dtype)
            ),
            policy.register_forward_hook(lambda _m, _i, out: self.kinds["logp"].add(out.logp.dtype)),
        )


class Hooks:
    def __init__(self, *handles: Any):
        self.handles = handles

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_the_command_trains_in_bfloat16(
    checkpointing: str, tmp_path: Path, warm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = run_dir(tmp_path, warm, "start")
    small = load_config([], [*SMALL, f"run.dir={start}"])
    with process_group() as mesh:
        prepared = prepare(small, mesh, print)
    watched = Watched(copy.deepcopy(small), monkeypatch)
    folder = tmp_path / "run"
    args = [str(configs_dir() / "embedded.yaml"), *SMALL, f"model.path={prepared.model.path}", *problems_of(start),
            "model.dtype=bfloat16", f"model.activation_checkpointing={checkpointing}", "train.steps=4",
            "train.pack_tokens=256", f"run.dir={folder}"]  # fmt: skip
    assert main(args) == 0
    low, full = {torch.bfloat16}, {torch.float32}
    assert watched.kinds == {"weights": full, "optimiser": full, "logp": full, "hidden": low, "engine": low}
    assert len(watched.distances) == 4
    assert 0.001 < max(watched.distances) < GRADIENT_IN_RUN
    for loss, exact in watched.losses:
        assert loss == pytest.approx(exact, abs=0.005)  # of advantages around 1
    for row in metrics(folder):
        assert row["train/skipped"] == 0
        assert 1e-5 < row["sync/parity_mean_abs"] < 0.05  # sync.py's tolerance; below 1e-5 nothing was rounded
        assert row["rollout/sampler_gap"] is None or row["rollout/sampler_gap"] < 0.05
    assert {w.dtype for w in load_file(folder / "model" / "model.safetensors").values()} == full
