"""Folders as people have them: what is wrong with one is said in one line, and nothing is filled in."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, BertConfig, Glm4MoeConfig, PretrainedConfig, Qwen3Config, T5Config
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from cipo_fast.config import load_config
from cipo_fast.errors import UserError
from cipo_fast.model import load_model, load_shape, load_tokenizer, one_line

SHAPE = dict(  # noqa: C408
    vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=8, max_position_embeddings=64,
)  # fmt: skip
Fault = Callable[[Path], object]
HEAD, EMBEDDING, QUERY = "lm_head.weight", "model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight"


def write(folder: Path, shape: PretrainedConfig, **how: object) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(shape).save_pretrained(folder, **how)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Good ones: with a head of its own, with a tied one, in shards, with experts."""
    root = tmp_path_factory.mktemp("models")
    experts = dict(  # noqa: C408
        n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, first_k_dense_replace=0, moe_intermediate_size=8
    )
    return {
        "own": write(root / "own", Qwen3Config(**SHAPE, tie_word_embeddings=False)),
        "tied": write(root / "tied", Qwen3Config(**SHAPE, tie_word_embeddings=True)),
        "shards": write(root / "shards", Qwen3Config(**SHAPE, tie_word_embeddings=False), max_shard_size="6KB"),
        "experts": write(root / "experts", Glm4MoeConfig(**SHAPE, **experts)),
    }


def load(folder: Path | str) -> torch.nn.Module:
    return load_model(load_config([], [f"model.path={folder}"]), "sdpa")


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Fault:
    """The fault of a changed weight file."""

    def fault(folder: Path) -> None:
        file = folder / "model.safetensors"
        found = {name: tensor.clone() for name, tensor in load_file(file).items()}
        change(found)
        save_file(found, file, {"format": "pt"})

    return fault


def settings(**values: object) -> Fault:
    """The fault of a changed config.json; None takes a key out."""

    def fault(folder: Path) -> None:
        file = folder / "config.json"
        content = json.loads(file.read_text()) | values
        file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return fault


def index(change: Callable[[Path, dict[str, str]], object]) -> Fault:
    """The fault of changed shards, or of a changed index of them."""

    def fault(folder: Path) -> None:
        file = folder / "model.safetensors.index.json"
        content = json.loads(file.read_text())
        change(folder, content["weight_map"])
        file.write_text(json.dumps(content))

    return fault


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def take_from_shard(folder: Path, shards: dict[str, str]) -> None:
    """The index still names it."""
    found = load_file(folder / shards[QUERY])
    del found[QUERY]
    save_file(found, folder / shards[QUERY], {"format": "pt"})


def as_pickle(keep: int | None) -> Fault:
    def fault(folder: Path) -> None:
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes((folder / "pytorch_model.bin").read_bytes()[:keep])

    return fault


def replaced(name: str, text: str) -> Fault:
    return lambda folder: (folder / name).write_text(text)


def generation(text: str) -> Fault:
    return replaced("generation_config.json", text)


def no_generation(fault: Fault) -> Fault:
    return lambda folder: ((folder / "generation_config.json").unlink(), fault(folder))


def emptied(folder: Path, *, keep: tuple[str, ...] = ()) -> None:
    for file in folder.iterdir():
        if file.name not in keep:
            file.unlink()


def only(name: str, text: str = "") -> Fault:
    def fault(folder: Path) -> None:
        emptied(folder)
        (folder / name).write_text(text)

    return fault


def other_model(shape: PretrainedConfig) -> Fault:
    return lambda folder: shape.save_pretrained(folder)


EXPERT = "model.layers.0.mlp.experts.1.up_proj.weight"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n"
NAN = float("nan")
FAULTS: dict[str, tuple[str, Fault, str]] = {
    "missing": ("own", tensors(lambda t: t.pop(QUERY)), f"1 tensors .* missing .*{QUERY}"),
    "no head": ("own", tensors(lambda t: t.pop(HEAD)), f"missing .*{HEAD}"),
    "no embedding": ("own", tensors(lambda t: t.pop(EMBEDDING)), f"missing .*{EMBEDDING}"),
    "no embedding, tied": ("tied", tensors(lambda t: t.pop(EMBEDDING)), f"missing .*{EMBEDDING}"),
    "tied, another head": ("tied", tensors(lambda t: t.update({HEAD: t[EMBEDDING] + 1})), f"ties {HEAD} to .*differ"),
    "untied in config.json": ("tied", settings(tie_word_embeddings=False), f"missing .*{HEAD}"),
    "misshapen": (
        "own",
        tensors(lambda t: t.update({QUERY: t[QUERY][:8].clone()})),
        rf"do not have the shape .*{QUERY} \[8, 16\] \(the model's: \[16, 16\]\)",
    ),
    "too many layers": (
        "own",
        settings(num_hidden_layers=1, layer_types=None),
        r"none of Qwen3ForCausalLM's.*model\.layers\.1\.",
    ),
    "too few layers": ("own", settings(num_hidden_layers=3, layer_types=None), r"missing .*model\.layers\.2\."),
    "reward model": ("tied", tensors(lambda t: t.update({"score.weight": torch.ones(1, 16)})), r"score\.weight"),
    "nan": ("own", tensors(lambda t: t[QUERY][0, 0].fill_(NAN)), f"{QUERY} holds numbers that are not finite"),
    "infinity": ("own", tensors(lambda t: t[HEAD][3, 1].fill_(-torch.inf)), f"{HEAD} holds numbers that are not"),
    "fp8": (
        "own",
        tensors(lambda t: t.update({QUERY: t[QUERY].to(torch.float8_e4m3fn)})),
        rf"model\.safetensors: {QUERY} is quantised \(F8_E4M3\)",
    ),
    "int8": ("own", tensors(lambda t: t.update({QUERY: t[QUERY].to(torch.int8)})), rf"{QUERY} is quantised \(I8\)"),
    "int64": ("own", tensors(lambda t: t.update({QUERY: t[QUERY].long()})), rf"{QUERY} is of integers \(I64\)"),
    "bool, tied": ("tied", tensors(lambda t: t.update({EMBEDDING: t[EMBEDDING] > 0})), rf"{EMBEDDING} is .*\(BOOL\)"),
    "int32 head": ("own", tensors(lambda t: t.update({HEAD: t[HEAD].int()})), rf"{HEAD} is of integers \(I32\)"),
    "int64, pickled": (
        "own",
        lambda f: (tensors(lambda t: t.update({QUERY: t[QUERY].long()}))(f), as_pickle(None)(f)),
        rf"{QUERY} is of integers \(I64\)",
    ),
    "int64 expert": (
        "experts",
        tensors(lambda t: t.update({EXPERT: t[EXPERT].long()})),
        rf"{EXPERT} is of integers \(I64\)",
    ),
    "fp8, in config.json": ("own", settings(quantization_config={"quant_method": "fp8"}), r"quantised \(fp8"),
    "bits, in config.json": ("own", settings(quantization_config={"load_in_4bit": True}), "quantised"),
    "lfs": ("own", replaced("model.safetensors", LFS), r"model\.safetensors is a git-lfs pointer.*git lfs pull"),
    "lfs pickle": ("own", lambda f: (as_pickle(None)(f), replaced("pytorch_model.bin", LFS)(f)), "git-lfs pointer"),
    "cut short": ("own", cut, r"model\.safetensors cannot be read"),
    "empty file": ("own", replaced("model.safetensors", ""), r"model\.safetensors cannot be read"),
    "pickle cut short": ("own", as_pickle(200), "cannot load its model"),
    "no weights": ("own", lambda folder: emptied(folder, keep=("config.json",)), "cannot load its model: .*no file"),
    "shard away": (
        "shards",
        index(lambda folder, shards: (folder / shards[QUERY]).unlink()),
        r"cannot load its model: .*model-0000",
    ),
    "shard cut short": (
        "shards",
        index(lambda folder, shards: (folder / shards[QUERY]).write_bytes(b"12345678")),
        r"model-0000\d-of-0000\d\.safetensors cannot be read",
    ),
    "shard lacks a tensor": ("shards", index(take_from_shard), f"missing .*{QUERY}"),
    "index is no index": ("shards", replaced("model.safetensors.index.json", "[]"), "index"),
    "expert missing": (
        "experts",
        tensors(lambda t: t.pop(EXPERT)),
        r"weights lack model\.layers\.0\.mlp\.experts\.1\.up_proj\.weight",
    ),
    "expert missing whole": (
        "experts",
        tensors(lambda t: [t.pop(f"model.layers.0.mlp.experts.2.{p}_proj.weight") for p in ("up", "gate", "down")]),
        r"do not have the shape .*model\.layers\.0\.mlp\.experts\.",
    ),
    "router bias missing": (
        "experts",
        tensors(lambda t: t.pop("model.layers.0.mlp.gate.e_score_correction_bias")),
        r"missing .*model\.layers\.0\.mlp\.gate\.e_score_correction_bias",
    ),
    "lfs config.json": (
        "own",
        replaced("config.json", LFS),
        r": config\.json is a git-lfs pointer; run `git lfs pull`",
    ),
    "lfs tokenizer": ("own", replaced("tokenizer.json", LFS), r": tokenizer\.json is a git-lfs pointer"),
    "lfs settings": ("own", replaced("tokenizer_config.json", LFS), r": tokenizer_config\.json is a git-lfs pointer"),
    "lfs index": ("shards", replaced("model.safetensors.index.json", LFS), r"index\.json is a git-lfs pointer"),
    "lfs template": ("own", replaced("chat_template.jinja", LFS), r": chat_template\.jinja is a git-lfs pointer"),
    "lfs generation": (
        "own",
        replaced("generation_config.json", LFS),
        r": generation_config\.json is a git-lfs pointer",
    ),
    "generation cut short": ("own", generation('{"eos_token_id": [1, 2'), r": generation_config\.json cannot be read"),
    "generation is a list": ("own", generation("[1]"), r": generation_config\.json cannot be read"),
    **{
        f"end {value}": (
            "own",
            generation(f'{{"eos_token_id": {value}}}'),
            rf"generation_config\.json: eos_token_id={says}",
        )
        for value, says in [
            ('"1"', '"1": expected a token id'),
            ("[[1]]", r"\[\[1\]\]: expected"),
            ('{"a": 1}', '{"a": 1}: expected'),
            ("true", "true: expected"),
            ("1.0", "1.0: expected"),
            ("[3, false]", r"\[3, false\]: expected"),
            ("-1", "-1: the model has ids 0 to 39"),
            ("[1, 40]", r"\[1, 40\]: the model has ids 0 to 39"),
        ]
    },
    "end, in config.json": ("own", no_generation(settings(eos_token_id=-2)), r": config\.json: eos_token_id=-2"),
    "a number as text": ("own", settings(num_hidden_layers="two"), "config: .*'num_hidden_layers': .*expected int"),
    "empty folder": ("own", emptied, "holds no config.json"),
    "gguf": ("own", only("model-Q4.gguf"), "GGUF"),
    "adapter": ("own", only("adapter_config.json", "{}"), "adapter .*merge"),
    "adapter on a model": ("own", replaced("adapter_config.json", "{}"), "adapter .*merge"),
    "config.json cut short": ("own", replaced("config.json", '{"model_type": "qw'), "cannot load its config"),
    "config.json empty": ("own", replaced("config.json", "{}"), "cannot load its config"),
    "unknown kind": ("own", settings(model_type="qwen99"), "cannot load its config: .*qwen99"),
    "code of its own": (
        "own",
        settings(model_type="mine", auto_map={"AutoConfig": "c.C", "AutoModelForCausalLM": "c.M"}),
        "needs code of its own",
    ),
    "encoder-decoder": ("own", other_model(T5Config(d_model=16, num_layers=1)), "is an encoder-decoder"),
    "encoder": ("own", other_model(BertConfig(hidden_size=16, num_attention_heads=2)), "cannot|missing"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_one_line(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    kind, fault, message = FAULTS[name]
    folder = Path(shutil.copytree(folders[kind], tmp_path / "model"))
    fault(folder)
    with pytest.raises(UserError, match=message) as caught:
        load(folder)
    line = str(caught.value)
    assert line.startswith(f"model.path={folder}: ")
    assert "\n" not in line
    assert len(line) < 500


@pytest.mark.parametrize("kind", ["own", "tied", "shards", "experts"])
def test_every_weight_is_the_files(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    model = load(folders[kind])
    model.save_pretrained(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    for file in folders[kind].glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            assert torch.equal(written.pop(name), tensor), name
    assert not written
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_what_is_right_passes(folders: dict[str, Path], tmp_path: Path) -> None:
    """A tied head that the file holds too, an old checkpoint's inv_freq, pickled weights, both kinds of file."""
    same = Path(shutil.copytree(folders["tied"], tmp_path / "same"))
    tensors(lambda t: t.update({HEAD: t[EMBEDDING].clone()}))(same)
    old = Path(shutil.copytree(folders["own"], tmp_path / "old"))
    tensors(lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))(old)
    pickled = Path(shutil.copytree(folders["own"], tmp_path / "pickled"))
    as_pickle(None)(pickled)
    both = Path(shutil.copytree(folders["own"], tmp_path / "both"))
    (both / "pytorch_model.bin").write_bytes(b"never read")
    (both / "generation_config.json").write_text('{"eos_token_id": [0, 39]}')
    for folder in (same, old, pickled, both):
        assert load(folder).num_parameters() > 0


def test_names_that_are_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is asked once, quickly; without it nothing waits."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    for path, message in [
        ("/no/such", "no such folder"),
        ("./nowhere", "no such folder"),
        ("a/b/c", "no such folder"),
        (str(tmp_path / "model.gguf"), "is a file"),
        ("nobody/has-this-model", "not in the hub's cache, and the hub does not give it"),
    ]:
        config = load_config([], [f"model.path={path}"])
        for what in (load_tokenizer, load_shape, lambda config: load_model(config, "sdpa")):
            with pytest.raises(UserError, match=message) as caught:
                what(config)
            assert "\n" not in str(caught.value)


def test_a_folder_without_a_tokenizer(folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="cannot load its tokenizer"):
        load_tokenizer(load_config([], [f"model.path={folders['own']}"]))


def test_a_fault_of_config_json_is_not_the_tokenizers(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["own"], tmp_path / "model"))
    (folder / "config.json").write_text('{"model_type": "qwen3", "hidden_size": "wide"}')
    with pytest.raises(UserError, match=r"cannot load its config: .*hidden_size.*expected int"):
        load_tokenizer(load_config([], [f"model.path={folder}"]))


def test_an_error_that_says_nothing_is_named_by_its_kind() -> None:
    assert one_line(EOFError()) == "EOFError"
    assert one_line(OSError("\n first \n second")) == "first"
    assert one_line(ValueError("wrong:\n\n  because\nmore")) == "wrong: because"
    assert one_line(KeyError("rope_theta")) == "KeyError: 'rope_theta'"


def test_the_good_folders_have_their_shape(folders: dict[str, Path]) -> None:
    shape = load_shape(load_config([], [f"model.path={folders['own']}"]))
    assert shape.to_dict() == AutoConfig.from_pretrained(folders["own"]).to_dict()
