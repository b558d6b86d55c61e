"""Every setting, with its default, range and source; nothing else defines a default.

Sources: [paper] arXiv 2605.14539 as published in summary, [f2f] the form Fail2Fix-RL uses, [ours] our decision,
or the work named. Three layers are merged, later ones win: YAML files in the order given, then `key.path=value`.
How a text becomes a value: settings.py.
When `model.path` is `embedded` (the default), `configs/embedded.yaml` lies under all of them.
"""

from __future__ import annotations

import datetime
import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from cipo_fast.errors import UserError, note
from cipo_fast.settings import (
    FUNCTION,
    FilePath,
    NameOrFunction,
    NameOrPath,
    Place,
    Sources,
    cut,
    expand,
    for_system,
    from_argument,
    from_file,
    from_system,
    to_yaml,
)

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0)]

HUB_NAME = re.compile(r"hub:([\w.-]+/[\w.-]+)(?::([^:/]*))?(?::([^:/]+))?")
OVERRIDE = re.compile(r"[A-Za-z_][\w-]*(\.[\w-]+)*=")


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


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
    warm_accuracy: Share = 0.42
    """Supervised steps stop at the first check with this greedy accuracy on training problems."""
    warm_steps: NonNegative = 600
    """... or after this many, whichever comes first."""
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
    """Back-end of the tree attention; auto: the fastest measured on this GPU (device_rates.json), torch elsewhere."""
    loss: Literal["logits", "exp"] = "logits"
    """Kernel of the fused loss on a GPU, V0 or V1 of kernels/README.md; V0 wherever V1 does not apply."""
    activation_checkpointing: bool = False
    """Recompute each layer but its attention in the backward pass, instead of keeping its activations."""
    embedded: EmbeddedModel = EmbeddedModel()
    """Shape and warm start of the embedded model."""


def _day(value: Any) -> Any:
    """A text as the day that it is, YYYY-MM-DD alone: pydantic takes seconds since 1970 and more."""
    if value is None or type(value) is datetime.date:
        return value
    if not re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", str(value)):
        raise PydanticCustomError("day", "expected a day as YYYY-MM-DD")
    try:
        return datetime.date.fromisoformat(str(value))
    except ValueError:
        raise PydanticCustomError("day", "there is no such day") from None


Format = Literal[
    "own", "qa", "aime", "amc23", "math500", "math", "minerva", "olympiadbench", "gsm8k", "dapo", "humaneval", "mbpp",
    "livecodebench", "criticbench", "debugbench",
]  # fmt: skip


class DataConfig(Section):
    task: Literal["sort", "add"] = "sort"
    """Embedded task, used when `data.train` is not given."""
    train: Sources = None
    """JSON Lines or Parquet files, `hub:OWNER/NAME[:CONFIG[:SPLIT]]`, one or a list: `prompt` or `messages`, and
    `answer` or tests; TRL's or verl's form; or a public data set's own."""
    eval: Sources = None
    """Held-out problems, the same. Without it `eval.problems` (a tenth at most) are held out of `data.train`."""
    weights: list[Annotated[float, Field(gt=0, le=1000)]] | None = None
    """How often an epoch has each row of each source of `data.train`: 2 is twice, 0.5 another half each time; None: 1
    each [ours]."""
    format: Format | None = None
    """Whose form the rows have; None: told from their fields, row by row."""
    verifier: NameOrFunction | None = None
    """exact, math, code, or `path/to/file.py:function` (a function of response and row); None: what a row names, else
    what its form implies, else exact [ours]."""
    math: dict[str, Any] = {}
    """What math answers may look like, over the form's own defaults and under a row's `policy`: docs/verifiers.md."""
    instruction: Annotated[str, Field(min_length=1)] = "auto"
    """Ends the last turn of a prompt; auto: asks for a box (math) or one program (code) where the prompt does not yet;
    none: nothing [ours]."""
    max_prompt_tokens: Positive = 2048
    """Longer prompts are dropped and counted."""
    system_prompt: str | None = None
    """System turn before every problem that has none of its own, in training and evaluation [ours]."""
    chat_template_kwargs: dict[str, Any] = {}
    """Arguments of the chat template, such as {enable_thinking: false}, in every prompt [transformers, vLLM]."""
    date: Annotated[datetime.date | None, BeforeValidator(_day)] = None
    """Today to a chat template that prints it, YYYY-MM-DD; None: the day the run starts, kept on resuming [ours]."""

    def sources(self, of: Literal["train", "eval"]) -> list[Path | str]:
        """The files and hub data sets of `data.train` or `data.eval`, [] where it is not given."""
        given = self.train if of == "train" else self.eval
        return given if isinstance(given, list) else [] if given is None else [given]


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
    args: dict[str, Any] = {}
    """More of vLLM's engine arguments by their Python names, such as {data_parallel_size: 4} for a server [vLLM]."""


class ServerConfig(Section):
    """For `rollout.engine=vllm_server`: one that runs (`url`), or one that the trainer starts and looks after."""

    start: bool = False
    """Start `vllm serve` on this node, restart it when it dies, end it with the run [ours]."""
    url: str | None = None
    """... or the address of one, such as http://node7:8100, started as README.md says; its key is the environment's
    VLLM_API_KEY [ours]."""
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


class VerifyConfig(Section):
    """How answers are judged: in worker processes that can be killed, beside generation."""

    workers: Positive | None = None
    """Answers judged at once on this node; None: as many as it has cores. More start while some are slow [ours]."""
    timeout_s: Annotated[float, Field(gt=0)] = 10.0
    """Longest time for one answer from when a worker gets it, in seconds. On a busy machine it is time of the worker's
    own: running or asleep, not waiting for a processor. Code has the sandbox's own limits [ours]."""
    memory_mib: Annotated[int, Field(ge=256)] = 4096
    """Address space of a worker [ours]."""
    max_failed: Share = 0.01
    """Largest share of a step's answers that nobody could judge (a worker lost, a verifier's own error); they are left
    out. Above it the run stops, its state saved [ours]."""


class SandboxConfig(Section):
    """Where programs of the policy run. Limits are for one execution (one input, one call or one suite)."""

    tier: Literal["auto", "bubblewrap", "sandlock"] = "auto"
    """Who isolates: bubblewrap (namespaces), else sandlock (Landlock and seccomp); auto: the first to work [ours]."""
    unsafe_local: bool = False
    """Run programs as plain processes where neither works: they can read and write all that you can [ours]."""
    cpu_s: Annotated[float, Field(gt=0)] = 5.0
    """CPU time of one execution, in seconds [ours]."""
    wall_s: Annotated[float, Field(gt=0)] | None = None
    """Its time by the clock; None: three times cpu_s [ours]."""
    answer_s: Annotated[float, Field(gt=0)] = 60.0
    """Time by the clock for all executions of one answer together [ours]."""
    memory_mib: Annotated[int, Field(ge=64)] = 1024
    """Memory of an execution [ours]."""
    processes: Positive = 8
    """Processes and threads of an execution [ours]."""
    file_mib: Positive = 8
    """Largest file, and all files together, in MiB [ours]."""
    output_kib: Positive = 64
    """Longest output of an execution, in KiB [ours]."""


class CorrectionConfig(Section):
    lambda_corr: Weight = 1.0
    """Weight of the correction stream [f2f]. 0 is GRPO: no correction is sampled."""
    anchors_per_prompt: Annotated[float, Field(gt=0)] = 1.0
    """phi: a step has round(phi * B) anchors [f2f]."""
    max_anchors_per_prompt: Positive = 2
    """Most anchors from one prompt [f2f]."""
    samples_per_anchor: Annotated[int, Field(ge=2)] | None = None
    """Gc; None means G [f2f]."""
    preference: Literal["tier", "soft", "uniform"] = "tier"
    """Which prompts give anchors first: medium pass rate [f2f], weight (p(1-p)+0.01)^kappa [ours], or any (control)."""
    tier_low: Share = 3 / 8
    """Lower pass rate of the preferred tier [f2f]."""
    tier_high: Share = 6 / 8
    """Upper pass rate of the preferred tier [f2f]."""
    kappa: Weight = 1.0
    """Exponent of preference=soft [ours]."""
    lambda_risk: Weight = 1.0
    """Penalty for turning a right attempt into a wrong answer [paper; value f2f]."""
    risk_norm: Literal["literal", "raw_std", "pooled"] = "raw_std"
    """How shaped rewards become advantages: [f2f] (the penalty cancels out: a control), [ours], [ours]."""
    loss: Literal["rl", "ce", "both"] = "rl"
    """Correction objective: the RLVR loss [paper], cross-entropy on verified corrections, or rl + mu * ce [ours]."""
    mu: Weight = 0.1
    """Weight of the cross-entropy in loss=both [ours]."""
    max_ce_per_anchor: Positive = 2
    """Verified corrections an anchor that the cross-entropy uses [ours]."""
    context: Literal["anchor", "bare"] = "anchor"
    """What a cross-entropy target is conditioned on: the correction prompt, or the bare prompt [ours]."""
    layout: Literal["followup", "quoted"] = "followup"
    """The conversation goes on after the attempt, token for token [ours], or one turn quotes it [f2f]."""
    verdict: Literal["hidden", "shown"] = "hidden"
    """`shown` tells the policy whether its attempt was right: a control, keeping it is then trivial [f2f, ours]."""
    followup: Annotated[str, Field(min_length=1)] = (
        "Check the answer above. It may or may not be right. Think again, then give your final answer."
    )
    """The user turn after the attempt; in layout=quoted it follows the quotation [ours]."""
    max_prompt_tokens: Positive = 8192
    """An anchor whose correction prompt is longer is dropped and counted, never cut [ours]."""


class ReplayConfig(Section):
    """The controller of rho, the share of right anchors [paper; formulas and values f2f, smoothing ours]."""

    adaptive: bool = True
    """False keeps rho at rho0 (a control) [paper]."""
    rho0: Share = 0.3
    """rho at the start [f2f]."""
    rho_min: Share = 0.2
    """Smallest rho [f2f]."""
    rho_max: Share = 0.8
    """Largest rho [f2f]."""
    tau: Share = 0.8
    """Retention aimed at [f2f]."""
    w1: Weight = 0.8
    """Weight of tau - retention [f2f]."""
    w2: Weight = 0.3
    """Weight of the drop in retention since the last step [f2f]."""
    w3: Weight = 0.05
    """Weight of the steps in a row below tau, counted to 3 [f2f]."""
    n_min: Positive = 16
    """Fewest corrections of right anchors that move rho [ours]; 1 is the f2f form."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.7
    """Smoothing of retention [ours]; 0 is the f2f form."""


class LossConfig(Section):
    eps_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Lower clip of the ratio [DAPO]."""
    eps_high: Annotated[float, Field(gt=0)] = 0.28
    """Upper clip of the ratio [DAPO]."""
    beta: Weight = 0.0
    """Weight of KL_k3(pi || pi_ref) [DAPO: 0; f2f: 1e-4]. Above 0 a frozen copy of the first policy is held."""
    entropy_coef: Weight = 0.0
    """Weight of the entropy bonus [ours]."""
    is_cap: Annotated[float, Field(gt=0)] | None = 2.0
    """Cap of the importance weight exp(old_logp - sampler_logp) between trainer and engine [ours]; null for none."""
    is_level: Literal["token", "sequence"] = "token"
    """That weight a token, or one a sequence, the product of its tokens': unbiased, an old_logp pass dearer [ours]."""
    ratio: Literal["token", "sequence"] = "token"
    """Importance ratio a token, or one a sequence [GSPO]."""
    normalize: Literal["tokens", "sequences"] = "tokens"
    """A stream's Z: all its tokens [DAPO], or its sequences, then each one's tokens [GRPO]."""
    scale_advantages: bool = True
    """Divide advantages by the group's standard deviation [GRPO]; False is [Dr.GRPO]."""
    advantage_eps: Annotated[float, Field(gt=0)] = 1e-6
    """eps of the standard deviation [ours]."""


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
    samples: Annotated[int, Field(ge=2)] = 8
    """Answers a problem at T=1, for accuracy and pass@k [k = this]."""
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
    tensorboard: bool = True
    """Write TensorBoard scalars too."""
    save_rollouts_every: NonNegative = 1
    """Write rollouts and corrections as JSONL every so many steps; 0 never."""
    rank_timeout_s: Annotated[float, Field(gt=0)] = 1800.0
    """Longest wait of a rank for another one, whose rollouts may be longer, in seconds [torch]."""
    alarm_after: Positive = 10
    """Steps in a row in which nothing is learned (no reward varies, every answer is cut off...) that raise an alarm,
    and how often it is said again [ours]."""


class Config(Section):
    seed: NonNegative = 0
    """Every random choice is a function of this seed, the step and its purpose."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    rollout: RolloutConfig = RolloutConfig()
    sync: SyncConfig = SyncConfig()
    verify: VerifyConfig = VerifyConfig()
    sandbox: SandboxConfig = SandboxConfig()
    correction: CorrectionConfig = CorrectionConfig()
    replay: ReplayConfig = ReplayConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    run: RunConfig = RunConfig()

    @property
    def run_dir(self) -> Path:
        return self.run.dir or Path("runs") / self.run.name

    @property
    def anchors_per_step(self) -> int:
        """N = round(phi * B); 0 when the correction stream is off."""
        if self.correction.lambda_corr == 0:
            return 0
        return round(self.correction.anchors_per_prompt * self.rollout.prompts_per_step)

    @property
    def max_model_len(self) -> int:
        """Longest prompt and answer together that the engine must hold, in tokens."""
        if self.rollout.vllm.max_model_len is not None:
            return self.rollout.vllm.max_model_len
        correction = self.correction.max_prompt_tokens if self.anchors_per_step else 0
        prompt = max(self.data.max_prompt_tokens, correction)
        return prompt + max(self.rollout.max_tokens, self.eval.max_tokens)

    @property
    def held_out(self) -> int:
        """Most problems held out where no `data.eval` holds them."""
        return self.eval.problems or 400

    @property
    def samples_per_anchor(self) -> int:
        return self.correction.samples_per_anchor or self.rollout.samples_per_prompt

    def to_yaml(self) -> str:
        """What starts the same run again, from any folder."""
        return to_yaml(self.model_dump(mode="json"))


# ------------------------------------------------------------------------------------------------- loading


def configs_dir() -> Path:
    """The recipes: beside the package in a checkout, inside it in an installed wheel."""
    here = Path(__file__).parent
    inside = here / "configs"
    return inside if inside.is_dir() else here.parent / "configs"


def parse_args(args: Sequence[str]) -> Config:
    """The Config of a command line: YAML files and `key.path=value`, in any order, the last one wins; raises UserError.

    What begins with a dotted key and `=` is a setting, so `./lr=1/config.yaml` is a file."""
    typed = [from_system(arg, f"argument {arg!r}") for arg in args]
    files: list[str] = []
    overrides: list[str] = []
    for arg in typed:
        if arg.startswith("-"):
            raise UserError(f"unknown option {arg}: expected .yaml files, key.path=value, --dry-run")
        (files if arg.endswith((".yaml", ".yml")) and not OVERRIDE.match(arg) else overrides).append(arg)
    return load_config(files, overrides)


def load_config(files: list[str], overrides: list[str]) -> Config:
    """Merge YAML `files` and `key.path=value` `overrides` into a checked Config; raises UserError."""
    given: dict[str, Any] = {}
    places: Place = {}  # where a key was given: only a file's have one, an override names itself
    for name in files:
        values, found = from_file(_find_file(name), Config)
        _merge(given, values)
        places |= found
    for text in overrides:
        if not OVERRIDE.match(text):
            raise UserError(
                f"argument {text!r}: expected key.path=value, a .yaml file or --dry-run{_recipe_hint(text)}"
            )
        _merge(given, from_argument(text, Config))
        places.pop(text.partition("=")[0], None)
    merged: dict[str, Any] = {}
    model = given.get("model")
    if not isinstance(model, dict) or model.get("path", "embedded") == "embedded":
        merged, _ = from_file(configs_dir() / "embedded.yaml", Config)
    _merge(merged, given)
    try:
        config = Config.model_validate(merged)
    except ValidationError as error:
        raise UserError(_explain(error, places)) from None
    _check(config)
    return config


def read_config(path: Path) -> Config:
    """The Config that a run has recorded in `path`; raises UserError. What it names need not be there any more."""
    values, places = from_file(path, Config)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UserError(_explain(error, places)) from None


def _check(config: Config) -> None:
    """What one field's range cannot say."""
    c, r = config.correction, config.replay
    if c.tier_low > c.tier_high:
        raise UserError(f"correction.tier_low={c.tier_low:g} is above correction.tier_high={c.tier_high:g}")
    if not r.rho_min <= r.rho0 <= r.rho_max and r.adaptive:
        raise UserError(
            f"replay.rho0={r.rho0:g} is outside [replay.rho_min, replay.rho_max]=[{r.rho_min:g}, {r.rho_max:g}]"
        )
    if config.train.updates_per_step > config.rollout.prompts_per_step:
        raise UserError("train.updates_per_step is above rollout.prompts_per_step: an update needs a prompt at least")
    if config.correction.lambda_corr > 0 and config.anchors_per_step == 0:
        raise UserError(
            "correction.anchors_per_prompt gives no anchor a step: raise it, or set correction.lambda_corr=0"
        )
    longest = (
        max(config.data.max_prompt_tokens, c.max_prompt_tokens if c.lambda_corr > 0 else 0) + config.rollout.max_tokens
    )
    if longest > config.train.pack_tokens:
        raise UserError(
            f"train.pack_tokens={config.train.pack_tokens} cannot hold one conversation: the longest prompt plus "
            f"rollout.max_tokens is {longest} tokens"
        )
    _check_engine(config)
    e = config.model.embedded
    if e.hidden % (2 * e.heads) or e.heads % e.kv_heads:
        raise UserError("model.embedded: hidden must be a multiple of 2*heads, and heads of kv_heads")
    _check_data(config.data)
    if is_file(config.run_dir):
        raise UserError(f"run.dir={config.run_dir} is a file; name a folder")


def _check_data(data: DataConfig) -> None:
    for key in ("train", "eval"):
        for source in data.sources(key):
            if isinstance(source, Path) and not is_file(source):
                raise UserError(f"data.{key}: no file {source}")
            if isinstance(source, str) and not HUB_NAME.fullmatch(source):
                raise UserError(
                    f"data.{key}={source}: expected hub:OWNER/NAME, hub:OWNER/NAME:CONFIG or ...:CONFIG:SPLIT"
                )
    if data.weights is not None and len(data.weights) != len(data.sources("train")):
        raise UserError(f"data.weights has {len(data.weights)} weights for {len(data.sources('train'))} of data.train")
    function = FUNCTION.fullmatch(data.verifier or "exact")
    if function is None and data.verifier not in (None, "exact", "math", "code"):
        raise UserError(f"data.verifier={data.verifier}: expected exact, math, code or path/to/file.py:function")
    if function is not None and not is_file(Path(function["file"])):
        raise UserError(f"data.verifier={data.verifier}: no file {function['file']}")


def _check_engine(config: Config) -> None:
    r = config.rollout
    if r.engine == "vllm_server" and r.server.start == (r.server.url is not None):
        raise UserError("rollout.engine=vllm_server: give rollout.server.start=true or rollout.server.url, one of them")
    if r.server.url is not None and not _is_address(r.server.url):
        raise UserError(f"rollout.server.url={r.server.url}: expected http://host:port")
    parallel = [k for k in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size") if k in r.vllm.args]
    if r.engine == "vllm" and parallel:
        raise UserError(f"rollout.vllm.args.{parallel[0]}: an engine in this process has one device; use a server")
    if r.overlap and r.engine != "vllm_server":
        raise UserError("rollout.overlap=1 needs rollout.engine=vllm_server: only a server samples while this trains")
    if r.overlap and config.loss.is_cap is None:
        raise UserError("rollout.overlap=1 needs loss.is_cap: its rollouts are one policy version old")
    most = max(r.samples_per_prompt, config.samples_per_anchor, config.eval.samples)
    if r.engine == "vllm_server" and most > r.vllm.max_sequences:  # vLLM's server refuses such a request
        raise UserError(
            f"rollout.vllm.max_sequences={r.vllm.max_sequences} is below the {most} answers asked of one prompt"
        )
    if r.vllm.max_model_len is not None and r.vllm.max_model_len <= r.max_tokens:
        raise UserError(
            f"rollout.vllm.max_model_len={r.vllm.max_model_len} leaves no token for a prompt: rollout.max_tokens is "
            f"{r.max_tokens}"
        )


def _is_address(url: str) -> bool:
    """Whether a server can be there at all: a host, and a port that is one."""
    try:
        parts = urlsplit(url)
        named = bool(parts.hostname) and parts.port != 0 and not re.search(r"\s", url)
        return named and parts.scheme in ("http", "https")
    except ValueError:
        return False


def _find_file(name: str) -> Path:
    """A path is that path. A name alone is a file of this folder, or else a recipe."""
    expanded = expand(name, f"config file {name}")
    path = Path(for_system(expanded, f"config file {name}"))
    recipe = configs_dir() / path.name
    if is_file(path):
        if "/" not in expanded and is_file(recipe):
            note(f"{name}: the file in this folder, not the recipe of that name")
        return path
    if "/" not in expanded and is_file(recipe):
        return recipe
    hint = f"; the recipe is {path.name}, without a folder" if is_file(recipe) else f" (nor in {configs_dir()})"
    raise UserError(f"config file {name}: not found{hint}")


def _recipe_hint(text: str) -> str:
    return f"; the recipe is {text}.yaml" if text and is_file(configs_dir() / f"{text}.yaml") else ""


def is_file(path: Path) -> bool:
    """False also where the system will not say: a name too long, a folder that may not be entered."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _merge(into: dict[str, Any], new: dict[str, Any]) -> None:
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def known_keys(section: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Every key as a dotted path, sections included."""
    keys = []
    for name, info in section.model_fields.items():
        keys.append(prefix + name)
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            keys += known_keys(info.annotation, f"{prefix}{name}.")
    return keys


def _explain(error: ValidationError, places: Place) -> str:
    """The first problem, in one line."""
    first = error.errors()[0]
    key = _field_of(first["loc"])
    known = next((k for k in (key, key.rpartition(".")[0]) if k in places), None)
    where = f"{places[known]}: " if known else ""
    if first["type"] == "extra_forbidden":
        near = _nearest(key)
        return f"{where}unknown key {key!r}" + (f": did you mean {near!r}?" if near else "")
    same = [e for e in error.errors() if _field_of(e["loc"]) == key]  # one for each type that the field may have
    said = " or ".join(f"{e['msg'][0].lower()}{e['msg'][1:]}".removeprefix("input should be ") for e in same)
    said = f"input should be {said}" if len(same) > 1 else f"{first['msg'][0].lower()}{first['msg'][1:]}"
    more = f" (and {error.error_count() - len(same)} more)" if error.error_count() > len(same) else ""
    return f"{where}{key}={_typed(first['input'])}: {said}{more}"


def _field_of(location: tuple[int | str, ...]) -> str:
    """The dotted key of an error's location, which goes on with the types that a field may have."""
    keys, parts = known_keys(), [str(part) for part in location]
    for n in range(1, len(parts)):
        key = ".".join(parts[:n])
        if key in keys and not any(other.startswith(f"{key}.") for other in keys):
            return key
    return ".".join(parts)


def _typed(value: Any) -> str:
    """A number as it was typed, anything else quoted; the beginning of what is long."""
    if isinstance(value, str) and re.fullmatch(r"[-+.\w]*\d[-+.\w]*", value):
        return cut(value)
    return cut(repr(value))


def _nearest(key: str) -> str | None:
    """The known key most like `key`: by its whole path, else by its last part in any section."""
    keys = known_keys()
    close = difflib.get_close_matches(key, keys, n=1, cutoff=0.75)
    if close:
        return close[0]
    last = {k.rsplit(".", 1)[-1]: k for k in keys}
    close = difflib.get_close_matches(key.rsplit(".", 1)[-1], list(last), n=1, cutoff=0.6)
    return last[close[0]] if close else None
