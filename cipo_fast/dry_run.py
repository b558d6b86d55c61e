"""`--dry-run`: the resolved config, what follows from it, and what memory and a step would take."""

from __future__ import annotations

import os
import time

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from cipo_fast.config import Config
from cipo_fast.errors import UserError
from cipo_fast.model import embedded_config
from cipo_fast.policy import cost_model


def describe(config: Config) -> str:
    """Everything a run would do, without doing it. Estimates are upper bounds: every answer at its longest."""
    shape = _shape(config)
    with torch.device("meta"):
        parameters = AutoModelForCausalLM.from_config(shape).num_parameters()
    world = int(os.environ.get("WORLD_SIZE", 1))
    sections = [_sizes(config), _memory(config, shape, parameters, world), _time(config, shape, parameters, world)]
    return (
        config.to_yaml() + "\n" + "\n".join(f"# {line}" if line else "" for lines in sections for line in (*lines, ""))
    )


def _shape(config: Config) -> PretrainedConfig:
    if config.model.path == "embedded":
        return embedded_config(config.model.embedded)
    try:
        return AutoConfig.from_pretrained(config.model.path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.path={config.model.path}: cannot load its config: {str(error).splitlines()[0]}"
        ) from None


def _sizes(config: Config) -> list[str]:
    rollouts = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
    corrections = config.anchors_per_step * config.samples_per_anchor
    tree, rows = _tokens(config)
    return [
        f"{rollouts} rollouts a step ({config.rollout.prompts_per_step} prompts x {config.rollout.samples_per_prompt})",
        f"{config.anchors_per_step} anchors a step, {corrections} corrections ({config.samples_per_anchor} an anchor)",
        f"{config.train.steps} steps, {config.train.steps * config.train.updates_per_step} updates",
        f"at most {tree:,} tokens forwarded a step ({rows:,} as one row a conversation)",
    ]


def _tokens(config: Config) -> tuple[int, int]:
    """(as trees, as rows) tokens of a step with every prompt and answer at its longest."""
    prompt, answer = config.data.max_prompt_tokens, config.rollout.max_tokens
    b, g, n, gc = (
        config.rollout.prompts_per_step,
        config.rollout.samples_per_prompt,
        config.anchors_per_step,
        config.samples_per_anchor,
    )
    context = min(config.correction.max_prompt_tokens, prompt + answer + 64)  # a follow-up turn is short
    own = context if config.correction.layout == "quoted" else max(0, context - prompt - answer)
    tree = b * (prompt + g * answer) + n * (own + gc * answer)
    rows = b * g * (prompt + answer) + n * gc * (context + answer)
    return (rows if config.train.packing == "rows" else tree), rows


def _memory(config: Config, shape: PretrainedConfig, parameters: int, world: int) -> list[str]:
    text = shape.get_text_config()
    width = 2 if config.model.dtype == "bfloat16" else 4
    per_layer = text.hidden_size * (2 if config.model.activation_checkpointing else 34) * width
    items = {
        "weights (fp32, sharded)": 4 * parameters / world,
        "gradients (fp32, sharded)": 4 * parameters / world,
        "optimiser (AdamW, sharded)": 8 * parameters / world,
        "reference (fp32, sharded)": 4 * parameters / world if config.loss.beta else 0,
        "engine's copy": width * parameters,
        "activations of a full pack, about": config.train.pack_tokens * per_layer * text.num_hidden_layers,
    }
    lines = [f"memory of each of {world} rank{'s' if world > 1 else ''}:"]
    lines += [f"  {name:<36}{_bytes(size):>10}" for name, size in items.items() if size]
    return [
        *lines,
        f"  {'together':<36}{_bytes(sum(items.values())):>10}  of {_bytes(_device_memory())} on this device",
    ]


def _time(config: Config, shape: PretrainedConfig, parameters: int, world: int) -> list[str]:
    cost = cost_model(shape, parameters)
    tokens, _ = _tokens(config)
    b, n = config.rollout.prompts_per_step, config.anchors_per_step
    targets = (b * config.rollout.samples_per_prompt + n * config.samples_per_anchor) * config.rollout.max_tokens
    learn = tokens * cost.per_token + targets * cost.per_target
    generate = targets * (cost.per_token + cost.per_target) / 3  # forward alone
    rate = _matmul_rate(getattr(torch, config.model.dtype))
    return [
        f"one step at the {rate / 1e9:,.0f} GFLOP/s of a large matrix product, measured here, times {world}",
        "(a lower bound for answers that long; attention pairs are not counted):",
        f"  generate {generate / rate / world:,.2f} s, learn {learn / rate / world:,.2f} s",
    ]


def _matmul_rate(dtype: torch.dtype) -> float:
    """FLOP/s of one large matrix product on this device, the best of three."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    n = 8192 if device == "cuda" else 1024
    a = torch.randn(n, n, device=device).to(dtype)
    best = float("inf")
    for _ in range(4):
        started = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - started)
    return 2 * n**3 / best


def _device_memory() -> float:
    if torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(0).total_memory)
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _bytes(n: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if n < 1000:
            return f"{n:,.1f} {unit}"
        n /= 1000
    return f"{n:,.1f} TB"
