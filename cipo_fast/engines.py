"""Which engine samples, and what it is started with."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn import Parameter
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from cipo_fast.config import Config
from cipo_fast.distributed import is_main
from cipo_fast.errors import UserError
from cipo_fast.model import eos_ids, named_tensors
from cipo_fast.rollout import Engine
from cipo_fast.rollout.local import LocalEngine


def build_engine(config: Config, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, device: str) -> Engine:
    """The engine of `config.rollout.engine`, for a policy that starts as `model`. It has no weights before a sync."""
    ends = eos_ids(model, tokenizer)
    if config.rollout.engine == "local":
        twin = twin_of(model, device, getattr(torch, config.model.dtype))
        return LocalEngine(twin, ends, tokenizer.pad_token_id or 0, config.rollout.batch_sequences)
    from cipo_fast.rollout.vllm import VllmEngine, check_version

    check_version()
    folder = config.run_dir / "engine"
    if is_main():
        shape = copy.deepcopy(model.config)
        shape.architectures = [type(model).__name__]  # not every config that a model is built from says so
        write_shape(folder, shape, tokenizer)
    dist.barrier()
    names = [name for name, _ in named_tensors(model)]
    if config.rollout.engine == "vllm":
        return VllmEngine(folder, config, names, ends, device)
    from cipo_fast.rollout.vllm_server import VllmServerEngine

    dtype = getattr(torch, config.model.dtype)
    types = {name: dtype if isinstance(t, Parameter) else t.dtype for name, t in named_tensors(model)}
    wanted = {name: (tuple(tensor.shape), types[name]) for name, tensor in named_tensors(model)}
    return VllmServerEngine(folder, config, wanted, ends, device)


def twin_of(model: PreTrainedModel, device: str, dtype: torch.dtype) -> PreTrainedModel:
    """A copy with stock attention and its parameters in `dtype`. Buffers stay as they are: rounded to bfloat16, RoPE's
    frequencies are off by a radian after 1,000 tokens."""
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        parameter.data = parameter.data.to(device, dtype)
    twin.to(device)  # type: ignore[arg-type]
    twin.set_attn_implementation("sdpa")
    return twin


def write_shape(folder: Path, shape: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """What vLLM starts from: the model's config and tokenizer, no weights."""
    folder.mkdir(parents=True, exist_ok=True)
    shape.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def fit_to_engine(config: Config, engine: Engine) -> Config:
    """The config with prompts no longer than what leaves room for a whole answer. Longer ones are dropped as ever."""
    if engine.max_model_len is None:
        return config
    room = engine.max_model_len - config.rollout.max_tokens
    if room < 1:
        raise UserError(
            f"the engine holds {engine.max_model_len} tokens: rollout.max_tokens={config.rollout.max_tokens} leaves "
            "none for a prompt"
        )
    fitted = config.model_copy(deep=True)
    fitted.data.max_prompt_tokens = min(room, config.data.max_prompt_tokens)
    fitted.correction.max_prompt_tokens = min(room, config.correction.max_prompt_tokens)
    return fitted
