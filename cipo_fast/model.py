"""The model and its tokenizer: any causal LM with a chat template."""

from __future__ import annotations

import torch
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


def eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends an answer: the tokenizer's, and what the model's generation config adds."""
    own = model.generation_config.eos_token_id if model.generation_config is not None else None
    more = own if isinstance(own, list) else [] if own is None else [own]
    return sorted({tokenizer.eos_token_id, *more})


def _cannot_load(config: Config, what: str, error: Exception) -> UserError:
    reason = str(error).strip().splitlines()[0]
    return UserError(f"model.path={config.model.path}: cannot load the {what}: {reason}")
