"""The recipes' headers are true: every command in them is one that works."""

import re
import shlex
from pathlib import Path

import pytest
from transformers import LlamaConfig, PretrainedConfig, Qwen3Config

from cipo_fast.config import configs_dir, load_config
from cipo_fast.dry_run import dry_run
from cipo_fast.embedded.model import embedded_config

SMOLLM2 = LlamaConfig(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True,
)  # fmt: skip
QWEN3_4B = Qwen3Config(
    vocab_size=151936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128, max_position_embeddings=40960, tie_word_embeddings=True,
)  # fmt: skip
SEED_CODER_8B = LlamaConfig(
    vocab_size=155136, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, max_position_embeddings=32768, tie_word_embeddings=False,
)  # fmt: skip
SHAPES = {
    "smollm2_math.yaml": SMOLLM2,
    "human_eval_smoke.yaml": SMOLLM2,
    "qwen3_4b_math.yaml": QWEN3_4B,
    "seed_coder_8b_code.yaml": SEED_CODER_8B,
}
RECIPES = sorted(path.name for path in configs_dir().glob("*.yaml"))
ROWS = {
    "math": '{"prompt": "What is 3 + 4?", "answer": "7"}\n',
    "code": '{"prompt": "Add.", "tests": [{"args": [1, 2], "expected": 3}]}\n',
}


def header(name: str) -> str:
    text = (configs_dir() / name).read_text(encoding="utf-8")
    return text[: re.search(r"^[a-z]", text, re.MULTILINE).start()]


def commands(name: str) -> list[list[str]]:
    """Arguments of every command for train.py that stands indented in the header."""
    text = re.sub(r"\\\n#\s+", "", header(name))
    lines = re.findall(r"^#     (\S.*cipo_fast/train\.py .*)$", text, re.MULTILINE)
    return [shlex.split(line.partition("cipo_fast/train.py ")[2], comments=True) for line in lines]


def placed(shape: PretrainedConfig, path: str, folder: Path) -> list[str]:
    """The model's shape where the recipe looks for it; where that is the hub, an override with another place."""
    local = Path(path).is_relative_to(folder)
    where = path if local else folder / "shape"
    shape.save_pretrained(where)
    return [] if local else [f"model.path={where}"]


@pytest.mark.parametrize("name", SHAPES)
def test_every_command_of_a_header_is_taken(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = commands(name)
    assert found
    for args in found:
        assert name in args
        verifier = "code" if "code" in name or "human" in name else "math"
        for arg in args:
            key, _, value = arg.partition("=")
            if key in ("data.train", "data.eval") and not value.startswith("hub:"):
                Path(value).write_text(ROWS[verifier] * 4, encoding="utf-8")
        settings = [arg for arg in args if "=" in arg]
        config = load_config([name], settings)
        assert config.data.verifier == verifier
        more = placed(SHAPES[name], config.model.path, tmp_path)
        planned = args if "--dry-run" in args else [*args, "--dry-run", "--world", "8", "--device-memory", "80"]
        printed = dry_run([*planned, *more], embedded_config)
        assert "#   fits: " in printed
        assert "DOES NOT FIT" not in printed


@pytest.mark.parametrize("name", ["qwen3_4b_math.yaml", "seed_coder_8b_code.yaml"])
def test_headers_name_public_sets_and_no_limit_that_is_gone(name: str) -> None:
    assert "data.train=hub:" in header(name)
    assert "rewards would" not in header(name)
    assert "only verifier" not in header(name)


def test_the_table_of_controls_has_every_recipe() -> None:
    page = (configs_dir().parent / "docs" / "running.md").read_text(encoding="utf-8")
    assert [name for name in RECIPES if f"`{name}`" not in page] == []
