"""How long a sequence may be: the model's positions, for every engine, and what the engine holds."""

import json
from pathlib import Path

import pytest
import torch
import transformers as hf
from transformers import PretrainedConfig

from cipo_fast import evaluate, train
from cipo_fast.config import Config, load_config
from cipo_fast.embedded.model import embedded_config, embedded_tokenizer
from cipo_fast.engines import fit_to_model, positions
from cipo_fast.errors import UserError

FACTORS = [1.0] * 4
SIZES = dict(hidden_size=32, num_attention_heads=4, max_position_embeddings=400)  # noqa: C408


def shape(kind: str = "Qwen3", **more: object) -> PretrainedConfig:
    return getattr(hf, f"{kind}Config")(**{**SIZES, **more})


def rope(kind: str, **more: object) -> dict[str, object]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **more}}


def settings(*more: str) -> Config:
    """Longest sequences: 100 + 64 in training, 300 + 64 with corrections, 300 + 150 in evaluation."""
    sizes = ["data.max_prompt_tokens=100", "correction.max_prompt_tokens=300", "rollout.max_tokens=64"]
    return load_config([], ["model.path=any", *sizes, "eval.max_tokens=150", *more])


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        (shape(), 400),
        (shape(**rope("yarn", factor=4.0, original_max_position_embeddings=100)), 400),
        (shape("Llama", **rope("llama3", factor=8.0, original_max_position_embeddings=50, low_freq_factor=1.0,
                               high_freq_factor=4.0)), 400),
        (shape(**rope("linear", factor=4.0)), 1600),
        # Frequencies that change with what is computed together: up to there rows and trees agree.
        (shape(**rope("dynamic", factor=4.0)), 400),
        (shape("Phi3", pad_token_id=0, original_max_position_embeddings=200,
               **rope("longrope", short_factor=FACTORS, long_factor=FACTORS)), 200),
        (shape("Gemma3Text"), 400),
        (hf.BloomConfig(), None),
        (hf.GPT2Config(n_positions=77), 77),
    ],
)  # fmt: skip
def test_positions_of_every_kind_of_rope(what: PretrainedConfig, expected: int | None) -> None:
    assert positions(what)[0] == expected


@pytest.mark.parametrize("engine", ["local", "vllm", "vllm_server"])
def test_what_is_longer_is_cut_and_said_for_every_engine(engine: str) -> None:
    start = ["rollout.server.start=true"] if engine == "vllm_server" else []
    config, said = settings(f"rollout.engine={engine}", *start), []
    assert config.max_model_len == 450
    same = fit_to_model(config, shape(max_position_embeddings=450), said.append)
    assert (same, said) == (config, [])
    fitted = fit_to_model(config, shape(max_position_embeddings=449), said.append)
    assert (fitted.max_model_len, fitted.correction.max_prompt_tokens) == (449, 300)
    assert [line.partition(":")[0] for line in said] == ["the model has 449 positions (max_position_embeddings)"] * 2
    assert "more than 299, an evaluation's answer is cut before eval.max_tokens=150" in said[1]
    fitted = fit_to_model(config, shape(max_position_embeddings=160), said.append)
    assert (fitted.data.max_prompt_tokens, fitted.correction.max_prompt_tokens) == (96, 96)  # and 64 are 160
    assert config.data.max_prompt_tokens == 100


@pytest.mark.parametrize(
    ("overrides", "limit", "least", "message"),
    [
        ([], 150, 151, "150 positions .*: eval.max_tokens=150 leaves none for a prompt; change: eval.max_tokens=75"),
        (["eval.max_tokens=10"], 64, 65, "rollout.max_tokens=64 leaves none"),
        (["rollout.vllm.max_model_len=401"], 400, 401, "max_model_len=401 is above the model's 400 positions"),
    ],
)
def test_what_has_no_room_is_refused(overrides: list[str], limit: int, least: int, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        fit_to_model(settings(*overrides), shape(max_position_embeddings=limit), print)
    assert "\n" not in str(caught.value)
    fit_to_model(settings(*overrides), shape(max_position_embeddings=least), print)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of 32 positions, and problems whose prompts have 11 to 15 tokens."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = embedded_config(load_config([], ["model.embedded.hidden=32", "model.embedded.mlp=64"]).model.embedded)
    config.max_position_embeddings = 32
    hf.Qwen3ForCausalLM(config).save_pretrained(folder)
    embedded_tokenizer().save_pretrained(folder)
    rows = [{"prompt": f"add {10 ** (i % 3)}+{i}", "answer": "1"} for i in range(30)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def arguments(folder: Path, run: Path, *more: str) -> list[str]:
    sizes = ["rollout.prompts_per_step=2", "rollout.samples_per_prompt=2", "rollout.max_tokens=16", "train.steps=1"]
    sizes += ["eval.problems=2", "eval.samples=2", "eval.max_tokens=24", "run.view=plain", "train.pack_tokens=256"]
    sizes += ["data.max_prompt_tokens=100", "correction.max_prompt_tokens=100", "checkpoint.export=false"]
    return [f"model.path={folder}", f"data.train={folder}/train.jsonl", f"run.dir={run}", *sizes, *more]


def test_a_run_keeps_to_the_positions(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert train.main(arguments(folder, tmp_path / "run")) == 0
    out = capfd.readouterr().out
    assert "the model has 32 positions (max_position_embeddings): prompts of more than 16 are dropped" in out
    assert "an evaluation's answer is cut before eval.max_tokens=24" in out


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_nothing_is_written_where_a_model_is_refused(
    command: str, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run, long = tmp_path / "run", ["rollout.max_tokens=32", "eval.max_tokens=32"]
    if command == "train":
        assert train.main(arguments(folder, run, *long)) == 2
    else:
        assert evaluate.main([str(folder), "--tasks", f"{folder}/train.jsonl", "--out", str(run), *long]) == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: the model has 32 positions")
    assert not run.exists()
