"""bench/gpu/tree_attention.py at its tiny shapes: every case runs, errors are those of fp16, files are written."""

import importlib.util
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import _registry as registry

SCRIPT = Path(__file__).parents[1] / "bench" / "gpu" / "tree_attention.py"
README = Path(__file__).parents[1] / "kernels" / "README.md"
RATES = Path(__file__).parents[1] / "kernels" / "device_rates.json"
CONFIGS = RATES.with_name("launch_configs.json")


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the script itself is the test there")
def test_smoke(tmp_path):
    pytest.importorskip("triton")
    before = RATES.read_text(encoding="utf-8")
    env = os.environ | {"OUT": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", SCRIPT, "--smoke"]
    records = list(map(json.loads, subprocess.check_output(command, env=env, text=True, timeout=120).splitlines()))

    assert [r for r in records if "error" in r] == []
    checked = {r["implementation"]: r for r in records if r["case"] == "correctness"}
    skipped = {name: r["skipped"] for name, r in checked.items() if "skipped" in r}
    assert skipped == dict.fromkeys(("flash_fa3", "flash_fa4", "flex_flash", "varlen_fa3", "varlen_fa4"), "needs a GPU")
    ran = ("varlen", "cudnn", "triton", "flash", "flex")
    assert [name for name, r in checked.items() if r.get("ok")] == list(ran)
    for name in ran:
        assert ("dq" in checked[name]) == (name != "flex")  # which has no backward on CPU
    timed = {(r["implementation"], r["ragged"]) for r in records if r["case"] == "attention"}
    assert timed == {(name, ragged) for name in ran for ragged in (False, True)}
    layers = {r["implementation"] for r in records if r["case"] == "layer"}
    assert layers == {"linear", "triton", "flash", "varlen", "cudnn"}

    (written,) = tmp_path.glob("cpu-*-tree_attention.json")
    assert json.loads(written.read_text()) == records
    assert json.loads((tmp_path / RATES.name).read_text())["cpu"] == records[-1]["rates"]
    assert RATES.read_text(encoding="utf-8") == before


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the script itself is the test there")
def test_smoke_of_a_sweep(tmp_path):
    """Every kernel at its default and at two other configurations; the fastest is kept, in $OUT alone."""
    pytest.importorskip("triton")
    before = CONFIGS.read_text(encoding="utf-8")
    env = os.environ | {"OUT": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", SCRIPT, "--smoke", "--sweep"]
    records = list(map(json.loads, subprocess.check_output(command, env=env, text=True, timeout=120).splitlines()))
    tried = [r for r in records if r["what"] == "sweep"]
    kernels = [f"tree_attention_{kernel}_d64" for kernel in ("forward", "dq", "dkdv")]
    assert [r["kernel"] for r in tried] == [kernel for kernel in kernels for _ in range(3)]
    assert all(r["ok"] and r["ms"] > 0 for r in tried)
    written = json.loads((tmp_path / CONFIGS.name).read_text())["cpu"]
    assert written.pop("source").keys() == {"tree_attention.py"}
    assert written == {r["kernel"]: r["config"] for r in records if r["what"] == "fastest"}
    assert CONFIGS.read_text(encoding="utf-8") == before


@pytest.fixture(scope="module")
def bench():
    pytest.importorskip("triton")
    spec = importlib.util.spec_from_file_location("bench_gpu_tree_attention", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_name_activates_its_flash_attention(bench, monkeypatch):
    """Only while its case runs: the others, and what results are checked against, are FlashAttention-2's."""
    active = []
    handle = SimpleNamespace(remove=lambda: active.append("removed"))
    for version in ("FA3", "FA4"):
        register = partial(lambda version: (active.append(version), handle)[1], version)
        monkeypatch.setitem(registry._FLASH_ATTENTION_IMPLS, version, register)
    for name in ("triton", "flash", "varlen", "cudnn", "flex_flash"):
        with bench.flash_attention(name):
            assert torch.nn.attention.current_flash_attention_impl() is None
    for name, version in (("flash_fa3", "FA3"), ("varlen_fa4", "FA4")):
        with bench.flash_attention(name):
            assert torch.nn.attention.current_flash_attention_impl() == version
        assert torch.nn.attention.current_flash_attention_impl() is None
    assert active == ["FA3", "removed", "FA4", "removed"]


def test_what_is_wrong_is_reported_and_not_timed(bench, monkeypatch):
    def forgets_the_first_token(job):
        attention = bench.ATTENTIONS["cudnn"](job)
        return lambda q, k, v: attention(q, k, torch.cat((0 * v[:1], v[1:])))

    attentions = {"flash": bench.ATTENTIONS["flash"], "varlen": forgets_the_first_token, "cudnn": bench.cudnn}
    monkeypatch.setattr(bench, "ATTENTIONS", attentions)
    tiny = {"P": 40, "G": 2, "R": 16, "F": 1, "K": 2, "I": 8}
    shape = bench.SMOKE | {"check": tiny, "tree": {k: n for k, n in tiny.items() if k != "R"}, "R": (16,)}
    records = list(bench.run_cases(shape))
    assert [r for r in records if "error" in r] == []
    assert {r["implementation"]: r["ok"] for r in records if "ok" in r} == {
        "flash": True, "varlen": False, "cudnn": True
    }  # fmt: skip
    assert {r["implementation"] for r in records if "ok" not in r} == {"flash", "cudnn", "linear"}


def test_layers_come_before_what_compiles_long(bench, monkeypatch):
    """And at the time limit everything that is left says so."""
    clock = iter(range(1000))
    monkeypatch.setattr(bench, "missing", lambda name: None)
    monkeypatch.setattr(bench, "run_case", lambda *_: {"ok": True})
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: bench.START + next(clock)))
    monkeypatch.setattr(bench, "LIMIT_S", 63)  # cases
    names = (*bench.ROWS, *bench.OURS)
    shape = {"R": (2, 1)}
    records = list(bench.run_cases(shape))
    order = [("correctness", name, None, None) for name in names]
    for R in shape["R"]:
        order += [("attention", name, R, True) for name in names]
        order += [("layer", name, R, None) for name in ("linear", *names)]
    found = [(r["case"], r["implementation"], r.get("R"), r.get("ragged")) for r in records]
    assert found[: len(order)] == order
    assert {r["case"] for r in records[len(order) :]} == {"attention", "correctness"}
    flex = [r["implementation"] for r in records].index("flex")
    assert all(r["implementation"].startswith("flex") for r in records[flex:])
    late = [i for i, r in enumerate(records) if "error" in r]
    assert late == list(range(64, len(records))) != []
    assert records[-1]["error"] == "not run: 63 s were over"


def test_a_sweep_is_saved_after_each_kernel(bench, monkeypatch):
    saved = []
    monkeypatch.setattr(bench, "sweep", lambda kernel, *_: iter([kernel]))
    monkeypatch.setattr(bench, "save", lambda *_: saved.append(len(saved)))
    assert [len(saved) for _ in bench.sweep_cases(bench.SMOKE, smoke=True)] == [0, 1, 2]
    assert len(saved) == 3


def test_readme_holds_the_predictions(bench):
    assert set(bench.predictions()) <= set(README.read_text(encoding="utf-8").splitlines())


def test_bytes_of_the_merge(bench):
    """Of one tree: a prompt of 20 and two answers of 5, the first of them corrected twice."""
    job = bench.Job(P=20, G=2, R=5, F=1, K=2, I=1)
    q, kv, lse = 2 * 4 * 16, 2 * 2 * 16, 4 * 4  # bytes of a row
    T, below_prompt, below_answer = 20 + 5 + 1 + 2 * 5 + 5, 21, 10  # one range each: nothing is gathered
    parts, keys = T + below_prompt + below_answer, T + 20 + 6
    rows = 4 * T * 2
    assert bench.merge_bytes({"hq": 4, "hkv": 2, "d": 16}, job) == (
        (parts + T) * (q + lse) + rows,
        (parts + T) * q + 2 * (keys + T) * kv + 2 * (parts - T) * lse + 3 * rows,
    )
    of_two = bench.Job(P=20, G=2, R=5, F=2, K=2, I=1)  # the queries below two answers, and these, are two ranges
    forward, _ = bench.merge_bytes({"hq": 4, "hkv": 2, "d": 16}, of_two)
    T, parts, gathered_q, gathered_k = 20 + 2 * (5 + 1 + 10), 20 + 3 * 32 - 2 * 6, 2 * 10, 2 * 6
    assert forward == (parts + T) * (q + lse) + 4 * T * 2 + 2 * gathered_q * q + 2 * 2 * gathered_k * kv


def test_what_is_missing_is_named(bench, monkeypatch):
    monkeypatch.setattr(bench, "DEVICE", "cuda")
    monkeypatch.setattr(bench, "PACKAGES", bench.PACKAGES | {"fa4": "torch"})
    assert bench.missing("varlen_fa4") is None
    assert bench.missing("triton") is bench.missing("cudnn") is None
    assert bench.missing("flash_fa3") == "needs the package flash_attn_interface, which is not installed"
    assert bench.missing("flex_flash") == "needs the package flash_attn.cute, which is not installed"


@pytest.mark.parametrize("q_block", [128, 256])
def test_block_masks_hide_nothing_visible_and_show_nothing_hidden(bench, q_block):
    tree = bench.Job(P=200, G=2, R=150, F=1, K=2, I=30).tree
    tokens = 256 * -(-tree.num_tokens // 256)
    mask = bench.block_mask(tree, tokens, q_block)
    see = torch.zeros(tokens, tokens, dtype=torch.bool)
    see[: tree.num_tokens, : tree.num_tokens] = tree.dense_mask()
    blocks = see.unflatten(0, (-1, q_block)).unflatten(2, (-1, 128))
    count, index = mask.kv_num_blocks[0, 0], mask.kv_indices[0, 0]
    full_count, full_index = mask.full_kv_num_blocks[0, 0], mask.full_kv_indices[0, 0]
    for i in range(tokens // q_block):
        partial_blocks = set(index[i, : count[i]].tolist())
        full_blocks = set(full_index[i, : full_count[i]].tolist())
        assert not partial_blocks & full_blocks
        for j in range(tokens // 128):
            assert blocks[i, :, j].any() <= (j in partial_blocks | full_blocks)
            assert (j in full_blocks) <= blocks[i, :, j].all()
