"""The embedded model's tokenizer and shape, built in code."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from cipo_fast.config import Config, EmbeddedModel

_SPECIAL = ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def embedded_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte: byte-level BPE without merges, so any text is its characters and nothing is unknown."""
    vocab = {token: i for i, token in enumerate((*_SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(_SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        chat_template=_TEMPLATE,
        padding_side="left",
    )


def embedded_config(shape: EmbeddedModel) -> Qwen3Config:
    tokenizer = embedded_tokenizer()
    return Qwen3Config(
        architectures=[Qwen3ForCausalLM.__name__],
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.hidden // shape.heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        initializer_range=0.05,
    )


def new_model(config: Config, attention: str) -> Qwen3ForCausalLM:
    """Random fp32 weights, by the seed, with the given attention implementation."""
    torch.manual_seed(config.seed)
    return Qwen3ForCausalLM._from_config(embedded_config(config.model.embedded), attn_implementation=attention)
