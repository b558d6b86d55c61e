"""`CIPO_KERNELS=triton` trains: two steps of the embedded job, interpreted, give the metrics of `torch`."""

import json
import math
from pathlib import Path

import cipo_kernels.lm_head.row_kernel as row_kernel
import pytest
import torch

from cipo_fast.train import main

SMALL = [
    "model.embedded.hidden=32", "model.embedded.mlp=48", "model.embedded.warm_accuracy=0.01", "data.task=add",
    "rollout.prompts_per_step=2", "rollout.samples_per_prompt=2", "rollout.max_tokens=4", "eval.problems=2",
    "eval.samples=2", "loss.entropy_coef=0.01", "run.trackers=[]", "run.view=plain", "train.steps=2",
]  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's test")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of masked lanes
def test_two_steps_match_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks, token_loss = [], row_kernel.token_loss
    monkeypatch.setattr(row_kernel, "token_loss", lambda *args: chunks.append(1) or token_loss(*args))
    warm = tmp_path / "warm_start"  # shared, so that both train the same model
    warm.mkdir()
    runs = {}
    for impl in ("torch", "triton"):
        monkeypatch.setenv("CIPO_KERNELS", impl)
        folder = tmp_path / impl
        folder.mkdir()
        (folder / "warm_start").symlink_to(warm)
        assert main([*SMALL, f"run.dir={folder}"]) == 0
        assert bool(chunks) == (impl == "triton")
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        runs[impl] = [
            {k: math.nan if v is None else v for k, v in row.items() if not k.startswith(("time/", "memory/"))}
            for row in rows
        ]
    assert len(runs["torch"]) == 2
    assert all(row["grad/norm"] > 1e-3 for row in runs["torch"])  # there is something to learn
    for actual, expected in zip(runs["triton"], runs["torch"], strict=True):
        assert actual == pytest.approx(expected, rel=1e-5, abs=1e-5, nan_ok=True)
