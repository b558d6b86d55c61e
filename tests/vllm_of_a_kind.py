"""vLLM with a kind of model: which tensors differ after a sync, or why it is refused. Arguments: FOLDER KIND."""

import os
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Phi3Config, Qwen2Config, Qwen3MoeConfig
from vllm_setup import LIMITS, TOKENIZER

from cipo_fast.chat import Chat
from cipo_fast.config import load_config
from cipo_fast.distributed import process_group
from cipo_fast.engines import build_engine
from cipo_fast.errors import UserError
from cipo_fast.model import cast_weights, load_model
from cipo_fast.rollout.checksums import checksum, differing, to_ints

SIZES = {"vocab_size": len(TOKENIZER), "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256}
TOKENS = {"eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None}
MIXTURE = {"head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
KINDS = {
    "fused layers": lambda: Phi3Config(**SIZES, **HEADS, **TOKENS),
    "biases and a head of its own": lambda: Qwen2Config(tie_word_embeddings=False, **SIZES, **HEADS, **TOKENS),
    "experts": lambda: Qwen3MoeConfig(**SIZES, **HEADS, **TOKENS, **MIXTURE),
}


def main(folder: Path, kind: str) -> None:
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_config(KINDS[kind]())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))  # biases and norms too
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    (folder / "rows.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    paths = [f"model.path={folder}", f"data.train={folder / 'rows.jsonl'}", f"run.dir={folder / 'run'}"]
    with process_group():
        config = load_config([], [*LIMITS, *paths, "correction.max_prompt_tokens=64", "rollout.engine=vllm"])
        loaded = load_model(config, "sdpa")
        try:
            engine = build_engine(config, loaded, Chat(TOKENIZER, config.data), "cpu")
        except UserError as error:
            print("refused:", error)
            return
        engine.sync(cast_weights(loaded, torch.float32), 0)
        sums = to_ints({name: checksum(tensor) for name, tensor in loaded.state_dict().items()})
        print("differing:", differing(sums, engine.checksums()), "of", len(sums))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
    sys.stdout.flush()
    os._exit(0)
