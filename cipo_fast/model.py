"""The model and its tokenizer: any causal LM with a chat template."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from cipo_fast.config import Config
from cipo_fast.errors import UserError


def load_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """Raises UserError where there is none, or none with a chat template."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    except (OSError, ValueError, KeyError) as error:
        raise _cannot_load(config, "tokenizer", error) from None
    if not tokenizer.chat_template:
        raise UserError(f"model.path={config.model.path}: its tokenizer has no chat template; use an instruct model")
    if tokenizer.eos_token_id is None:
        raise UserError(f"model.path={config.model.path}: its tokenizer has no end-of-sequence token")
    return tokenizer


def load_model(config: Config, attention: str) -> PreTrainedModel:
    """The first policy in fp32 with the given attention implementation; raises UserError."""
    try:
        return AutoModelForCausalLM.from_pretrained(
            config.model.path, dtype=torch.float32, attn_implementation=attention
        )
    except (OSError, ValueError, KeyError) as error:
        raise _cannot_load(config, "model", error) from None


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All that a model's state is, each tensor once: parameters and persistent buffers (a router's bias, say), under
    the first of its names. What is no parameter is never to be cast: a buffer's type is part of what it says."""
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor


def cast_weights(model: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """`named_tensors` as an engine gets them: parameters in `dtype`, buffers as they are; one at a time."""
    for name, tensor in named_tensors(model):
        yield name, tensor.detach().to(dtype) if isinstance(tensor, nn.Parameter) else tensor


def tied_names(model: nn.Module) -> dict[str, str]:
    """Further name -> first name of a tensor that has several: {"lm_head.weight": "model.embed_tokens.weight"}."""
    first: dict[int, str] = {}
    return {
        name: first[id(tensor)]
        for name, tensor in model.state_dict(keep_vars=True).items()
        if isinstance(tensor, Tensor) and first.setdefault(id(tensor), name) != name
    }


def eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends an answer: the tokenizer's, and what the model's generation config adds."""
    own = model.generation_config.eos_token_id if model.generation_config is not None else None
    more = own if isinstance(own, list) else [] if own is None else [own]
    return sorted({tokenizer.eos_token_id, *more})


def _cannot_load(config: Config, what: str, error: Exception) -> UserError:
    reason = str(error).strip().splitlines()[0]
    return UserError(f"model.path={config.model.path}: cannot load the {what}: {reason}")
