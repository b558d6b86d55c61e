"""Shared by all tests: Triton's interpreter where there is no GPU, one thread, one process group."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which any of the tests' imports may do


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    torch.set_num_threads(1)  # results do not depend on how many cores the machine has


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory that holds warm starts; runs on the same model link to them, those of both workers too."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "warm"
    (folder / "warm_start").mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def mesh() -> Iterator[object]:
    """The mesh of a process group of one, as the trainer makes it."""
    from cipo_fast.distributed import process_group

    with process_group() as mesh:
        yield mesh


@pytest.fixture
def bfloat16_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels compute in bf16 as they will on a GPU, interpreted too."""
    if not torch.cuda.is_available():
        from interpreted_bfloat16 import as_on_a_gpu

        as_on_a_gpu(monkeypatch)
