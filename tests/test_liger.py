"""liger-kernel's layers, interpreted, in the trainer's model on token trees: the same log-probs and gradients."""

import copy
import sys
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from conversations import random_conversations
from torch import Tensor
from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig, PretrainedConfig, Qwen3Config
from triton.runtime import interpreter

from cipo_fast.config import load_config
from cipo_fast.errors import UserError
from cipo_fast.liger import use_liger
from cipo_fast.packing import Pack, build_trees, make_pack
from cipo_fast.policy import ATTENTION, Policy

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3, "attn_implementation": ATTENTION,
}  # fmt: skip
MODELS = {
    "qwen3": (Qwen3Config(**SIZES), "RMSNorm, RoPE, SwiGLU"),
    "llama": (LlamaConfig(**SIZES), "RMSNorm, RoPE, SwiGLU"),
    "gemma": (GemmaConfig(**SIZES), "RMSNorm, RoPE, GEGLU"),
}


@triton.jit
def rsqrt(x):
    return tl.rsqrt(x)


@triton.jit
def tanh(x):
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the interpreter lacks for its kernels: numbers that have a dtype, and CUDA's own functions. And what it puts
    into transformers' modules, taken out again."""
    ops = pytest.importorskip("liger_kernel.ops")
    inner = interpreter._implicit_cvt

    def converted(arg: Any) -> Any:
        if isinstance(arg, float):
            return tl.tensor(interpreter.TensorHandle(np.array([arg], dtype=np.float32), tl.float32), tl.float32)
        return inner(arg)

    monkeypatch.setattr(interpreter, "_implicit_cvt", converted)
    monkeypatch.setattr(ops.rms_norm, "rsqrt", rsqrt)
    monkeypatch.setattr(ops.geglu, "tanh", tanh)
    for kind in MODELS:
        __import__(f"transformers.models.{kind}.modeling_{kind}")
        module = sys.modules[f"transformers.models.{kind}.modeling_{kind}"]
        for name, value in vars(module).copy().items():
            if not name.startswith("__"):
                monkeypatch.setattr(module, name, value)


def model_of(shape: PretrainedConfig) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(shape, attn_implementation=ATTENTION)


def computed(model: Any, pack: Pack) -> tuple[Tensor, dict[str, Tensor]]:
    output = Policy(model, load_config([], []))(pack)
    output.loss.backward()
    return output.logp, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", MODELS)
def test_log_probs_and_gradients_are_the_same(kind: str, interpreted: None) -> None:
    shape, layers = MODELS[kind]
    pack = make_pack(build_trees(random_conversations(3, n_trees=2, depth=3)))
    model = model_of(shape)
    logp, expected = computed(copy.deepcopy(model), pack)
    assert use_liger(model, load_config([], ["model.liger=true"]), "cpu") == f"liger-kernel: {layers}"
    assert "Liger" in repr(model.model.norm)
    assert "Liger" in repr(model.model.layers[0].mlp.forward)
    found_logp, found = computed(model, pack)
    assert not torch.equal(found_logp, logp)  # other kernels did compute it
    assert (found_logp - logp).abs().max() < 2e-5
    for name in expected:
        assert (found[name] - expected[name]).norm() <= 2e-5 * expected[name].norm(), name


def test_on_a_cpu_nothing_is_changed_unless_asked() -> None:
    model = model_of(MODELS["qwen3"][0])
    before = repr(model)
    assert use_liger(model, load_config([], []), "cpu") is None
    assert use_liger(model, load_config([], ["model.liger=false"]), "cuda") is None
    assert repr(model) == before


def test_what_cannot_be_done(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, auto = load_config([], ["model.liger=true"]), load_config([], [])
    model = model_of(MODELS["qwen3"][0])
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", None)
        with pytest.raises(
            UserError, match=r"model\.liger=true: liger-kernel is not installed \(`pip install -e \.\[gpu"
        ):
            use_liger(model, asked, "cpu")
        assert "not installed" in (use_liger(model, auto, "cuda") or "")
    pytest.importorskip("liger_kernel")
    with monkeypatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        with pytest.raises(UserError, match=r"model\.liger=true: liger-kernel needs a GPU; change: model\.liger=auto"):
            use_liger(model, asked, "cpu")
    model.config.model_type = "unheard_of"
    assert use_liger(model, auto, "cuda") == "layers are transformers' own: liger-kernel has no layers of unheard_of"
