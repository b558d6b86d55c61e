"""Process group, and the collectives the loop needs. One process is a group of one: the same code runs.

What can fail on one rank alone is done in `together`: it fails on every rank or on none. A rank that fails elsewhere,
between the collectives of an update, leaves at once; the others notice at their next collective, and leave too.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, NoReturn, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from cipo_fast.errors import (
    Ending,
    EngineFailure,
    PolicyBroken,
    Preempted,
    RankFailure,
    TrainingStopped,
    UserError,
)

if TYPE_CHECKING:
    from cipo_fast.config import Config

T = TypeVar("T")
# A message is all there is to them. What is derived stands before what it is derived from.
OURS = (PolicyBroken, RankFailure, TrainingStopped, Preempted, UserError, EngineFailure)
START_TIMEOUT = timedelta(minutes=5)  # for the other ranks to start
WAIT_TO_ASK_S = 2.0  # for the other ranks to end with the same error


@contextmanager
def process_group(timeout_s: float = 1800.0) -> Iterator[DeviceMesh]:
    """The mesh of all ranks, from torchrun's environment or a group of one; closed at the end.

    `timeout_s` is the longest wait of one rank for another. Raises UserError where the environment names no group, or
    the ranks do not find each other, and TrainingStopped when another rank is gone. An error that leaves it on several
    ranks is marked `told` on all of them but one."""
    place = _environment()
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(_device_of_rank())
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    store, rank, world = _meet() if place is not None else (dist.HashStore(), 0, 1)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timedelta(seconds=timeout_s))
    try:
        yield init_device_mesh("cuda" if cuda else "cpu", (world,))
        dist.barrier()  # no rank takes the group down while another still works (the first writes files last)
    except (Ending, KeyboardInterrupt) as error:
        error.told = not _first_to_tell(store, error)  # type: ignore[union-attr]
        if isinstance(error, Preempted):
            dist.barrier()  # all ranks have it: none leaves before another, which torchrun would take for a failure
        raise
    except RuntimeError as error:
        if not _from_a_collective(error):
            raise
        gone = TrainingStopped(
            f"another rank has ended, or did not answer for {timeout_s:g} s (run.rank_timeout_s); what it printed says "
            "why, and the newest checkpoint is the state to go on from"
        )
        gone.told = not _first_to_tell(store, gone)
        raise gone from None
    finally:
        if dist.get_world_size() == 1 or sys.exc_info()[0] is None:  # else others are not where they could take part
            dist.destroy_process_group()


@contextmanager
def prepared_group(prepare: Callable[[], Config]) -> Iterator[tuple[DeviceMesh, Config]]:
    """The process group and the config that `prepare` made on this rank before it. Where that raised UserError on one
    rank, all ranks raise it: none waits for a rank that will not come."""
    made, error = None, None
    try:
        made = prepare()
    except UserError as found:
        error = found
    with process_group(made.run.rank_timeout_s if made is not None else 1800.0) as mesh:
        raise_together(error)
        assert made is not None
        yield mesh, made


def starts_first() -> bool:
    """Whether this process is the first rank, or alone; to be asked before there is a group."""
    return (os.environ.get("RANK") or "0") == "0"


def _environment() -> tuple[int, int] | None:
    """(rank, world size) as torchrun says them, None for a process alone; raises UserError."""
    if not os.environ.get("RANK"):  # an empty one is none, as the other names are not set when empty
        return None
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    hint = "start with torchrun, or unset RANK for a single process"
    missing = [name for name in names if not os.environ.get(name)]
    if missing:
        raise UserError(f"RANK={os.environ['RANK']} is set in the environment, {missing[0]} is not: {hint}")
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", "LOCAL_RANK"):
        if not re.fullmatch(r"[0-9]{1,9}", os.environ.get(name) or "0"):
            raise UserError(f"{name}={os.environ[name]} in the environment is no whole number: {hint}")
    rank, world, port = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    if rank >= world:
        raise UserError(f"RANK={rank} in the environment is not below WORLD_SIZE={world}: {hint}")
    if not 1 <= port <= 65535:
        raise UserError(f"MASTER_PORT={port} in the environment is no port: {hint}")
    return rank, world


def _device_of_rank() -> int:
    local, devices = int(os.environ.get("LOCAL_RANK") or 0), torch.cuda.device_count()
    if local >= devices:
        error = UserError(f"LOCAL_RANK={local}, but this node has {devices} GPUs: torchrun --nproc-per-node={devices}")
        error.told = local > devices  # by the first rank without one
        raise error
    return local


def _meet() -> tuple[dist.Store, int, int]:
    """The store that all ranks share, this one's rank and their number."""
    try:
        store, rank, world = next(dist.rendezvous("env://", timeout=START_TIMEOUT))
    except (dist.DistError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        address = f"MASTER_ADDR={os.environ['MASTER_ADDR']} MASTER_PORT={os.environ['MASTER_PORT']}"
        raise UserError(
            f"{address}: the ranks do not find each other ({reason}); does every rank run, is the port free?"
        ) from None
    if os.environ.get("LOCAL_WORLD_SIZE") == str(world):
        # On one node torchrun keeps the store over its restarts: without a name for each, a rank that is faster than
        # another reads where that one was before it was killed.
        store = dist.PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    return store, rank, world


def _first_to_tell(store: dist.Store, error: BaseException) -> bool:
    """True on one of the ranks that have this error. Asks no other rank: it may be gone."""
    name = hashlib.sha256(f"{type(error).__name__}: {error}".encode(errors="replace")).hexdigest()
    try:
        first = store.add(f"told/{name}", 1) == 1
        _wait_for_others(store)
        return first
    except RuntimeError:  # the store went with the rank or the launcher that held it
        return True


def _wait_for_others(store: dist.Store) -> None:
    """The first rank may hold the store, which ends with it: it stays a moment for those that are about to ask."""
    asked, deadline = store.add("asked", 1), time.monotonic() + WAIT_TO_ASK_S
    while dist.get_rank() == 0 and asked < dist.get_world_size() and time.monotonic() < deadline:
        time.sleep(0.01)
        asked = store.add("asked", 0)


def _from_a_collective(error: RuntimeError) -> bool:
    """Of a peer that is gone or silent: gloo has no exception type of its own, but its file in every message."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def leave(code: int) -> NoReturn:
    """End this process at once, all files being closed. The interpreter's own way out is not safe: a gloo thread that
    frees a tensor meanwhile aborts the process, its work done (seen under load; pytorch/pytorch#179291)."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # nobody reads it any more, or it was closed
            stream.flush()
    os._exit(code)


def leave_after(command: Callable[[], int]) -> NoReturn:
    """`leave` with what `command` returns; an exception is printed, and ends the process as fast: the interpreter would
    first join a thread that waits for a rank, which waits for this one."""
    try:
        code = command()
    except BaseException:
        traceback.print_exc()
        code = 1
    leave(code)


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


def together(act: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """`act()` on every rank, each its own. What one raises, all raise: what one cannot go on with, none may."""
    result: T | None = None
    error: Exception | None = None
    try:
        result = act()
    except Exception as failure:
        error = failure
    raise_together(error, group)
    return cast(T, result)


def on_main(act: Callable[[], T], group: dist.ProcessGroup | None = None) -> T | None:
    """`act()` on the first rank, whose exception all raise; None on the others. Files, servers: what there is once."""
    return together(lambda: act() if is_main() else None, group)


def from_main(act: Callable[[], T]) -> T:
    """What `act()` returns on the first rank, on every rank; pickled on its way."""
    return cast(T, told(on_main(act)))


def told(value: T) -> T:
    """The first rank's value, on every rank."""
    values = [value]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(values, src=0)
    return values[0]


def raise_together(error: Exception | None, group: dist.ProcessGroup | None = None) -> None:
    """Raise on every rank if one has an error: the first that a fresh engine would not mend, else the first. One that
    is not ours becomes a RankFailure that names its rank (others' exceptions need not survive a pickle)."""
    message = None if error is None else _message(error)
    messages = [message]
    if dist.get_world_size() > 1:
        messages *= dist.get_world_size()
        dist.all_gather_object(messages, message, group)
    found = [m for m in messages if m is not None]
    if found:
        kind, text = min(found, key=lambda m: m[0] is EngineFailure)
        foreseen = error is None or isinstance(error, OURS)
        raise kind(text) from (error.__cause__ if foreseen and error is not None else error)


def _message(error: Exception) -> tuple[type[Exception], str]:
    for kind in OURS:
        if isinstance(error, kind):
            return kind, str(error)
    rank = f"rank {dist.get_rank()}: " if dist.get_world_size() > 1 else ""
    text = " ".join(str(error).split())[:500]
    return RankFailure, f"{rank}{type(error).__name__}: {text}"
