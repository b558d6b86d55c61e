"""Which engine samples, and what it is started with."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from cipo_fast.config import Config
from cipo_fast.distributed import on_main, together
from cipo_fast.errors import UserError
from cipo_fast.model import eos_ids
from cipo_fast.rollout import Engine
from cipo_fast.rollout.local import LocalEngine
from cipo_fast.rollout.supervised import SupervisedEngine


def build_engine(
    config: Config,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    device: str,
    say: Callable[[str], None] = print,
) -> SupervisedEngine:
    """The engine of `config.rollout.engine`, for a policy that starts as `model`. It has no weights before a sync, and
    its `publish` is still to be assigned. A collective."""
    engine = _bare_engine(config, model, tokenizer, device)
    return SupervisedEngine(engine, config.rollout.server.max_restarts, say)


def _bare_engine(config: Config, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, device: str) -> Engine:
    ends = eos_ids(model, tokenizer)
    if config.rollout.engine == "local":
        return together(lambda: _local_engine(config, model, tokenizer, ends, device))
    from cipo_fast.rollout.vllm import VllmEngine, check_version

    check_version()
    folder = config.run_dir / "engine"
    shape = copy.deepcopy(model.config)
    shape.architectures = [type(model).__name__]  # not every config that a model is built from says so
    on_main(lambda: write_shape(folder, shape, tokenizer))
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if config.rollout.engine == "vllm":  # builds process groups: a rank that fails in between leaves the others there
        return VllmEngine(folder, config, list(shapes), ends, device)
    from cipo_fast.rollout.vllm_server import build_server_engine

    return build_server_engine(folder, config, shapes, ends, device)


def _local_engine(
    config: Config, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ends: list[int], device: str
) -> LocalEngine:
    twin = copy.deepcopy(model).to(device, getattr(torch, config.model.dtype))  # type: ignore[arg-type]
    twin.set_attn_implementation("sdpa")
    return LocalEngine(twin, ends, tokenizer.pad_token_id or 0, config.rollout.batch_sequences)


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
