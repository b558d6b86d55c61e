"""Runs made by hand, as training writes them, for the report's tests."""

import json
from pathlib import Path
from typing import Any

from cipo_fast.config import load_config
from cipo_fast.evaluation.figures import figures
from cipo_fast.evaluation.records import SAMPLES, Answer, Chain, Record

HOSTILE = (
    "<script>window.pwned = 1</script><img src=x onerror='window.pwned = 2'></script>"
    "\u202eevil\u202c \x1b[31mred\x1b[0m nul\x00 \u2028line\u200b & \ud800 {{x}} @SCRIPT@ \u2066"
)


def answer(text: str, right: bool, **more: Any) -> dict[str, Any]:
    """As the recorder writes one."""
    verdict = "right" if right else "wrong"
    about = {"why": "" if right else "not the answer", "prompt_tokens": 5, "tokens": len(text), "truncated": False}
    return {"text": text, "reward": float(right), "verdict": verdict, **about, "policy_version": 0, **more}


def tokens(text: str) -> dict[str, Any]:
    """One a character."""
    logps = [-0.5 * (i % 5) for i in range(len(text))]
    shifted = {"trainer_logps": [v + 0.01 for v in logps], "entropies": [0.3] * len(text)}
    return {"token_texts": list(text), "sampler_logps": logps, **shifted}


def problem(name: str, first: str = "1 2", corrected: str = "1 3", source: str = "a") -> list[dict[str, Any]]:
    """Two attempts, a wrong and a right one; the wrong one has two corrections, the first of them right."""
    asked = {"problem": name, "prompt": f"what is {name}?", "answer": "1 3", "source": source}
    wrong = answer(first, False, advantage=-0.7, **tokens(first))
    fixed = [answer(corrected, True, advantage=0.7, **tokens(corrected)), answer(first, False, advantage=-0.7)]
    right = answer("1 3", True, advantage=0.7)
    return [{**asked, **wrong, "corrections": fixed}, {**asked, **right, "corrections": None}]


def metrics(step: int, seed: int = 0) -> dict[str, Any]:
    phases = {f"time/{name}_s": 0.1 for name in ("generate", "verify", "old_logp", "train", "sync", "probe", "idle")}
    return {
        "step": step, "seed": seed, "rollout/accuracy": 0.3 + 0.01 * step + 0.01 * seed, "grad/norm": 1.0 / step,
        "correction/wrong_to_right": 0.4, "correction/right_to_wrong": None, "replay/rho": 0.3,
        "rollout/all_entropy": 0.5, "rollout/sampler_gap": 1e-7, "tokens/sampled": 100, "tokens/forwarded": 50,
        "tokens/rows": 200, "flops/sample": 1e9, "flops/train": 2e9, **phases, "time/step_s": 0.7,
        "alarm/no_variance": int(step in (3, 4)), "alarm/mismatch": 0,
    }  # fmt: skip


def record(name: str, right: int) -> Record:
    """`right` of 4 attempts; the greedy answer is right where most are, and a check corrects."""

    def one(good: bool) -> Answer:
        return Answer(f"{name} {good}", 3, float(good), "right" if good else "wrong", False, str(good))

    return Record(name, "a", 4, 1, one(right > 1), [one(i < right) for i in range(4)], [Chain(3, [one(True)])])


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_run(folder: Path, *settings: str, steps: int = 6, rollouts: dict[int, list[Any]] | None = None) -> Path:
    """A run that has ended. `rollouts` are lines by step."""
    config = load_config([], [f"run.name={folder.name}", f"train.steps={steps}", *settings])
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    write_lines(folder / "started.jsonl", [{"date": "2026-11-28 12:00", "torch": "2.13.0", "cpu": "a cpu", "ranks": 1}])
    write_lines(folder / "metrics.jsonl", [metrics(step, config.seed) for step in range(1, steps + 1)])
    held_out = [
        {"id": f"p{i}", "messages": [{"role": "user", "content": f"question {i}"}], "answer": "x"} for i in range(8)
    ]
    write_lines(folder / "held_out.jsonl", held_out)
    rows = []
    for step, right in ((0, 1), (steps, 3)):
        # p0 is lost, p1 to p5 are won, the others stay right
        counts = [4 - right if i == 0 else right if i < 6 else 4 for i in range(8)]
        records = [record(f"p{i}", n) for i, n in enumerate(counts)]
        found = figures(records)
        evaluated = folder / "evaluations" / f"step-{step:05d}"
        evaluated.mkdir(parents=True)
        (evaluated / SAMPLES).write_text("".join(r.line() for r in records), encoding="utf-8")
        intervals = {name: {"value": f.value, "low": f.low, "high": f.high} for name, f in found.items()}
        (evaluated / "results.json").write_text(json.dumps({"figures": intervals}), encoding="utf-8")
        spent = {"tokens/sampled": 100 * step, "flops/total": 0.0, "seconds": 0.7 * step}
        rows.append({"step": step, **spent, **{f"eval/{name}": f.value for name, f in found.items()}})
    write_lines(folder / "eval.jsonl", rows)
    for step, lines in (rollouts or {1: problem("one") + problem("two", source="b"), steps: problem("last")}).items():
        write_lines(folder / "rollouts" / f"step-{step:05d}.jsonl", lines)
    (folder / "summary.json").write_text(json.dumps({"steps": steps}), encoding="utf-8")
    return folder
