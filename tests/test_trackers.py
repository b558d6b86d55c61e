"""TensorBoard and Weights & Biases, real ones: what they hold after a run, and after one that went on."""

import gzip
import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_train import SMALL, metrics, run_dir

from cipo_fast.config import load_config
from cipo_fast.errors import UserError
from cipo_fast.trackers import WANDB_RUN, check_trackers
from cipo_fast.train import main


def leveldb_records(log: bytes) -> Iterator[bytes]:
    """Of a .wandb file: LevelDB's log format behind 7 bytes of a header. Blocks of 32 KiB; a piece has a checksum (4
    bytes), a length (2) and a kind (1 whole, 2 first, 3 middle, 4 last); a block's last 6 bytes or fewer are empty."""
    at, pieces = 7, b""
    while at + 7 <= len(log):
        if (left := -at % 32768) and left < 7:
            at += left
        size, kind = struct.unpack_from("<HB", log, at + 4)
        pieces += log[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):
            yield pieces
            pieces = b""


def test_wandb_offline_has_every_step_and_evaluation(
    tmp_path: Path, warm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = run_dir(tmp_path, warm)
    args = [*SMALL, f"run.dir={folder}", "run.trackers=[wandb]", "eval.problems=4", "checkpoint.every=1"]
    assert main([*args, "train.steps=1"]) == 0
    name = (folder / WANDB_RUN).read_text()
    assert main([*args, "train.steps=2", "checkpoint.resume=true", "checkpoint.allow_changes=true"]) == 0
    assert (folder / WANDB_RUN).read_text() == name
    assert not (folder / "tensorboard").exists()

    rows = []
    for file in sorted((folder / "wandb").glob(f"offline-run-*-{name}/*.wandb")):
        for data in leveldb_records(file.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(data)
            if record.WhichOneof("record_type") == "history":
                rows.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item})
    for row in metrics(folder):
        [logged] = [r for r in rows if r.get("_step") == row["step"] and "rollout/accuracy" in r]
        assert logged["rollout/accuracy"] == row["rollout/accuracy"]
    assert {r["_step"] for r in rows if "eval/t1" in r} == {0, 1, 2}


def test_wandb_that_is_not_installed_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"run.trackers: wandb is not installed; `pip install -e .\[wandb\]`"):
        check_trackers(load_config([], ["run.trackers=[wandb]"]))
    check_trackers(load_config([], []))


def test_a_profiled_step_is_a_chrome_trace(tmp_path: Path, warm: Path) -> None:
    folder = run_dir(tmp_path, warm)
    assert main([*SMALL, f"run.dir={folder}", "run.profile_step=2", "eval.problems=4"]) == 0
    [file] = folder.glob("profile-step-*.json.gz")
    assert file.name == "profile-step-2.json.gz"
    names = {event.get("name") for event in json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]}
    assert {"aten::mm", "cipo_kernels::linear_cipo_loss"} <= names
