"""Shared by all tests: one process group of one, fixed threads, small configs."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    torch.set_num_threads(1)  # results do not depend on how many cores the machine has


@pytest.fixture(scope="module")
def mesh() -> Iterator[object]:
    """The mesh of a process group of one, as the trainer makes it."""
    from cipo_fast.distributed import process_group

    with process_group() as mesh:
        yield mesh
