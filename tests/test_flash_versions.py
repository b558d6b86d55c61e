"""Which FlashAttention is activated on which GPU, by what is installed."""

import sys
from pathlib import Path

import pytest
import torch
from cipo_kernels.tree_attention import flash_versions


@pytest.mark.parametrize(
    ("packages", "major", "version"),
    [
        ([], 9, "FA2"),
        (["flash_attn_interface.py"], 9, "FA3"),
        (["flash_attn_interface.py"], 10, "FA2"),  # it has kernels for Hopper alone
        (["flash_attn/cute/__init__.py"], 10, "FA4"),
        (["flash_attn/cute/__init__.py"], 9, "FA4"),
        (["flash_attn/__init__.py"], 10, "FA2"),  # FlashAttention-2's own package
        (["flash_attn_interface.py", "flash_attn/cute/__init__.py"], 9, "FA3"),
        (["flash_attn_interface.py", "flash_attn/cute/__init__.py"], 8, "FA2"),
    ],
)
def test_the_newest_that_is_installed_and_fits(
    packages: list[str], major: int, version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in packages:
        (tmp_path / package).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / package).touch()
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    monkeypatch.setattr("sys.path_importer_cache", {})
    for name in ("flash_attn", "flash_attn.cute", "flash_attn_interface"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert flash_versions.newest_flash_attention(major) == version


def test_torch_knows_their_names() -> None:
    assert set(flash_versions.VERSIONS) <= set(torch.nn.attention.list_flash_attention_impls())
