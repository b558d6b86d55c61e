"""Process group, and the two collectives the loop needs. One process is a group of one: the same code runs."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import NoReturn, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from cipo_fast.errors import TrainingStopped, UserError

T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)  # a rank may wait this long for another one's longest rollout
START_TIMEOUT = timedelta(minutes=5)  # ... and this long for the other ranks to start


@contextmanager
def process_group() -> Iterator[DeviceMesh]:
    """The mesh of all ranks, from torchrun's environment or a group of one; closed at the end.

    An error that leaves it on several ranks is marked `told` on all of them but one. Raises UserError where the
    environment names no group, or the ranks do not find each other."""
    place = _environment()
    if torch.cuda.is_available():
        torch.cuda.set_device(_device_of_rank())
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    store, rank, world = _meet() if place is not None else (dist.HashStore(), 0, 1)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=TIMEOUT)
    try:
        yield init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (world,))
        dist.barrier()  # no rank takes the group down while another still works (the first writes files last)
    except (UserError, TrainingStopped, KeyboardInterrupt) as error:
        error.told = not _first_to_tell(store, error)  # type: ignore[union-attr]
        raise
    finally:
        dist.destroy_process_group()


@contextmanager
def prepared_group(prepare: Callable[[], T]) -> Iterator[tuple[DeviceMesh, T]]:
    """The process group and what `prepare` made on this rank before it. Where that raised UserError on one rank, all
    ranks raise it: none waits for a rank that will not come."""
    made, error = None, None
    try:
        made = prepare()
    except UserError as found:
        error = found
    with process_group() as mesh:
        raise_together(error)
        yield mesh, cast(T, made)


def starts_first() -> bool:
    """Whether this process is the first rank, or alone; to be asked before there is a group."""
    return os.environ.get("RANK", "0") == "0"


def _environment() -> tuple[int, int] | None:
    """(rank, world size) as torchrun says them, None for a process alone; raises UserError."""
    if "RANK" not in os.environ:
        return None
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    hint = "start with torchrun, or unset RANK for a single process"
    missing = [name for name in names if not os.environ.get(name)]
    if missing:
        raise UserError(f"RANK={os.environ['RANK']} is set in the environment, {missing[0]} is not: {hint}")
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", "LOCAL_RANK"):
        if not re.fullmatch(r"[0-9]{1,9}", os.environ.get(name, "0")):
            raise UserError(f"{name}={os.environ[name]} in the environment is no whole number: {hint}")
    rank, world, port = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    if rank >= world:
        raise UserError(f"RANK={rank} in the environment is not below WORLD_SIZE={world}: {hint}")
    if not 1 <= port <= 65535:
        raise UserError(f"MASTER_PORT={port} in the environment is no port: {hint}")
    return rank, world


def _device_of_rank() -> int:
    local, devices = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if local >= devices:
        error = UserError(f"LOCAL_RANK={local}, but this node has {devices} GPUs: torchrun --nproc-per-node={devices}")
        error.told = local > devices  # by the first rank without one
        raise error
    return local


def _meet() -> tuple[dist.Store, int, int]:
    """The store that all ranks share, this one's rank and their number."""
    try:
        return next(dist.rendezvous("env://", timeout=START_TIMEOUT))
    except (dist.DistError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        address = f"MASTER_ADDR={os.environ['MASTER_ADDR']} MASTER_PORT={os.environ['MASTER_PORT']}"
        raise UserError(
            f"{address}: the ranks do not find each other ({reason}); does every rank run, is the port free?"
        ) from None


def _first_to_tell(store: dist.Store, error: BaseException) -> bool:
    """True on one of the ranks that have this error. Asks no other rank: it may be gone."""
    name = hashlib.sha256(f"{type(error).__name__}: {error}".encode(errors="replace")).hexdigest()
    try:
        return store.add(f"told/{name}", 1) == 1
    except RuntimeError:  # the store went with the rank or the launcher that held it
        return True


def leave(code: int) -> NoReturn:
    """End this process at once, all files being closed. The interpreter's own way out is not safe: a gloo thread that
    frees a tensor meanwhile aborts the process, its work done (seen under load; pytorch/pytorch#179291)."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # nobody reads it any more, or it was closed
            stream.flush()
    os._exit(code)


def is_main() -> bool:
    return dist.get_rank() == 0


def share(items: Sequence[T]) -> Sequence[T]:
    """This rank's share of `items`; `gather` undoes it."""
    return items[dist.get_rank() :: dist.get_world_size()]


def gather(mine: list[T], group: dist.ProcessGroup | None = None) -> list[T]:
    """All ranks' shares, in the order `share` took them from."""
    world = dist.get_world_size()
    if world == 1:
        return mine
    parts: list[list[T]] = [[] for _ in range(world)]
    dist.all_gather_object(parts, mine, group)
    total = sum(len(part) for part in parts)
    return [parts[i % world][i // world] for i in range(total)]


def raise_together(error: Exception | None, group: dist.ProcessGroup | None = None) -> None:
    """Raise the first rank's error on every rank: what one cannot go on with, none may."""
    errors: list[Exception | None] = [error]
    if dist.get_world_size() > 1:
        errors *= dist.get_world_size()
        dist.all_gather_object(errors, error, group)
    for found in errors:
        if found is not None:
            raise found
