"""TensorBoard and Weights & Biases, real ones: what they hold after a run, and after one that went on."""

import gzip
import json
import sys
from pathlib import Path

import pytest
from test_train import SMALL, metrics, run_dir

from cipo_fast.config import load_config
from cipo_fast.errors import UserError
from cipo_fast.trackers import WANDB_RUN, check_trackers
from cipo_fast.train import main


def test_wandb_offline_has_every_step_and_evaluation(
    tmp_path: Path, warm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = run_dir(tmp_path, warm)
    args = [*SMALL, f"run.dir={folder}", "run.trackers=[wandb]", "eval.problems=4", "checkpoint.every=1"]
    assert main([*args, "train.steps=1"]) == 0
    name = (folder / WANDB_RUN).read_text()
    assert main([*args, "train.steps=2"]) == 0  # goes on
    assert (folder / WANDB_RUN).read_text() == name
    assert not (folder / "tensorboard").exists()

    rows = []
    for file in sorted((folder / "wandb").glob(f"offline-run-*-{name}/*.wandb")):
        store = DataStore()
        store.open_for_scan(str(file))
        while (data := store.scan_data()) is not None:
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
