"""Data sets of the Hugging Face hub by `datasets`: from its local cache where they are in it, without a network."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from cipo_fast.config import HUB_NAME
from cipo_fast.errors import UserError
from cipo_fast.tasks.sources import INSTALL, Role

CONNECT_S = 5.0
ORDER: dict[Role, tuple[str, ...]] = {"train": ("train",), "eval": ("test", "validation")}


def hub_rows(name: str, role: Role) -> Iterator[dict[str, Any]]:
    """The rows of `hub:OWNER/NAME[:CONFIG[:SPLIT]]`. Without a split: `train` to train on, `test` or `validation` to
    evaluate on, or the only one there is. Without a config: default, main, or the only one. Raises UserError."""
    yield from loaded(name, role)


def fingerprint(name: str, role: Role) -> str:
    """Of the rows that `hub_rows` gives: what `datasets` tells one version from another by."""
    return str(loaded(name, role)._fingerprint)


def loaded(name: str, role: Role) -> Any:
    """The `datasets.Dataset` of that name; raises UserError."""
    try:
        import datasets
    except ImportError:
        raise UserError(f"{name}: data sets of the hub need `datasets`: {INSTALL}") from None
    match = HUB_NAME.fullmatch(name)
    if match is None:
        raise UserError(f"{name}: expected hub:OWNER/NAME, hub:OWNER/NAME:CONFIG or hub:OWNER/NAME:CONFIG:SPLIT")
    repository, config, split = match[1], match[2] or None, match[3]
    datasets.utils.logging.set_verbosity_error()
    try:
        builder = _cached(datasets, repository, config) or _online(datasets, name, repository, config)
        builder.download_and_prepare()
        splits = list(builder.info.splits or {})
        return builder.as_dataset(split=_split(name, splits, split, role))
    except UserError:
        raise
    except Exception as error:  # of a network, a server, a format: `datasets` has no common class
        why = " ".join(str(error).split())[:300]
        hint = "; give the file that has its rows instead" if "scripts are no longer supported" in why else ""
        raise UserError(f"{name}: cannot be loaded ({type(error).__name__}: {why}){hint}") from None


def _cached(datasets: Any, repository: str, config: str | None) -> Any:
    """A builder of what the cache holds, or None. The cache goes first: a run is the same the next time, and a machine
    without a network does not wait for one."""
    from datasets.packaged_modules.cache.cache import Cache

    for wanted in (config,) if config else ("default", "main", None):
        try:
            return Cache(
                repo_id=repository,
                dataset_name=repository.split("/")[-1],
                config_name=wanted,
                version="auto",
                hash="auto",
            )
        except (ValueError, OSError) as error:
            if config is None and "multiple" in str(error):
                names = str(error).split("cache:", 1)[-1].split("\n")[0].strip()
                raise UserError(f"hub:{repository}: name a config, hub:{repository}:CONFIG; it has {names}") from None
    return None


def _online(datasets: Any, name: str, repository: str, config: str | None) -> Any:
    _refuse_without_network(name, datasets)
    if config is None:
        names = datasets.get_dataset_config_names(repository)
        known = [n for n in ("default", "main") if n in names] or (names if len(names) == 1 else [])
        if not known:
            raise UserError(f"{name}: name a config, hub:{repository}:CONFIG; it has {', '.join(names)}")
        config = known[0]
    return datasets.load_dataset_builder(repository, config)


def _refuse_without_network(name: str, datasets: Any) -> None:
    """`datasets` would retry for half a minute a request."""
    if datasets.config.HF_HUB_OFFLINE:
        cache = datasets.config.HF_DATASETS_CACHE
        raise UserError(f"{name}: not in the cache ({cache}), and HF_HUB_OFFLINE is set: unset it, or give a file")
    if any(os.environ.get(key) for key in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")):
        return  # only the proxy knows
    address = urlsplit(datasets.config.HF_ENDPOINT)
    try:
        host, port = address.hostname or "huggingface.co", address.port or (80 if address.scheme == "http" else 443)
        socket.create_connection((host, port), CONNECT_S).close()
    except OSError as error:
        cache, why = datasets.config.HF_DATASETS_CACHE, error.strerror or error
        raise UserError(
            f"{name}: not in the cache ({cache}), and {address.hostname} cannot be reached ({why}): "
            "load it where there is a network, or give a file"
        ) from None


def _split(name: str, splits: list[str], wanted: str | None, role: Role) -> str:
    if wanted is not None and wanted in splits:
        return wanted
    found = [split for split in ORDER[role] if split in splits] if wanted is None else []
    if wanted is None and not found and len(splits) == 1:
        found = splits
    if not found:
        base = ":".join(name.split(":")[:2])
        lacks = f"no split {wanted!r}" if wanted else "name a split"
        raise UserError(f"{name}: {lacks}; it has {', '.join(splits) or 'none'}: {base}:CONFIG:SPLIT")
    return found[0]
