"""Process group, and the collectives the loop needs. One process is a group of one: the same code runs.

What can fail on one rank alone is done in `together`: it fails on every rank or on none. A rank that fails elsewhere,
between the collectives of an update, leaves at once; the others notice at their next collective, and leave too.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import NoReturn, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from cipo_fast.errors import EngineFailure, PolicyBroken, RankFailure, TrainingStopped, UserError

T = TypeVar("T")
OURS = (PolicyBroken, RankFailure, TrainingStopped, UserError, EngineFailure)  # a message is all there is to them


@contextmanager
def process_group(timeout_s: float = 1800.0) -> Iterator[DeviceMesh]:
    """The mesh of all ranks, from torchrun's environment or a group of one; closed at the end.

    `timeout_s` is the longest wait of one rank for another. TrainingStopped when another rank is gone."""
    timeout = timedelta(seconds=timeout_s)
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    try:
        yield init_device_mesh("cuda" if cuda else "cpu", (dist.get_world_size(),))
        dist.barrier()  # no rank takes the group down while another still works (the first writes files last)
    except RuntimeError as error:
        if not _from_a_collective(error):
            raise
        raise TrainingStopped(
            f"another rank has ended, or did not answer for {timeout_s:g} s (run.rank_timeout_s); what it printed says "
            "why, and the newest checkpoint is the state to go on from"
        ) from None
    finally:
        if dist.get_world_size() == 1 or sys.exc_info()[0] is None:  # else others are not where they could take part
            dist.destroy_process_group()


def _from_a_collective(error: RuntimeError) -> bool:
    """Of a peer that is gone or silent: gloo has no exception type of its own, but its file in every message."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def leave(code: int) -> NoReturn:
    """End this process at once, all files being closed. The interpreter's own way out is not safe: a gloo thread that
    frees a tensor meanwhile aborts the process, its work done (seen under load; pytorch/pytorch#179291)."""
    sys.stdout.flush()
    sys.stderr.flush()
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
