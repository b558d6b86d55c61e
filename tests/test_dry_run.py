"""--dry-run: its arithmetic, what it says of the recipes, and that what it says to change helps."""

import gc
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel, Qwen3Config

from cipo_fast import dry_run as planner
from cipo_fast.cipo.objective import conversations
from cipo_fast.config import configs_dir, load_config
from cipo_fast.dry_run import Devices, Plan, layer_activations, size_of
from cipo_fast.embedded.model import embedded_config
from cipo_fast.errors import UserError
from cipo_fast.packing import Pack, build_trees, make_pack, row_tokens
from cipo_fast.policy import ATTENTION, recompute_all_but_attention
from cipo_fast.records import Conversation, Group, Problem, Rollout, Segment


def dry_run(args: list[str]) -> str:
    return planner.dry_run(args, embedded_config)


NODE = ["--dry-run", "--world", "8", "--device-memory", "80"]
# As published with the models.
QWEN3_4B = Qwen3Config(
    vocab_size=151936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128, max_position_embeddings=40960, tie_word_embeddings=True,
)  # fmt: skip
SEED_CODER_8B = LlamaConfig(
    vocab_size=155136, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, max_position_embeddings=32768, tie_word_embeddings=False,
)  # fmt: skip
RECIPES = {"qwen3_4b_math.yaml": QWEN3_4B, "seed_coder_8b_code.yaml": SEED_CODER_8B}


@pytest.fixture
def qwen(tmp_path: Path) -> str:
    return folder_of(QWEN3_4B, tmp_path)


def folder_of(shape: PretrainedConfig, folder: Path) -> str:
    """A local folder with a config.json, as an override: what a hub name stands for, without the hub."""
    shape.save_pretrained(folder)
    return f"model.path={folder}"


def gigabytes(printed: str, what: str) -> list[float]:
    """Every figure of a line `what`, in the order printed."""
    units = {"B": 1e-9, "KB": 1e-6, "MB": 1e-3, "GB": 1.0, "TB": 1e3}
    return [float(n) * units[unit] for n, unit in re.findall(rf"#   {re.escape(what)} +([\d.]+) (\w+)", printed)]


# ----------------------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipes_fit_eight_gpus_of_80_gb(name: str, tmp_path: Path) -> None:
    printed = dry_run([name, folder_of(RECIPES[name], tmp_path), *NODE])
    assert printed.count("#   fits: ") == 2
    assert "DOES NOT FIT" not in printed
    assert "memory of each of 8 ranks, 80.0 GB of GPU (planned)" in printed
    assert "data.train is not given" in printed
    assert "(assumed, of an H100), times 8" in printed


def test_figures_of_qwen3_4b(qwen: str) -> None:
    """By hand: 4.022e9 parameters; 2 x 36 layers x 8 heads x 128 x 2 bytes a token of KV cache."""
    printed = dry_run(["qwen3_4b_math.yaml", qwen, *NODE])
    assert "# only the model's config is read here" in printed  # the folder has no weights at all
    assert gigabytes(printed, "weights (fp32, sharded)") == [2.0, 2.0]  # 4 x 4.022 / 8, while it trains and samples
    assert gigabytes(printed, "optimiser (AdamW, fp32, sharded)") == [4.0, 4.0]
    assert gigabytes(printed, "gradients (fp32, sharded)") == [2.0]
    # 40,960 tokens x 36 layers x (2 x (2,560 + 4,096) + 4 x 32) bytes
    assert gigabytes(printed, "activations of 36 layers") == [19.8]
    assert gigabytes(printed, "engine") == [48.0]  # 0.6 of 80, while it samples only: then it is awake
    assert gigabytes(printed, "engine meanwhile") == []
    assert gigabytes(printed, "weights") == [8.0]
    assert gigabytes(printed, "KV cache") == [37.0]  # 48 - 8.04 - 3
    assert "of 147,456 bytes a token" in printed
    assert "holds 250,617 tokens, 15 sequences of max_model_len=16,384" in printed  # 36.955e9 / 147,456
    assert "a rank asks for up to 400 sequences" in printed  # evaluation: 400 / 8 problems x 8 answers


def test_the_comments_in_the_recipes_are_what_the_dry_run_says(tmp_path: Path) -> None:
    for name, shape, kept, cache in [
        ("qwen3_4b_math.yaml", QWEN3_4B, "251 GB of activations, with it 20 GB", "37 GB KV cache"),
        ("seed_coder_8b_code.yaml", SEED_CODER_8B, "211 GB of activations, with it 17 GB", "28.5 GB KV cache"),
    ]:
        text = (configs_dir() / name).read_text()
        printed = dry_run([name, folder_of(shape, tmp_path), *NODE])
        whole = dry_run([name, folder_of(shape, tmp_path), "model.activation_checkpointing=false", *NODE])
        activations = [gigabytes(p, f"activations of {shape.num_hidden_layers} layers")[0] for p in (whole, printed)]
        assert kept in text
        assert kept == "{:.0f} GB of activations, with it {:.0f} GB".format(*activations)
        assert cache in text
        assert float(cache.split()[0]) == gigabytes(printed, "KV cache")[0]


# ------------------------------------------------------------------------------------------------------ what to change


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.activation_checkpointing=false"],
        ["model.activation_checkpointing=false", "model.dtype=float32", "train.pack_tokens=65536"],
        ["train.pack_tokens=131072"],
        ["rollout.vllm.gpu_memory=0.95"],
        ["rollout.vllm.gpu_memory=0.15"],  # no room for one sequence
        ["rollout.vllm.max_model_len=50000"],  # above the model's positions
        ["rollout.engine=local", "rollout.batch_sequences=4096"],
    ],
)
def test_what_it_says_to_change_makes_it_fit(overrides: list[str], qwen: str) -> None:
    printed = dry_run(["qwen3_4b_math.yaml", qwen, *overrides, *NODE])
    assert "DOES NOT FIT" in printed
    changes = [text for line in re.findall(r"DOES NOT FIT: .* change: (.*)", printed) for text in line.split(", ")]
    settings = [text for text in changes if re.fullmatch(r"[\w.]+=\S+", text)]
    assert settings
    assert "DOES NOT FIT" not in dry_run(["qwen3_4b_math.yaml", qwen, *overrides, *settings, *NODE])


@pytest.mark.parametrize("engine", ["local", "vllm", "vllm_server"])
def test_lengths_are_what_a_run_would_say_for_every_engine(engine: str, tmp_path: Path) -> None:
    overrides = [f"rollout.engine={engine}", *(["rollout.server.start=true"] if engine == "vllm_server" else [])]

    def printed(*more: str, **changes: object) -> str:
        folder = tmp_path / "-".join(map(str, changes.values()))
        shape = Qwen3Config(**{**QWEN3_4B.to_dict(), "layer_types": None, **changes})
        return dry_run(["qwen3_4b_math.yaml", folder_of(shape, folder), *overrides, *more, *NODE])

    assert "positions" not in printed(max_position_embeddings=16384)  # 8,192 and 8,192: just so
    cut = printed(max_position_embeddings=16383)
    assert "# the model has 16383 positions (max_position_embeddings): prompts of more than" in cut
    assert "DOES NOT FIT: the model has 8192 positions" in printed(max_position_embeddings=8192)
    window = {"use_sliding_window": True, "max_window_layers": 0}
    assert "DOES NOT FIT" in printed(sliding_window=16383, **window)
    assert "(sliding_window=16383), and this run's longest sequence has 16384" in printed(
        sliding_window=16383, **window
    )
    assert "sliding" not in printed(sliding_window=16384, **window).split("# ", 1)[1]


def test_a_start_and_a_rho_that_cannot_be_measured_are_said() -> None:
    start, held = "first 20 steps learn from verified corrections alone, without RL", "rho stays at replay.rho_min"
    plain = planner.dry_run([], embedded_config)
    assert start not in plain
    assert held not in plain
    assert start in planner.dry_run(["correction_start.yaml"], embedded_config)
    low = planner.dry_run(["replay.rho_min=0.04"], embedded_config)
    assert f"{held} once it is there: 8 corrections of right anchors a step are below replay.n_min=16" in low
    for off in ("replay.adaptive=false", "correction.lambda_corr=0"):
        assert held not in planner.dry_run(["replay.rho_min=0.04", off], embedded_config)


def test_tokens_of_hinted_rollouts_are_those_of_the_longest_batch() -> None:
    """Two rollouts, each after a hint of its own and after the bare prompt; the prompts have no beginning in common."""
    sizes = ["rollout.prompts_per_step=1", "rollout.samples_per_prompt=2", "correction.lambda_corr=0"]
    config = load_config(["nudge.yaml"], sizes)
    longest, asked = config.data.max_prompt_tokens, Problem("p", ({"role": "user", "content": "?"},), "", "test")
    answer = [9] * config.rollout.max_tokens
    rollouts = [
        Rollout(asked, [hint + 1] * longest, answer, [-1.0] * len(answer), "", float(hint), False, 0, hint=hint)
        for hint in (0, 1)
    ]
    found = conversations([Group(asked, [0] * longest, rollouts)], [], config, 1)
    tree, rows = sum(tree.num_tokens for tree in build_trees(found)), row_tokens(found)
    printed = planner.dry_run(["nudge.yaml", *sizes], embedded_config)
    assert f"at most {tree:,} tokens forwarded a step ({rows:,} as one row a conversation)" in printed


def test_more_ranks_where_no_setting_helps(tmp_path: Path) -> None:
    seed = folder_of(SEED_CODER_8B, tmp_path)
    printed = dry_run(["seed_coder_8b_code.yaml", seed, "--world", "1", "--device-memory", "80", "--dry-run"])
    [change] = re.findall(r"while it trains.*?change: ([^\n]*)", printed, re.DOTALL)
    settings, ranks = re.fullmatch(r"(train\.pack_tokens=\d+), and (\d+) ranks \(--world \2\)", change).groups()
    args = ["seed_coder_8b_code.yaml", seed, settings, "--device-memory", "80", "--dry-run", "--world"]
    enough, too_few = dry_run([*args, ranks]), dry_run([*args, str(int(ranks) // 2)])
    assert "DOES NOT FIT" not in enough.split("while it samples")[0]
    assert "DOES NOT FIT" in too_few.split("while it samples")[0]


# --------------------------------------------------------------------------------------------------------- arithmetic


def toy(kind: type[PretrainedConfig], layers: int) -> PretrainedConfig:
    return kind(
        vocab_size=300, hidden_size=64, intermediate_size=160, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=512,
    )  # fmt: skip


def pack_of(tokens: int) -> Pack:
    prompt, answer = Segment([1] * 10), [2] * ((tokens - 10) // 2)
    answers = [Conversation((prompt, Segment(answer)), None, "rollout", 1.0, 0.1, 0.0) for _ in range(2)]
    return make_pack(build_trees(answers))


def forward(model: PreTrainedModel, pack: Pack) -> torch.Tensor:
    layout = pack.layout
    return model.base_model(
        input_ids=pack.input_ids[None], position_ids=layout.position_ids[None], tree=layout, tree_impl="flash",
        use_cache=False,
    ).last_hidden_state  # fmt: skip


def saved_by_autograd(model: PreTrainedModel, pack: Pack) -> int:
    """Bytes of the tensors that a forward pass saves, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, torch.Tensor] = {}

    def save(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in own:
            found[x.untyped_storage().data_ptr()] = x  # and it lives on, or its address would be used again
        return x

    with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
        forward(model, pack)
    return sum(x.untyped_storage().nbytes() for x in found.values())


def kept_by_checkpoints(model: PreTrainedModel, pack: Pack) -> int:
    """Bytes of the tensors that are there after a checkpointed forward pass and were not before."""
    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": recompute_all_but_attention})
    before = storages()
    _hidden = forward(model, pack)
    return sum(size for pointer, size in storages().items() if pointer not in before)


def storages() -> dict[int, int]:
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # isinstance wakes deprecated modules
        # Not its subclasses: FakeTensors that torch.compile left behind have no storage.
        tensors = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]
    return {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [Qwen3Config, LlamaConfig])
def test_activations_are_what_autograd_keeps(kind: type[PretrainedConfig], dtype: torch.dtype) -> None:
    """Of a layer: what four more layers keep, by four. Left out of the formula are a norm's [T, 1] and the like, a
    dozen numbers a token; at this width they are 6% of a checkpoint, and 1% of a layer."""
    pack = pack_of(210)
    measured: dict[str, list[int]] = {"checkpointed": [], "whole": []}
    for layers in (2, 6):
        model = AutoModelForCausalLM.from_config(toy(kind, layers), attn_implementation=ATTENTION).to(dtype)
        measured["whole"].append(saved_by_autograd(model, pack))
        measured["checkpointed"].append(kept_by_checkpoints(model, pack))
    predicted = layer_activations(size_of(toy(kind, 2)), dtype.itemsize)
    for (name, (few, many)), expected, tolerance in zip(measured.items(), predicted, (0.07, 0.015), strict=True):
        per_token = (many - few) / 4 / len(pack.input_ids)
        assert expected == pytest.approx(per_token, rel=tolerance), name


SERVER = ["rollout.engine=vllm_server", "rollout.server.start=true"]


def test_parameters_and_kv_cache_by_hand() -> None:
    q, h, kv, mlp = 4096, 2560, 1024, 9728
    qwen = 151936 * h + 36 * (2 * h * q + 2 * h * kv + 3 * h * mlp + 2 * h + 2 * 128) + h
    q, h, kv, mlp = 4096, 4096, 1024, 14336
    seed = 2 * 155136 * h + 32 * (2 * h * q + 2 * h * kv + 3 * h * mlp + 2 * h) + h
    for shape, parameters, layers in [(QWEN3_4B, qwen, 36), (SEED_CODER_8B, seed, 32)]:
        config = load_config(["qwen3_4b_math.yaml"], [*SERVER, "rollout.vllm.args={tensor_parallel_size: 2}"])
        plan = Plan(config, size_of(shape), Devices("cuda", 8, 80e9, here=False))
        assert plan.size.parameters == parameters
        assert plan.kv_bytes_per_token == 2 * layers * (8 // 2) * 128 * 2  # half of the heads
        assert plan.engine_weights == parameters  # half of 2 bytes each


def test_a_server_is_not_on_the_trainers_devices(qwen: str) -> None:
    printed = dry_run(["qwen3_4b_math.yaml", qwen, *SERVER, "rollout.vllm.gpu_memory=0.9", *NODE])
    assert gigabytes(printed, "engine") == gigabytes(printed, "engine meanwhile") == []
    assert "the vLLM server, on each of its own devices" in printed
    assert gigabytes(printed, "KV cache") == [61.0]  # 72 - 8.04 - 3
    assert "all ranks ask for up to 3,200 sequences" in printed


def test_on_a_cpu_the_engine_stays_while_it_trains() -> None:
    printed = dry_run(["rollout.engine=vllm", "--world", "2"])
    assert "memory of each of 2 ranks" in printed
    assert "of CPU (this machine)" in printed
    [meanwhile], [sampling] = gigabytes(printed, "engine meanwhile"), gigabytes(printed, "engine")
    assert meanwhile == sampling == 1.1  # 1 GiB of KV cache and 1.5 MB of weights
    assert gigabytes(printed, "KV cache") == [1.1]


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--world"], "--world: expected a number"),
        (["--world", "many"], "--world: expected a number"),
        (["--world", "1.5"], "--world 1.5: expected a whole number"),
        (["--device-memory", "0"], "--device-memory: expected a number of at least 1"),
        (["--wrld", "8"], "unknown option --wrld"),
        (["model.path=/no/such"], "model.path=/no/such: cannot load its config"),
    ],
)
def test_bad_input_is_one_line(args: list[str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        dry_run(["--dry-run", *args])
    assert "\n" not in str(caught.value)


def test_a_quantised_model_is_refused(tmp_path: Path) -> None:
    shape = Qwen3Config(**QWEN3_4B.to_dict(), quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(UserError, match=r"quantised \(gptq"):
        dry_run(["qwen3_4b_math.yaml", folder_of(shape, tmp_path), *NODE])


def test_without_the_hub_it_says_what_would_do() -> None:
    """In a process of its own: whether the hub may be asked is read once."""
    code = "from cipo_fast.dry_run import dry_run; dry_run(['qwen3_4b_math.yaml'], None)"
    done = subprocess.run(
        [sys.executable, "-c", code], env={"HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent", "PATH": ""},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "model.path=Qwen/Qwen3-4B: cannot load its config" in last
    assert "a local folder that holds a config.json is enough" in last
