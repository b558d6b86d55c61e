"""The request is the distribution: sampled frequencies against the trainer's own probabilities, whatever the model's
files say. The vLLM engines have the same test in test_vllm_colocated.py and test_vllm_server.py."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from frequencies import FALSE_ALARMS, HOSTILE, SAMPLES, logp_error, p_values
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from transformers import GenerationConfig, GenerationMixin, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from cipo_fast.chat import Chat
from cipo_fast.config import Config, load_config
from cipo_fast.engines import build_engine
from cipo_fast.errors import UserError
from cipo_fast.model import load_model, load_tokenizer
from cipo_fast.packing import build_trees, make_pack
from cipo_fast.policy import ATTENTION, Policy, build_policy
from cipo_fast.records import Conversation, Segment
from cipo_fast.rollout import Sampling
from cipo_fast.rollout.local import LocalEngine

V, EOS, PROMPT = 16, 1, [3, 9, 4, 12]
LEGACY = {"temperature": 0.05, "top_p": 0.5, "repetition_penalty": 1.5, "do_sample": True, "min_length": 9}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 16 tokens, its logits spread as a trained one's."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    config = Qwen3Config(vocab_size=V, eos_token_id=EOS, pad_token_id=0, initializer_range=0.25, **sizes, **heads)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(V)}, unk_token="t2"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="t1", pad_token="t0")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    (folder / "rows.jsonl").write_text(json.dumps({"prompt": "t3 t9 t4 t12", "answer": "t5"}))
    return folder


def settings(folder: Path) -> Config:
    return load_config(
        [], [f"model.path={folder}", "rollout.batch_sequences=1024", f"data.train={folder / 'rows.jsonl'}"]
    )


def hostile(folder: Path, name: str) -> Config:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": EOS, **HOSTILE[name]}))
    return settings(folder)


def trainer_logits(policy: Policy) -> Callable[[list[list[int]]], Tensor]:
    """Log-probs of every token after each sequence, as training computes them: [N, V]."""

    def after(sequences: list[list[int]]) -> Tensor:
        rows = [
            Conversation((Segment(ids), Segment([v])), None, "rollout", 0.0, 0.0, 0.0)
            for ids in sequences
            for v in range(V)
        ]
        return policy.log_probs(make_pack(build_trees(rows, "rows")), temperature=1.0).reshape(-1, V)

    return after


@pytest.mark.parametrize("files", [*HOSTILE, "legacy keys in config.json"])
def test_samples_are_from_the_distribution_of_the_request(folder: Path, mesh: DeviceMesh, files: str) -> None:
    shape = folder / "config.json"
    text = shape.read_text()
    if files in HOSTILE:
        config = hostile(folder, files)
    else:
        (folder / "generation_config.json").unlink(missing_ok=True)
        shape.write_text(json.dumps(json.loads(text) | LEGACY))
        config = settings(folder)
    try:
        engine = build_engine(config, load_model(config, ATTENTION), Chat(load_tokenizer(config), config.data), "cpu")
        after = trainer_logits(build_policy(load_model(config, ATTENTION), config, mesh))
    finally:
        shape.write_text(text)
    for temperature, top_p in [(1.0, 1.0), (1.0, 0.9), (0.7, 1.0), (0.7, 0.9)]:
        (answers,) = engine.generate([PROMPT], SAMPLES, Sampling(temperature, top_p, 2), 7)
        found = p_values(after, PROMPT, answers, [EOS], temperature, top_p)
        assert min(found) > FALSE_ALARMS, (temperature, top_p, found)
        assert logp_error(after, PROMPT, answers, temperature, top_p) < 2e-5
    greedy = [PROMPT]
    for _ in range(6):
        greedy = [[*greedy[0], int(after(greedy)[0].argmax())]]
    (answer,) = engine.generate([PROMPT], 1, Sampling(0.0, 1.0, 6), 0)[0]
    expected = greedy[0][len(PROMPT) :]
    assert answer.token_ids == (expected[: expected.index(EOS) + 1] if EOS in expected else expected)


def test_the_test_can_tell(folder: Path, mesh: DeviceMesh) -> None:
    """At T=0.9 where T=1 was asked for, or with top_p=0.97 where nothing was to be cut."""
    config = hostile(folder, "penalties")
    after = trainer_logits(build_policy(load_model(config, ATTENTION), config, mesh))
    engine = build_engine(config, load_model(config, ATTENTION), Chat(load_tokenizer(config), config.data), "cpu")
    for wrong in (Sampling(0.9, 1.0, 2), Sampling(1.0, 0.97, 2)):
        (answers,) = engine.generate([PROMPT], SAMPLES, wrong, 7)
        assert min(p_values(after, PROMPT, answers, [EOS], 1.0, 1.0)) < FALSE_ALARMS


def test_code_of_a_model_that_samples_itself_is_refused(folder: Path) -> None:
    config = hostile(folder, "penalties")

    class Sampler(Qwen3ForCausalLM):
        def _sample(self, *args: object, **kwargs: object) -> Tensor:
            return super()._sample(*args, **kwargs)

    class Filler(Qwen3ForCausalLM):
        @staticmethod
        def _get_default_generation_params() -> dict:
            return {"temperature": 0.5}

    for kind in (Sampler, Filler):
        model = load_model(config, "sdpa")
        model.__class__ = kind
        if kind is Filler:  # a default that stands in neither file
            model._prepare_generation_config = None
        with pytest.raises(UserError, match=f"{kind.__name__} brings code of its own for _"):
            LocalEngine(model, [EOS], 0, 8)


def test_settings_that_a_later_transformers_might_fill_in_are_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = GenerationMixin._prepare_generation_config

    def filling(self: GenerationMixin, config: GenerationConfig, **kwargs: object) -> tuple:
        prepared, rest = prepare(self, config, **kwargs)
        prepared.min_p = 0.1
        return prepared, rest

    monkeypatch.setattr(GenerationMixin, "_prepare_generation_config", filling)
    with pytest.raises(UserError, match="Qwen3ForCausalLM sets min_p for every answer"):
        LocalEngine(load_model(hostile(folder, "penalties"), "sdpa"), [EOS], 0, 8)
