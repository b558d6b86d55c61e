"""Process group, and the two collectives the loop needs. One process is a group of one: the same code runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import NoReturn, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from cipo_fast.errors import TrainingStopped, UserError

T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)  # a rank may wait this long for another one's longest rollout


@contextmanager
def process_group() -> Iterator[DeviceMesh]:
    """The mesh of all ranks, from torchrun's environment or a group of one; closed at the end."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    if "RANK" in os.environ:
        store, rank, world = next(dist.rendezvous("env://", timeout=TIMEOUT))
        if os.environ.get("LOCAL_WORLD_SIZE") == str(world):
            # On one node torchrun keeps the store over its restarts: without a name for each, a rank that is faster
            # than another reads where that one was before it was killed.
            store = dist.PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=TIMEOUT)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=TIMEOUT)
    try:
        yield init_device_mesh("cuda" if cuda else "cpu", (dist.get_world_size(),))
        dist.barrier()  # no rank takes the group down while another still works (the first writes files last)
    finally:
        dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """End this process at once, all files being closed. The interpreter's own way out is not safe: a gloo thread that
    frees a tensor meanwhile aborts the process, its work done (seen under load; pytorch/pytorch#179291)."""
    sys.stdout.flush()
    sys.stderr.flush()
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


def on_main(action: Callable[[], T]) -> T:
    """What `action` returns, run by the first rank alone; an error of whatever kind is raised on every rank, so that
    none waits for one that is gone. Result and error travel pickled."""
    outcome: list[tuple[T | None, Exception | None]] = [(None, None)]
    if is_main():
        try:
            outcome = [(action(), None)]
        except (UserError, TrainingStopped, OSError) as error:
            outcome = [(None, error)]
        except Exception as error:
            if dist.get_world_size() == 1:
                raise
            outcome = [(None, RuntimeError(f"{type(error).__name__}: {error}"))]  # itself it may not pickle
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(outcome, 0)
    result, failure = outcome[0]
    if failure is not None:
        raise failure
    return cast(T, result)
