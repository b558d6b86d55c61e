"""The model, the optimiser, the loop, and what a run writes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from cipo_fast.config.section import NonNegative, Positive, Section, Share, Weight
from cipo_fast.config.settings import FilePath, NameOrPath


class EmbeddedModel(Section):
    """Shape and warm start of the tiny Qwen3 built when `model.path=embedded` [ours]."""

    layers: Positive = 2
    """Decoder layers."""
    hidden: Annotated[int, Field(ge=8, multiple_of=8)] = 128
    """Hidden size; a head has hidden / heads."""
    heads: Positive = 4
    """Query heads."""
    kv_heads: Positive = 2
    """Key and value heads (GQA)."""
    mlp: Positive = 320
    """Inner size of the feed-forward part."""
    warm_accuracy: Share | None = None
    """Supervised steps stop at the first check with this greedy accuracy on training problems, with"""
    warm_kept: Share | None = None
    """... this share of its right attempts still right when they are shown back, and with"""
    warm_mended: Share | None = None
    """... this share of its wrong ones corrected,"""
    warm_steps: NonNegative | None = None
    """... or after this many. Of these four and the three below, null is the task's own (cipo_fast/embedded/tasks)."""
    warm_plain: Share | None = None
    """Share of the examples that are answers to a bare prompt; the others are corrections of an attempt."""
    warm_right: Share | None = None
    """Share of right attempts among those, to be kept."""
    warm_own: Share | None = None
    """Share of the half-trained policy's own samples among the wrong ones; the others are near misses made by the
    task."""
    warm_lr: Annotated[float, Field(gt=0, le=1)] = 2e-3
    """Learning rate of the supervised steps."""
    warm_batch: Positive = 64
    """Conversations a supervised step."""


class ModelConfig(Section):
    path: NameOrPath = "embedded"
    """`embedded`, a local folder or a hub name; anything `AutoModelForCausalLM` loads and that has a chat template."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the forward and backward pass. Weights, their gradients and the optimiser are float32 in either case."""
    attention: Literal["auto", "torch", "triton", "flash"] = "auto"
    """Back-end of the tree attention; auto: the fastest measured on this GPU (device_rates.json), torch elsewhere.
    flash: FlashAttention-3 or -4 where it is installed and fits the GPU, else torch's FlashAttention-2."""
    loss: Literal["logits", "exp"] = "logits"
    """Kernel of the fused loss on a GPU, V0 or V1 of kernels/README.md; V0 wherever V1 does not apply."""
    liger: Literal["auto"] | bool = "auto"
    """liger-kernel's RMSNorm, RoPE, SwiGLU and GEGLU in the trainer's model; auto: on a GPU, where it is installed and
    knows the architecture."""
    activation_checkpointing: bool = False
    """Recompute each layer but its attention in the backward pass, instead of keeping its activations."""
    embedded: EmbeddedModel = EmbeddedModel()
    """Shape and warm start of the embedded model."""


class OptimConfig(Section):
    lr: Annotated[float, Field(gt=0, le=1)] = 1e-6
    """Peak learning rate of AdamW [f2f, ThinkTwice]."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """AdamW's decay of the first moment."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """AdamW's decay of the second moment."""
    weight_decay: Weight = 0.0
    """AdamW's decoupled weight decay."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up; linear and cosine end at 0."""
    warmup_steps: NonNegative = 0
    """Optimiser steps of linear warm-up."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are scaled down to this norm."""
    long_act: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Of each head's query and key dimensions only this share, those of the largest activations, is trained; 0.3 in the
    paper [LongAct, arXiv 2604.14922]; null trains all."""


class TrainConfig(Section):
    steps: NonNegative = 500
    """Steps of the loop [paper]."""
    updates_per_step: Positive = 1
    """Optimiser steps a batch, each on its share of the prompts. With 1 the ratio is 1 and no old_logp pass runs."""
    packing: Literal["tree", "rows"] = "tree"
    """`rows` feeds one row a conversation, nothing shared: the control the speed-up is measured against."""
    pack_tokens: Positive = 16384
    """Capacity of a pack (one forward and backward pass), in tokens."""
    measure_every: NonNegative = 1
    """Every so many steps, entropy, KL and mismatch also over the answers that teach nothing (`*/all_*`), which costs
    their forward pass; 0 never [ours]."""


class EvalConfig(Section):
    problems: Positive | None = None
    """Held-out problems; None: all of `data.eval`, else 400 and at most a tenth of `data.train` [ours]."""
    samples: Annotated[int, Field(ge=2, le=1000)] = 8
    """n: answers a problem at T=1, for accuracy and pass@1, 2, 4... n. Twice the k that counts is better than k."""
    checked: Positive = 4
    """How many of them (at most all) are shown back to be checked, each by itself [ours]."""
    checks: NonNegative = 1
    """Rounds of that: in the second the answer to the first is checked, and so on [ours]."""
    every: NonNegative = 0
    """Evaluate every so many steps, too; 0 means before and after only."""
    max_tokens: Positive = 8192
    """Longest answer in evaluation [f2f]."""


class CheckpointConfig(Section):
    every: NonNegative = 50
    """Save every so many steps, and at the end; 0 means at the end only."""
    keep: Positive = 2
    """Checkpoints kept, newest first."""
    resume: Literal["auto"] | bool = "auto"
    """`auto`: go on with an unfinished run of the same settings in `run.dir`; true: that or nothing; false: begin anew.
    Whatever is not gone on with is set aside under `previous/` [verl]."""
    allow_changes: bool = False
    """Go on although settings, data or model that make the run what it is are not those it was started with [ours]."""
    export: bool = True
    """At the end write `model/`, which `AutoModelForCausalLM.from_pretrained` loads."""


class RunConfig(Section):
    name: Annotated[str, Field(pattern=r"^\.*[\w-][\w.-]*$")] = "cipo"
    """Name of the run."""
    dir: FilePath | None = None
    """Where everything is written; None means `runs/<name>`."""
    view: Literal["auto", "live", "plain"] = "auto"
    """`live` redraws one terminal view, `plain` prints a line a step; auto asks the terminal."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    """Where numbers go besides metrics.jsonl; Weights & Biases as its own environment variables say (WANDB_MODE...)."""
    save_rollouts_every: NonNegative = 1
    """Write rollouts and corrections as JSONL every so many steps; 0 never."""
    save_tokens: NonNegative = 16384
    """Tokens a recorded step whose texts, log-probs (the engine's and the trainer's) and entropies are written with
    their rollouts, for the report's colours; 0 none [ours]."""
    report: bool = True
    """At the end write `report.html` too, one page that opens from the disk: `python -m cipo_fast.report` [ours]."""
    profile_step: NonNegative = 0
    """Of this step the first rank writes a Chrome trace, `profile-step-N.json.gz`; 0 of none [torch.profiler]."""
    rank_timeout_s: Annotated[float, Field(gt=0)] = 1800.0
    """Longest wait of a rank for another one, whose rollouts may be longer, in seconds [torch]."""
    alarm_after: Positive = 10
    """Steps in a row in which nothing is learned (no reward varies, every answer is cut off...) that raise an alarm,
    and how often it is said again [ours]."""
