"""Launch configurations: those measured on a device, from launch_configs.json, and the kernels' own for all others."""

import json

import pytest
import torch
from cipo_kernels import launch_configs as file
from cipo_kernels.lm_head import gemm_tiles, row_kernel
from cipo_kernels.lm_head.head import make_head

attention = pytest.importorskip("cipo_kernels.tree_attention.launch")


@pytest.fixture
def write(monkeypatch, tmp_path):
    """Writes the configurations of this device, and of another."""
    monkeypatch.setattr(file, "CONFIGS_FILE", tmp_path / "launch_configs.json")

    def write(entry):
        file.CONFIGS_FILE.write_text(json.dumps({"cpu": entry, "Some GPU": {"exp_gemm": {"m": 32}}}))
        file.launch_configs.cache_clear()

    yield write
    file.launch_configs.cache_clear()


def tiles_of(kernel):
    return gemm_tiles.launch(kernel, torch.zeros(40, 8), torch.zeros(300, 8))


def test_an_entry_changes_the_launch_of_its_kernel_alone(write):
    write({})
    default = tiles_of("exp_gemm")
    assert default.options["BLOCK_M"] == gemm_tiles.POINTER_TILES.m
    write({"exp_gemm": {"n": 64, "group": 3, "warps": 4}, "source": {"a test": "today"}})
    changed = tiles_of("exp_gemm")
    assert changed.options == default.options | {"BLOCK_N": 64, "GROUP_M": 3, "num_warps": 4}
    assert changed.column_tiles == 5
    assert tiles_of("logp_gemm").options == default.options


def test_an_entry_changes_the_blocks_of_rows(write):
    head = make_head(torch.zeros(2, 8), torch.zeros(30, 8), None, torch.arange(2), torch.arange(2), None, None)
    write({"row_kernel": {"columns": 512}})
    arguments = row_kernel._arguments(head, 0)
    assert (arguments["BLOCK_V"], arguments["num_warps"]) == (512, row_kernel.BLOCK.warps)


def test_an_entry_changes_attentions_tiles_for_its_head_dims(write):
    write({"tree_attention_dkdv_d128": {"step": 16, "num_stages": 5}})
    q = torch.zeros(3, 1, 128, dtype=torch.bfloat16)
    default = attention.INTERPRETER_CONFIG
    assert attention._config("dkdv", q) == default._replace(step=16, num_stages=5)
    assert attention._config("dkdv", q[..., :64]) == attention._config("dq", q) == default
    assert attention._config("dkdv", q.float()) == default  # measured in bf16


MALFORMED = [{"m": 0}, {"m": 64.0}, {"m": "64"}, {"m": True}, {"height": 64}, [64], 64]


@pytest.mark.parametrize("entry", MALFORMED, ids=json.dumps)
def test_a_malformed_entry_is_refused(write, entry):
    write({"exp_gemm": entry})
    with pytest.raises(ValueError, match=r"expected positive integers for some of m, n, k, warps, stages, group$") as e:
        tiles_of("exp_gemm")
    assert f"launch_configs.json: exp_gemm of 'cpu' is {json.dumps(entry)}" in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("entry", [{"tma": 1}, {"own": 256}, {"step": 128}, {"own": 96}])
def test_attention_refuses_what_its_lists_are_not_made_for(write, entry):
    """Steps longer than a masked tile, or a program for more than a tile, would leave tokens out."""
    write({"tree_attention_forward_d64": entry})
    with pytest.raises(ValueError, match="tree_attention_forward_d64"):
        attention._config("forward", torch.zeros(3, 1, 64, dtype=torch.bfloat16))


def test_what_is_measured_names_kernels_that_there_are():
    kernels = {"exp_gemm", "logp_gemm", "row_kernel", "source"}
    kernels |= {f"tree_attention_{kernel}_d{d}" for kernel in attention.KERNELS for d in (64, 128)}
    for entry in json.loads(file.CONFIGS_FILE.read_text(encoding="utf-8")).values():
        assert entry.keys() <= kernels
