"""The model and its tokenizer: any causal LM with a chat template."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import HfApi
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from cipo_fast.config import Config
from cipo_fast.errors import UserError

INTEGERS = ("I64", "I32", "BOOL")
KINDS = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
KINDS |= {torch.int64: "I64", torch.int32: "I32", torch.bool: "BOOL"}


def load_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """Raises UserError where there is none, or none with a chat template; and what `load_shape` raises: transformers
    reads config.json for a tokenizer too, and would blame the tokenizer for it."""
    load_shape(config)
    tokenizer = _load(config, "tokenizer", AutoTokenizer.from_pretrained)
    if len(tokenizer) < 2:  # what transformers makes of a folder without a tokenizer's files
        raise UserError(
            f"model.path={config.model.path}: cannot load its tokenizer: its files are missing; copy them there"
        )
    if not tokenizer.chat_template:
        raise UserError(f"model.path={config.model.path}: its tokenizer has no chat template; use an instruct model")
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"model.path={config.model.path}: its tokenizer has no end-of-sequence token; name its eos_token"
        )
    return tokenizer


def load_model(config: Config, attention: str) -> PreTrainedModel:
    """The first policy in fp32 with the given attention implementation; raises UserError unless every weight of the
    model comes from its files, and every tensor of the files goes into the model."""
    load_shape(config)
    load = partial(
        AutoModelForCausalLM.from_pretrained,
        dtype=torch.float32,
        attn_implementation=attention,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # refused below: transformers names them in a table alone
    )
    try:
        model, found = _load(config, "model", load)
    except UserError as error:
        _refuse_files(config)  # says more, where a file is at fault
        if attention in str(error):
            raise UserError(
                f"model.path={config.model.path}: its attention cannot be replaced by trees'; use another model"
            ) from None
        raise
    integers = _refuse_files(config)
    _refuse_weights(config, model, found)
    for name, tensor in named_tensors(model):  # transformers makes floats of integers
        kind = integers.get(name) or integers.get(name.removeprefix(f"{model.base_model_prefix}."))
        if kind and tensor.is_floating_point():
            raise UserError(
                f"model.path={config.model.path}: {name} is of integers ({kind}); use the unquantised model"
            )
    return model


def load_shape(config: Config) -> PretrainedConfig:
    """The config of the model in `model.path`, without its weights; raises UserError for one that no trainer of weights
    can load: an adapter, a quantised model, an encoder-decoder; and for a generation_config.json of no use."""
    path = config.model.path
    folder = Path(path)
    if folder.is_dir():
        if (folder / "adapter_config.json").is_file():
            raise UserError(f"model.path={path}: holds an adapter (LoRA); merge it into its base model first")
        if not (folder / "config.json").is_file():
            more = "; GGUF files are quantised: use the model they were made from" if any(folder.glob("*.gguf")) else ""
            raise UserError(f"model.path={path}: the folder holds no config.json{more}")
        _refuse_pointers(folder)
    shape = _load(config, "config", AutoConfig.from_pretrained)
    for part in (shape, shape.get_text_config()):
        for key in ("quantization_config", "compression_config"):
            if getattr(part, key, None):
                method = dict_of(getattr(part, key)).get("quant_method", "unknown method")
                raise UserError(
                    f"model.path={path}: its weights are quantised ({method}, {key} in its config.json); use the "
                    "unquantised model"
                )
    if shape.is_encoder_decoder:
        raise UserError(f"model.path={path}: {shape.model_type} is an encoder-decoder; use a decoder-only model")
    _refuse_ends(path, shape)
    return shape


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All that a model's state is, each tensor once: parameters and persistent buffers (a router's bias, say), under
    the first of its names. What is no parameter is never to be cast: a buffer's type is part of what it says."""
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor


def cast_weights(model: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """`named_tensors` as an engine gets them: parameters in `dtype`, buffers as they are; one at a time."""
    for name, tensor in named_tensors(model):
        yield name, tensor.detach().to(dtype) if isinstance(tensor, nn.Parameter) else tensor


def tied_names(model: nn.Module) -> dict[str, str]:
    """Further name -> first name of a tensor that has several: {"lm_head.weight": "model.embed_tokens.weight"}."""
    first: dict[int, str] = {}
    return {
        name: first[id(tensor)]
        for name, tensor in model.state_dict(keep_vars=True).items()
        if isinstance(tensor, Tensor) and first.setdefault(id(tensor), name) != name
    }


# ------------------------------------------------------------------------------------------------------- bad models


def _load(config: Config, what: str, load: Callable[..., Any]) -> Any:
    """`load` from `model.path`. Whatever it raises, and the loaders raise all kinds, becomes one line."""
    path = config.model.path
    hub = None
    if not Path(path).is_dir():
        if Path(path).exists():
            raise UserError(f"model.path={path}: is a file; name the folder that holds the model")
        if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", path):
            raise UserError(f"model.path={path}: cannot load its {what}: no such folder")
        hub = _hub_refusal(path)
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # tables of what we refuse in one line
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()  # a line of its own above the one that says what is wrong
    try:
        return load(path, trust_remote_code=False, local_files_only=hub is not None)
    except Exception as error:
        reason = one_line(error)
        if "CONVERSION" in reason:
            reason = "its tensors cannot be put together as the model has them: are some missing?"
        elif "trust_remote_code" in str(error):
            reason = "it needs code of its own (trust_remote_code), which is not run here"
        elif hub is not None:
            reason = f"no such folder, not in the hub's cache, and the hub does not give it ({hub})"
        hint = "; a local folder that holds a config.json is enough for --dry-run" if hub and what == "config" else ""
        raise UserError(f"model.path={path}: cannot load its {what}: {reason}{hint}") from None
    finally:
        transformers.logging.set_verbosity(level)


@cache
def _hub_refusal(name: str) -> str | None:
    """Why the hub does not give this model, asked once and quickly; None where it does. transformers would ask again
    and again, for a minute a file."""
    try:
        HfApi().model_info(name, timeout=10)
    except Exception as error:
        return one_line(error)
    return None


def one_line(error: Exception) -> str:
    """The first line of what an error says, with the next where it announces one; its kind where that says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return (f"{type(error).__name__}: {text}" if isinstance(error, KeyError) else text)[:300]


def dict_of(section: Any) -> dict[str, Any]:
    return section if isinstance(section, dict) else section.to_dict()


def _is_pointer(file: Path) -> bool:
    try:
        with file.open("rb") as opened:
            return opened.read(24) == b"version https://git-lfs."
    except OSError:  # what reads it says why
        return False


def _refuse_pointers(folder: Path) -> None:
    """UserError for a file of config or tokenizer that git-lfs has left as a pointer: loaders call it broken, or go
    without it. Weights are looked at when they are loaded."""
    kinds = {".json", ".jinja", ".txt"} | (set() if (folder / "tokenizer.json").is_file() else {".model"})
    for file in sorted(folder.iterdir()):
        if file.suffix in kinds and file.is_file() and _is_pointer(file):
            raise UserError(f"model.path={folder}: {file.name} is a git-lfs pointer; run `git lfs pull`")


def _refuse_ends(path: str, shape: PretrainedConfig) -> None:
    """UserError where generation_config.json, or config.json without it, names ends of an answer that are no ids of the
    model. transformers goes without a file that it cannot read, and so without its ends."""
    for name in ("generation_config.json", "config.json"):
        try:
            file = cached_file(path, name, local_files_only=True)
        except OSError:
            file = None
        if file is None:
            continue
        where = f"model.path={path}: {name}"
        try:
            content = json.loads(Path(file).read_text(encoding="utf-8"))
            given = content.get("eos_token_id")
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            raise UserError(f"{where} cannot be read ({one_line(error)})") from None
        for end in given if isinstance(given, list) else [] if given is None else [given]:
            if type(end) is not int:  # True is an int to Python
                raise UserError(
                    f"{where}: eos_token_id={json.dumps(given)[:100]}: expected a token id or a list of them"
                )
            embeddings = shape.get_text_config().vocab_size
            if not 0 <= end < embeddings:
                raise UserError(
                    f"{where}: eos_token_id={json.dumps(given)[:100]}: the model has ids 0 to {embeddings - 1}"
                )
        return


def _refuse_files(config: Config) -> dict[str, str]:
    """UserError for a weight file that cannot be read, or whose numbers mean nothing without scales of their own.
    Returns name -> type of tensors of integers, which a buffer may be."""
    path = config.model.path
    found: dict[str, str] = {}
    for file in _weight_files(path):
        where = f"model.path={path}: {file.name}"
        if _is_pointer(file):
            raise UserError(f"{where} is a git-lfs pointer, not the weights; run `git lfs pull`")
        try:
            types = _types(file)
        except Exception as error:
            raise UserError(f"{where} cannot be read ({one_line(error)}): is it whole?") from None
        for name, kind in types.items():
            if kind not in KINDS.values():
                raise UserError(f"{where}: {name} is quantised ({kind}); use the unquantised model")
            if kind in INTEGERS and re.search(r"\.experts\.\d+\.", name):  # the model has them under another name
                raise UserError(f"{where}: {name} is of integers ({kind}); use the unquantised model")
        found |= types
    if missing := _missing_experts(set(found)):
        raise UserError(f"model.path={path}: its weights lack {', '.join(missing[:3])}; are all files there?")
    return {name: kind for name, kind in found.items() if kind in INTEGERS}


def _types(file: Path) -> dict[str, str]:
    """Name -> type of a weight file's tensors, as safetensors calls it. Reads no numbers."""
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as tensors:
            return {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
    try:
        pickled = torch.load(file, map_location="meta", weights_only=True, mmap=True)
    except Exception:  # transformers says what is wrong with it; an old format has no map
        return {}
    return {name: KINDS.get(x.dtype, str(x.dtype)) for name, x in pickled.items() if isinstance(x, Tensor)}


def _missing_experts(names: set[str]) -> list[str]:
    """What one expert of a layer has and another lacks. transformers stacks them, and names no single one."""
    found: dict[str, set[tuple[str, str]]] = {}
    for name in names:
        if expert := re.fullmatch(r"(.*\.experts)\.(\d+)\.(.*)", name):
            found.setdefault(expert[1], set()).add((expert[2], expert[3]))
    return sorted(
        f"{layer}.{number}.{rest}"
        for layer, parts in found.items()
        for number in {number for number, _ in parts}
        for rest in {rest for _, rest in parts}
        if (number, rest) not in parts
    )


def _weight_files(path: str) -> list[Path]:
    """The files that transformers reads weights from, those that are there, in its order of preference."""
    try:
        config_file = cached_file(path, "config.json", local_files_only=True)
    except OSError:
        return []
    folder = Path(config_file or path).parent
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            try:
                shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            except (ValueError, KeyError, TypeError, AttributeError):
                raise UserError(
                    f"model.path={path}: {index.name} is not an index of weight files; copy it anew"
                ) from None
            return sorted(folder / shard for shard in shards if (folder / shard).is_file())
    return []


def _refuse_weights(config: Config, model: PreTrainedModel, found: dict[str, Any]) -> None:
    """UserError unless files and model hold the same tensors. transformers fills what is missing with random numbers,
    leaves out what it does not expect, and unties a head that is not its embedding."""
    path = config.model.path
    name = type(model).__name__
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UserError(f"model.path={path}: an adapter (LoRA) lies on it; merge it into the model first")
    for keys, fault in (
        (found["missing_keys"], f"tensors of {name} are missing from its weights"),
        (found["unexpected_keys"], f"tensors of its weights are none of {name}'s: is config.json another model's?"),
        (
            {f"{key} {list(file)} (the model's: {list(own)})" for key, file, own in found["mismatched_keys"]},
            f"tensors of its weights do not have the shape that {name} has",
        ),
        (set(found["error_msgs"]), "errors while loading"),
    ):
        if keys:
            first = sorted(keys)[:3]
            more = ", ..." if len(keys) > len(first) else ""
            raise UserError(f"model.path={path}: {len(keys)} {fault}: {', '.join(first)}{more}")
    for target, source in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        if model.get_parameter(target) is not model.get_parameter(source):
            raise UserError(
                f"model.path={path}: config.json ties {target} to {source}, but its weights hold two that differ; set "
                "tie_word_embeddings to false, or remove one"
            )
    for key, tensor in chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_floating_point() and tensor.numel() and not all(x.isfinite() for x in tensor.aminmax()):
            raise UserError(
                f"model.path={path}: {key} holds numbers that are not finite (NaN or infinity); use another copy"
            )
