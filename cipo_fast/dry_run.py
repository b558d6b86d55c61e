"""`--dry-run`: the resolved config, what follows from it, and what memory and a step would take. Runs nothing.

    cipo_fast/train.py [configs/x.yaml ...] [key.path=value ...] --dry-run [--world 8] [--device-memory 80]

It plans for this machine, or for `--world` ranks with a GPU of `--device-memory` GB (1e9 bytes) each. Memory is
estimated from the model's shape, rather too high than too low: every answer at its longest, a full pack, all at once.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from cipo_kernels import device_rates
from transformers import AutoModelForCausalLM, PretrainedConfig

from cipo_fast.config import Config, EmbeddedModel, cautions, parse_args
from cipo_fast.engines import fit_to_model
from cipo_fast.errors import UserError
from cipo_fast.model import load_shape
from cipo_fast.policy import cost_model, decoder_layers, refuse_shape
from cipo_fast.tasks import check_data, rows_of_eval
from cipo_fast.try_out import planned

# Assumed, not measured: CUDA context, NCCL, CUDA graphs of a sleeping engine, fragmentation; Python and torch on a CPU.
RESERVE = {"cuda": 5e9, "cpu": 0.5e9}
ENGINE_WORK = 3e9  # assumed: vLLM's activations and CUDA graphs, within its share of a GPU
FOLLOW_UP = 64  # tokens of a follow-up turn, about

Memory = dict[str, float]  # what for -> bytes
EmbeddedShape = Callable[[EmbeddedModel], PretrainedConfig]


@dataclass(frozen=True)
class Devices:
    """What a run is planned for: `ranks` ranks, each with a device that has `memory` bytes."""

    kind: str  # cuda or cpu
    ranks: int
    memory: float
    here: bool  # this machine's: it can be measured

    @staticmethod
    def of_this_machine(ranks: int | None) -> Devices:
        ranks = ranks or (int(os.environ.get("WORLD_SIZE", 1)) if os.environ.get("RANK") else 1)
        if torch.cuda.is_available():
            return Devices("cuda", ranks, float(torch.cuda.get_device_properties(0).total_memory), True)
        return Devices("cpu", ranks, float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) / ranks, True)


@dataclass(frozen=True)
class Size:
    """Of a dense decoder-only model, in numbers."""

    parameters: int
    layer: int  # parameters of one decoder layer
    layers: int
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    query_norms: bool  # queries and keys are normalised, as Qwen3's are

    @property
    def outside(self) -> int:
        """Parameters outside the decoder layers: embedding, head, last norm."""
        return self.parameters - self.layers * self.layer


def dry_run(args: Sequence[str], embedded_shape: EmbeddedShape) -> str:
    """What `--dry-run` prints for a command line; raises UserError. `embedded_shape` knows the embedded model's."""
    rest = [arg for arg in args if arg != "--dry-run"]
    world, memory = (_take_number(rest, option) for option in ("--world", "--device-memory"))
    if world and world != int(world):
        raise UserError(f"--world {world:g}: expected a whole number of ranks")
    config = parse_args(rest)
    devices = Devices.of_this_machine(int(world) if world else None)
    if memory:
        devices = Devices("cuda", devices.ranks, memory * 1e9, False)
    embedded = config.model.path == "embedded"
    return describe(config, embedded_shape(config.model.embedded) if embedded else load_shape(config), devices)


def describe(config: Config, shape: PretrainedConfig, devices: Devices | None = None) -> str:
    """Everything a run would do, without doing it; on this machine unless `devices` says otherwise."""
    lengths: list[str] = []
    fitted = config
    try:
        fitted = fit_to_model(config, shape, lengths.append)
        refuse_shape(shape, fitted.max_model_len)
    except UserError as error:  # what a run would refuse, and all else that follows from the settings
        lengths.append(f"DOES NOT FIT: {error}")
    plan = Plan(fitted, size_of(shape), devices or Devices.of_this_machine(None))
    sections = [_sizes(fitted) + lengths, planned(fitted), *_memory(plan), _time(plan, shape)]
    return (
        config.to_yaml() + "\n" + "\n".join(f"# {line}" if line else "" for lines in sections for line in (*lines, ""))
    )


def _take_number(args: list[str], option: str) -> float | None:
    """Remove `option N` from args; N, or None where it is not given."""
    if option not in args:
        return None
    at = args.index(option)
    try:
        number = float(args[at + 1])
        if not 1 <= number < math.inf:
            raise ValueError
    except (IndexError, ValueError):
        raise UserError(f"{option}: expected a number of at least 1 after it") from None
    del args[at : at + 2]
    return number


def size_of(shape: PretrainedConfig) -> Size:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape)
    text, layers = shape.get_text_config(), decoder_layers(model)
    return Size(
        parameters=model.num_parameters(),
        layer=sum(p.numel() for p in layers[0].parameters()),
        layers=len(layers),
        hidden=text.hidden_size,
        mlp=text.intermediate_size,
        heads=text.num_attention_heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        vocab=text.vocab_size,
        query_norms=any("q_norm" in name for name, _ in layers[0].named_parameters()),
    )


# ------------------------------------------------------------------------------------------------------------- sizes


def _sizes(config: Config) -> list[str]:
    rollouts = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
    corrections = config.anchors_per_step * config.samples_per_anchor
    tree, rows = _tokens(config)
    lines = [
        f"{rollouts} rollouts a step ({config.rollout.prompts_per_step} prompts x {config.rollout.samples_per_prompt})",
        f"{config.anchors_per_step} anchors a step, {corrections} corrections ({config.samples_per_anchor} an anchor)",
        f"{config.train.steps} steps, {config.train.steps * config.train.updates_per_step} updates",
        f"at most {tree:,} tokens forwarded a step ({rows:,} as one row a conversation)",
        *cautions(config),
    ]
    if config.correction.start_steps:
        lines.append(
            f"the first {config.correction.start_steps} steps learn from verified corrections alone, without RL"
        )
    if config.model.path != "embedded":
        lines.append("only the model's config is read here: whether its weights are all there, a run says")
    try:
        check_data(config)
    except UserError as error:
        lines.append(f"a run would be refused: {error}")
    return lines


def held_out_problems(config: Config) -> int:
    """How many problems an evaluation has, at most."""
    if config.data.eval is None:
        return config.held_out
    rows = rows_of_eval(config)
    return config.held_out if rows is None else min(rows, config.eval.problems or rows)


def _tokens(config: Config) -> tuple[int, int]:
    """(as trees, as rows) tokens of a step with every prompt and answer at its longest."""
    prompt, answer = config.data.max_prompt_tokens, config.rollout.max_tokens
    b, g, n, gc = (
        config.rollout.prompts_per_step,
        config.rollout.samples_per_prompt,
        config.anchors_per_step,
        config.samples_per_anchor,
    )
    context = min(config.correction.max_prompt_tokens, prompt + answer + FOLLOW_UP)
    own = context if config.correction.layout == "quoted" else max(0, context - prompt - answer)
    hints = config.nudge.hints
    attempts = 2 * g if hints else g  # with a hint once after it, and once after the bare prompt
    tree = b * ((1 + hints) * prompt + attempts * answer) + n * (own + gc * answer)
    rows = b * attempts * (prompt + answer) + n * gc * (context + answer)
    return (rows if config.train.packing == "rows" else tree), rows


# ------------------------------------------------------------------------------------------------------------ memory


@dataclass(frozen=True)
class Plan:
    """What one rank's device holds while it trains and while it samples."""

    config: Config
    size: Size
    devices: Devices

    @property
    def width(self) -> int:
        """Bytes of a number in the forward and backward pass, and in the engine."""
        return 2 if self.config.model.dtype == "bfloat16" else 4

    def training(self) -> Memory:
        s, w = self.size, self.width
        tokens = min(self.config.train.pack_tokens, _tokens(self.config)[0])
        kept, whole = layer_activations(s, w)
        recomputed = whole
        if not self.config.model.activation_checkpointing:
            kept, recomputed = whole, 0.0
        return {
            **self._trainer(),
            "gradients (fp32, sharded)": 4 * s.parameters / self.devices.ranks,
            # FSDP2: all that is outside the layers during the whole pass, and two layers, one of them on its way.
            "gathered weights, their gradients": s.outside * 2 * w + 2 * s.layer * (2 * w + 4),
            f"activations of {s.layers} layers": s.layers * kept * tokens,
            # What a checkpointed one recomputes, and the gradients of the three products in its MLP.
            "the layer in its backward pass": (recomputed + 3 * w * s.mlp) * tokens,
            "loss: a chunk's logits, gradients": self._loss(tokens),
            "engine meanwhile": 0.0 if self._engine_sleeps else self._engine(),
            "reserve (assumed)": RESERVE[self.devices.kind],
        }

    def sampling(self) -> Memory:
        s, w = self.size, self.width
        return {
            **self._trainer(),
            "gathered for sync and probe": (s.outside + 2 * s.layer) * w,
            "engine": self._engine(),
            "keys, values, logits of generate": self._local_cache(),
            "reserve (assumed)": RESERVE[self.devices.kind],
        }

    def fits(self, memory: Memory) -> bool:
        return sum(memory.values()) <= self.devices.memory

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of all layers, on a device that has 1/tensor_parallel_size of the heads."""
        s = self.size
        return 2 * s.layers * -(-s.kv_heads // self._tensor_parallel) * s.head_dim * self.width

    @property
    def kv_cache(self) -> float:
        """Bytes of vLLM's KV cache on one device, after its weights and work."""
        v = self.config.rollout.vllm
        if self.devices.kind == "cpu":
            return v.cpu_kv_gib * 2**30
        return v.gpu_memory * self.devices.memory - self.engine_weights - ENGINE_WORK

    @property
    def engine_weights(self) -> float:
        return self.width * self.size.parameters / self._tensor_parallel

    def holds_a_sequence(self) -> bool:
        """What vLLM asks for at its start: room for one sequence of max_model_len."""
        return self.kv_cache >= self.config.max_model_len * self.kv_bytes_per_token

    @property
    def sequences(self) -> int:
        """Most sequences that one rank asks for at a time, in training or evaluation."""
        c, ranks = self.config, self.devices.ranks
        asked = [
            (c.rollout.prompts_per_step, c.rollout.samples_per_prompt),
            (c.anchors_per_step, c.samples_per_anchor),
            (held_out_problems(c), c.eval.samples),
        ]
        return max(-(-prompts // ranks) * n for prompts, n in asked)

    @property
    def _tensor_parallel(self) -> int:
        return int(self.config.rollout.vllm.args.get("tensor_parallel_size", 1))

    @property
    def _engine_sleeps(self) -> bool:
        return self.config.rollout.engine == "vllm" and self.devices.kind == "cuda"

    def _trainer(self) -> Memory:
        """What never leaves."""
        shard = self.size.parameters / self.devices.ranks
        return {
            "weights (fp32, sharded)": 4 * shard,
            "optimiser (AdamW, fp32, sharded)": 8 * shard,
            "reference (fp32, sharded)": 4 * shard if self.config.loss.beta else 0.0,
        }

    def _engine(self) -> float:
        """On this rank's device, while it is awake."""
        if self.config.rollout.engine == "vllm_server":
            return 0.0
        if self.config.rollout.engine == "local":
            return self.engine_weights
        if self.devices.kind == "cpu":
            return self.engine_weights + self.kv_cache
        return self.config.rollout.vllm.gpu_memory * self.devices.memory

    def _local_cache(self) -> float:
        """transformers' generate: a KV cache as long as its longest sequence, and logits in fp32, three times over."""
        if self.config.rollout.engine != "local":
            return 0.0
        sequences = min(self.config.rollout.batch_sequences, self.sequences)
        return sequences * (self.config.max_model_len * self.kv_bytes_per_token + 3 * 4 * self.size.vocab)

    def _loss(self, tokens: int) -> float:
        """Of as many targets. The head's gradient is summed in fp32, then cast; so is that of the hidden states."""
        s, w = self.size, self.width
        if self.devices.kind == "cuda":
            chunk = min(2**31, 4 * s.vocab * tokens)
        else:
            chunk = 3 * 4 * s.vocab * min(max(64, 2**23 // s.vocab), tokens)
        return chunk + (4 + w) * (s.vocab + tokens) * s.hidden


def layer_activations(s: Size, width: int) -> tuple[float, float]:
    """Bytes a token that a decoder layer keeps for its backward pass: (checkpointed, all of it).

    As transformers runs RMSNorm, GQA and SwiGLU. A norm keeps its input in fp32 and what it is normalised to; the next
    products keep their input, but a query's or key's goes on to the rotation, which keeps nothing. Attention keeps q,
    k, v, its output and LSE; the MLP gate, silu(gate), up and their product. A checkpoint is the layer's input, and
    attention's output and LSE.
    """
    q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
    lse = 4 * s.heads
    norms = (4 + 2 * width) * 2 * s.hidden + ((4 + width) * (q + kv) if s.query_norms else 0)
    return width * (s.hidden + q) + lse, norms + width * (2 * q + 2 * kv + 4 * s.mlp) + lse


def _memory(plan: Plan) -> Iterator[list[str]]:
    d = plan.devices
    kind = "GPU" if d.kind == "cuda" else "CPU"
    where = f"each of {d.ranks} ranks" if d.ranks > 1 else "the one rank"
    head = f"memory of {where}, {_bytes(d.memory)} of {kind} ({'this machine' if d.here else 'planned'})"
    loading = 4 * plan.size.parameters * d.ranks
    yield [
        f"{head}, estimated:",
        f"(to load, every rank holds the whole model in fp32: {_bytes(loading)} of the host)",
    ]
    yield _phase(plan, "while it trains", plan.training(), _to_train(plan))
    yield _phase(plan, "while it samples", plan.sampling(), _to_sample(plan))
    if plan.config.rollout.engine != "local":
        yield _engine(plan)


def _phase(plan: Plan, name: str, memory: Memory, change: str) -> list[str]:
    total = sum(memory.values())
    lines = [f"{name}:"] + [f"  {what:<36}{_bytes(size):>10}" for what, size in memory.items() if size]
    lines.append(f"  {'together':<36}{_bytes(total):>10}")
    if plan.fits(memory):
        return [*lines, f"  fits: {_bytes(plan.devices.memory - total)} to spare"]
    return [*lines, f"  DOES NOT FIT: {_bytes(total - plan.devices.memory)} too much; change: {change}"]


def _engine(plan: Plan) -> list[str]:
    """vLLM's share, and what its KV cache holds."""
    c, v, cache = plan.config, plan.config.rollout.vllm, max(0.0, plan.kv_cache)
    tokens, longest = int(cache / plan.kv_bytes_per_token), c.max_model_len
    server = c.rollout.engine == "vllm_server"
    asked = plan.sequences * (plan.devices.ranks if server else 1)
    lines = [
        "the vLLM server, on each of its own devices of that size:" if server else "vLLM, within its share:",
        f"  {'weights':<36}{_bytes(plan.engine_weights):>10}",
        f"  {'KV cache':<36}{_bytes(cache):>10}  of {plan.kv_bytes_per_token:,} bytes a token",
        f"  the cache holds {tokens:,} tokens, {tokens // longest} sequences of max_model_len={longest:,} that share "
        "nothing;",
        f"  {'all ranks ask' if server else 'a rank asks'} for up to {asked:,} sequences, rollout.vllm.max_sequences="
        f"{v.max_sequences} of them at a time",
    ]
    if not plan.holds_a_sequence():
        lines.append(f"  DOES NOT FIT: no sequence of max_model_len={longest:,}; change: {_to_sample(plan)}")
    return lines


# ---------------------------------------------------------------------------------------------------- what to change


def _to_train(plan: Plan) -> str:
    """The first changes, in the order of what they cost, with which training fits."""
    changes = ""
    smallest = plan
    for changes, smallest in _smaller(plan):
        if smallest.fits(smallest.training()):
            return changes
    also = f"{changes}, and " if changes else ""
    for ranks in (2**n for n in range(1, 12)):
        more = replace(smallest, devices=replace(plan.devices, ranks=ranks))
        if ranks > plan.devices.ranks and plan.devices.kind == "cuda" and more.fits(more.training()):
            return f"{also}{ranks} ranks (--world {ranks})"
    return f"{also}shorter answers (rollout.max_tokens, correction.max_prompt_tokens), devices with more memory"


def _smaller(plan: Plan) -> Iterator[tuple[str, Plan]]:
    """(settings, plan with them), each smaller than the one before."""
    config, changes = plan.config.model_copy(deep=True), []
    if not config.model.activation_checkpointing:
        config.model.activation_checkpointing = True
        changes.append("model.activation_checkpointing=true")
        yield ", ".join(changes), replace(plan, config=config)
    if config.model.dtype == "float32" and plan.devices.kind == "cuda":
        config.model.dtype = "bfloat16"
        changes.append("model.dtype=bfloat16")
        yield ", ".join(changes), replace(plan, config=config)
    prompt = max(config.data.max_prompt_tokens, config.correction.max_prompt_tokens if config.anchors_per_step else 0)
    longest = prompt + config.rollout.max_tokens
    for tokens in range((config.train.pack_tokens - 1) // 1024 * 1024, longest - 1, -1024):
        config.train.pack_tokens = tokens
        yield ", ".join([*changes, f"train.pack_tokens={tokens}"]), replace(plan, config=config)


def _to_sample(plan: Plan) -> str:
    """The nearest setting with which sampling fits and the KV cache holds a sequence."""
    shorter = "shorter sequences (rollout.max_tokens, eval.max_tokens, correction.max_prompt_tokens)"
    config = plan.config.model_copy(deep=True)
    trial = replace(plan, config=config)
    if config.rollout.engine == "local":
        while config.rollout.batch_sequences > 1:
            config.rollout.batch_sequences //= 2
            if trial.fits(trial.sampling()):
                return f"rollout.batch_sequences={config.rollout.batch_sequences}"
        return f"more ranks, {shorter}, or rollout.engine=vllm"
    if plan.devices.kind == "cpu":
        gib = config.max_model_len * plan.kv_bytes_per_token / 2**30
        return f"rollout.vllm.cpu_kv_gib at {gib:.2g} or above if that fits, or {shorter}"
    for share in sorted((n / 100 for n in range(5, 96)), key=lambda s: abs(s - config.rollout.vllm.gpu_memory)):
        config.rollout.vllm.gpu_memory = share
        if trial.holds_a_sequence() and trial.fits(trial.sampling()):
            return f"rollout.vllm.gpu_memory={share:g}"
    return f"more ranks, {shorter}, or rollout.engine=vllm_server on devices of its own"


# -------------------------------------------------------------------------------------------------------------- time


def _time(plan: Plan, shape: PretrainedConfig) -> list[str]:
    config, ranks = plan.config, plan.devices.ranks
    cost = cost_model(shape, plan.size.parameters)
    tokens, _ = _tokens(config)
    b, n = config.rollout.prompts_per_step, config.anchors_per_step
    targets = (b * config.rollout.samples_per_prompt + n * config.samples_per_anchor) * config.rollout.max_tokens
    learn = tokens * cost.per_token + targets * cost.per_target
    generate = targets * (cost.per_token + cost.per_target) / 3  # forward alone
    if plan.devices.here:
        rate, source = _matmul_rate(getattr(torch, config.model.dtype)), "of a large matrix product, measured here"
    else:
        rate, source = device_rates().linear * 1e12, f"({device_rates().source.split(':')[0]})"
    return [
        f"one step at the {rate / 1e9:,.0f} GFLOP/s {source}, times {ranks}",
        "(a lower bound for answers that long; attention pairs are not counted):",
        f"  generate {generate / rate / ranks:,.2f} s, learn {learn / rate / ranks:,.2f} s",
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


def _bytes(n: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if n < 1000:
            return f"{n:,.1f} {unit}"
        n /= 1000
    return f"{n:,.1f} TB"
