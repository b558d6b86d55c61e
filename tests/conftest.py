"""Shared by all tests: one process group of one, fixed threads, small configs."""

from collections.abc import Iterator

import pytest
import torch

from cipo_fast.config import Config, load_config


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    torch.set_num_threads(1)  # results do not depend on how many cores the machine has


@pytest.fixture(scope="session")
def mesh() -> Iterator[object]:
    """The mesh of a process group of one, as the trainer makes it."""
    from cipo_fast.distributed import process_group

    with process_group() as mesh:
        yield mesh


@pytest.fixture
def config() -> Config:
    """The embedded default, smaller."""
    return load_config([], ["model.embedded.hidden=32", "model.embedded.mlp=48", "rollout.prompts_per_step=4"])
