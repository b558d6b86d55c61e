"""Which engine samples, and what it is started with."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import Parameter
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from cipo_fast.chat import Chat
from cipo_fast.config import Config
from cipo_fast.distributed import is_main, on_main, together
from cipo_fast.errors import UserError
from cipo_fast.model import named_tensors
from cipo_fast.rollout import Engine
from cipo_fast.rollout.local import LocalEngine
from cipo_fast.rollout.supervised import SupervisedEngine


def build_engine(
    config: Config, model: PreTrainedModel, chat: Chat, device: str, say: Callable[[str], None] = print
) -> SupervisedEngine:
    """The engine of `config.rollout.engine`, for a policy that starts as `model`. It has no weights before a sync, and
    its `publish` is still to be assigned. A collective."""
    return SupervisedEngine(_bare_engine(config, model, chat, device), config.rollout.server.max_restarts, say)


def _bare_engine(config: Config, model: PreTrainedModel, chat: Chat, device: str) -> Engine:
    ends, dtype = chat.end_ids(model.generation_config), getattr(torch, config.model.dtype)
    if config.rollout.engine == "local":
        pad, batch = chat.tokenizer.pad_token_id or 0, config.rollout.batch_sequences
        return together(
            lambda: LocalEngine(twin_of(model, device, dtype), ends, pad, batch, max_model_len=config.max_model_len)
        )
    check_engine(config, device)  # what is refused is refused before anything is written
    folder = config.run_dir / "engine"
    shape = copy.deepcopy(model.config)
    shape.architectures = [type(model).__name__]  # not every config that a model is built from says so
    on_main(lambda: write_shape(folder, shape, chat.tokenizer))
    wanted = {
        name: (tuple(tensor.shape), dtype if isinstance(tensor, Parameter) else tensor.dtype)
        for name, tensor in named_tensors(model)
    }
    if config.rollout.engine == "vllm":  # builds process groups: a rank that fails in between leaves the others there
        from cipo_fast.rollout.vllm import VllmEngine

        try:
            return VllmEngine(folder, config, list(wanted), ends, device)
        except UserError:
            if is_main():
                shutil.rmtree(folder, ignore_errors=True)
            raise
    from cipo_fast.rollout.vllm_server import build_server_engine

    return build_server_engine(folder, config, wanted, ends, device)


def check_engine(config: Config, device: str) -> None:
    """UserError where `config.rollout` asks for what this machine has not, or vLLM does not know. A collective."""
    if config.rollout.engine == "local":
        return
    from cipo_fast.rollout.server_process import check_port
    from cipo_fast.rollout.vllm import check_version, engine_arguments

    check_version()
    engine_arguments(config, device)
    on_main(lambda: check_port(config))


def starting(config: Config) -> str:
    """What is waited for while `build_engine` works."""
    server = config.rollout.server
    if config.rollout.engine == "vllm_server" and not server.start:
        return f"waiting for {server.url} (up to {server.start_timeout_s:g} s)"
    return f"starting {config.rollout.engine}"


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


def positions(shape: PretrainedConfig) -> tuple[int | None, str]:
    """(tokens of the longest sequence that trainer and every engine compute alike, the key that says so); None where
    nothing limits it. As vLLM counts, but that frequencies which follow the length end it: trees and rows differ."""
    text = shape.get_text_config()
    longest = getattr(text, "max_position_embeddings", None)
    if longest is None:
        return None, ""
    key = "max_position_embeddings"
    rope = getattr(text, "rope_parameters", None) or {}
    for part in [rope] if "rope_type" in rope else [part for part in rope.values() if isinstance(part, dict)]:
        kind = part.get("rope_type")
        if kind == "longrope":  # its factors change with the length of whatever is computed together
            original = part.get("original_max_position_embeddings") or longest
            if original < longest:
                longest, key = original, "original_max_position_embeddings of longrope"
        elif kind == "linear" and not text.model_type.startswith("gemma3"):  # Gemma 3 counts its factor in
            longest, key = int(longest * (part.get("factor") or 1)), "max_position_embeddings x factor of linear rope"
    return longest, key


def fit_to_model(config: Config, shape: PretrainedConfig, say: Callable[[str], None]) -> Config:
    """The config with nothing longer than the model's positions, for every engine; what is cut is said, and what is
    left no room is refused."""
    limit, key = positions(shape)
    asked = config.rollout.vllm.max_model_len
    if limit is None:
        return config
    if asked is not None and asked > limit:
        raise UserError(
            f"rollout.vllm.max_model_len={asked} is above the model's {limit} positions ({key}); change: "
            f"rollout.vllm.max_model_len={limit}"
        )
    return _fit(config, limit, f"the model has {limit} positions ({key})", say)


def fit_to_engine(config: Config, engine: Engine, say: Callable[[str], None]) -> Config:
    """The config with prompts no longer than what leaves room for a whole answer. Longer ones are dropped as ever."""
    if engine.max_model_len is None:
        return config
    return _fit(config, engine.max_model_len, f"the engine holds {engine.max_model_len} tokens", say)


def _fit(config: Config, limit: int, what: str, say: Callable[[str], None]) -> Config:
    """`limit`: tokens of a prompt and its answer together, which `what` explains."""
    for key, answer in (("rollout.max_tokens", config.rollout.max_tokens), ("eval.max_tokens", config.eval.max_tokens)):
        if answer >= limit:
            raise UserError(f"{what}: {key}={answer} leaves none for a prompt; change: {key}={max(1, limit // 2)}")
    room = limit - config.rollout.max_tokens
    fitted = config.model_copy(deep=True)
    fitted.data.max_prompt_tokens = min(room, config.data.max_prompt_tokens)
    fitted.correction.max_prompt_tokens = min(room, config.correction.max_prompt_tokens)
    if limit < config.max_model_len:
        fitted.rollout.vllm.max_model_len = limit
        say(f"{what}: prompts of more than {room} are dropped, which leaves room for rollout.max_tokens")
        if config.eval.max_tokens > config.rollout.max_tokens:
            say(
                f"{what}: where a prompt has more than {limit - config.eval.max_tokens}, an evaluation's answer is cut "
                f"before eval.max_tokens={config.eval.max_tokens}"
            )
    return fitted
