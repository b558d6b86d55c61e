"""Who samples, and how weights get there."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from cipo_fast.config.section import NonNegative, Positive, Section, Share


class VllmConfig(Section):
    """vLLM's own settings, for `rollout.engine=vllm` and for a server that the trainer starts."""

    gpu_memory: Annotated[float, Field(gt=0, lt=1)] = 0.45
    """Share of the device's memory for its weights and KV cache [ours]; 0.9 for a server on devices of its own."""
    cpu_kv_gib: Annotated[float, Field(gt=0)] = 1.0
    """KV cache without a GPU, in GiB [ours]."""
    max_sequences: Positive = 256
    """Sequences decoded at once [vLLM]."""
    max_model_len: Positive | None = None
    """Longest prompt and answer together; None: what this run's limits add up to. Longer prompts are dropped [ours]."""
    fp32_head: bool = True
    """Logits in fp32 also where dtype is bfloat16, as the trainer has them; False only to see the difference [ours]."""
    args: dict[str, Any] = Field(default={})
    """More of vLLM's engine arguments by their Python names, such as {data_parallel_size: 4} for a server [vLLM]."""


class ServerConfig(Section):
    """For `rollout.engine=vllm_server`: one that runs (`url`), or one that the trainer starts and looks after."""

    start: bool = False
    """Start `vllm serve` on this node, restart it when it dies, end it with the run [ours]."""
    url: str | None = None
    """... or the address of one, such as http://node7:8100, started as docs/running.md says; its key is the
    environment's VLLM_API_KEY [ours]."""
    port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """Port of a started server; None takes a free one (cipo_fast.serve: 8100) [ours]."""
    devices: str | None = None
    """CUDA_VISIBLE_DEVICES of a started server, such as "6,7"; the trainer must not use them [ours]."""
    transfer: Literal["auto", "nccl", "shared_memory"] = "auto"
    """How weights travel: vLLM's NCCL engine [vLLM], or files in /dev/shm of one node [ours]; auto: NCCL on GPUs."""
    start_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """Longest wait for a server to answer, in seconds [ours]."""
    timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """Longest wait without a token from the server, or for one weight transfer; then it counts as dead [ours]."""
    max_restarts: NonNegative = 3
    """Restarts of a dead server within an hour or a step; then the run stops, its state saved [ours]."""


class SyncConfig(Section):
    probe_every: Positive = 1
    """After the syncs of every so many steps, and always after the first and a restart, compare the engine with the
    policy: checksums of every tensor, and log-probs of the last step's longest answers [ours]."""
    tolerance: Annotated[float, Field(gt=0)] | None = None
    """Largest mean gap of the probe in nats, 20 times that for one token; None: 1e-5 for float32, 0.05 for bfloat16."""
    alarm_outside: Share = 0.1
    """Warn when more than this share of tokens has exp(trainer - sampler log-prob) outside [0.9, 1.1] [ours]."""


class RolloutConfig(Section):
    engine: Literal["local", "vllm", "vllm_server"] = "local"
    """Who samples: transformers' generate in this process, vLLM in this process, or a vLLM server [ours]."""
    overlap: Literal[0, 1] = 0
    """1: a server samples the next batch while this one trains, one policy version behind [ours]."""
    prompts_per_step: Positive = 32
    """B [ThinkTwice]. With G it rules the batch; all else is derived."""
    samples_per_prompt: Annotated[int, Field(ge=2)] = 8
    """G [f2f]. Also Gc, the corrections an anchor, unless `correction.samples_per_anchor` is given."""
    temperature: Annotated[float, Field(ge=1e-3)] = 1.0
    """[f2f]. Log-probs and ratios are taken at this temperature."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """[f2f]. Below 1 the sampled distribution is not the one the ratio assumes (biased)."""
    max_tokens: Positive = 4096
    """Longest answer in training, for rollouts and corrections [f2f]."""
    batch_sequences: Positive = 512
    """Sequences the local engine generates at once [ours]."""
    vllm: VllmConfig = VllmConfig()
    """Settings of vLLM [vLLM]."""
    server: ServerConfig = ServerConfig()
    """Where the server is, or how it is started [ours]."""
