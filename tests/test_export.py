"""What a run leaves behind as model/ is what it trained: every tensor, bit for bit, under names that load."""

import json
from pathlib import Path

import pytest
import torch
from frequencies import HOSTILE
from torch.distributed.device_mesh import DeviceMesh
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    Phi3Config,
    PreTrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from cipo_fast import checkpoint
from cipo_fast.config import load_config
from cipo_fast.embedded.model import embedded_tokenizer
from cipo_fast.policy import ATTENTION, build_policy

SIZES = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "pad_token_id": 0}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
MIXTURE = {"moe_intermediate_size": 16, "num_experts_per_tok": 2, "head_dim": 8}
SHAPES: dict[str, PreTrainedConfig] = {
    "a tied head": Qwen3Config(tie_word_embeddings=True, head_dim=8, **SIZES, **HEADS),
    "a head of its own": Qwen3Config(tie_word_embeddings=False, head_dim=8, **SIZES, **HEADS),
    "fused layers": Phi3Config(sliding_window=None, **SIZES, **HEADS),
    "experts": Qwen3MoeConfig(num_experts=4, **SIZES, **HEADS, **MIXTURE),
    "a persistent buffer": Glm4MoeConfig(n_routed_experts=4, n_group=1, topk_group=1, **SIZES, **HEADS, **MIXTURE),
}


@pytest.mark.parametrize("what", SHAPES)
def test_an_export_loads_as_the_model_that_was_trained(what: str, tmp_path: Path, mesh: DeviceMesh) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(SHAPES[what], attn_implementation=ATTENTION)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if "e_score_correction_bias" in name:
                buffer.copy_(torch.randn(buffer.shape))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    policy = build_policy(model, load_config([], []), mesh)
    weights = dict(policy.full_weights())
    assert set(weights) | set(policy.tied_names) == set(before)
    checkpoint.export(tmp_path, policy.model, weights, embedded_tokenizer())
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    assert set(loaded.state_dict()) == set(before)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("files", HOSTILE)
def test_a_models_own_generation_config_goes_along_as_it_is(files: str, tmp_path: Path, mesh: DeviceMesh) -> None:
    """transformers loads a temperature without do_sample, and refuses to save it: a run ended in a traceback."""
    folder, out = tmp_path / "model", tmp_path / "out"
    AutoModelForCausalLM.from_config(SHAPES["a tied head"]).save_pretrained(folder)
    shaping = {k: v for k, v in HOSTILE[files].items() if k != "do_sample"}
    (folder / "generation_config.json").write_text(json.dumps(shaping))
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=ATTENTION, dtype=torch.float32)
    policy = build_policy(model, load_config([], []), mesh)
    checkpoint.export(out, policy.model, dict(policy.full_weights()), embedded_tokenizer())
    assert GenerationConfig.from_pretrained(out).to_dict() == GenerationConfig.from_pretrained(folder).to_dict()
    assert AutoConfig.from_pretrained(out)._get_generation_parameters() == {}


def test_a_checkpoint_holds_persistent_buffers(tmp_path: Path, mesh: DeviceMesh) -> None:
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    model = Glm4MoeForCausalLM._from_config(SHAPES["a persistent buffer"], attn_implementation=ATTENTION)
    policy = build_policy(model, load_config([], []), mesh)
    assert sum("e_score_correction_bias" in name for name in get_model_state_dict(policy)) == 1  # one dense layer
