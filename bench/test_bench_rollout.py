"""Sampling and syncing, engine against engine: transformers' generate, vLLM in this process, a vLLM server.

`pytest bench/ --benchmark-only -k rollout`; without vLLM the local engine alone. The engines take turns in one process,
with the same weights, prompts and lengths, after the log-probs of each were compared with a plain forward pass. What to
read is in extra_info, by engine: tokens/s and their ratio to the local engine's, seconds of a sync in all and per GB,
the probe's share of a step, and the share of prompt tokens that the prefix cache had.
"""

import importlib.util
import socket
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch

from cipo_fast.checkpoint import Progress
from cipo_fast.cipo.replay import ReplayState
from cipo_fast.config import load_config
from cipo_fast.distributed import process_group
from cipo_fast.embedded.model import new_model
from cipo_fast.embedded.prepare import prepare
from cipo_fast.records import Completion
from cipo_fast.rollout import Engine, Sampling, SyncReport
from cipo_fast.train import Run, build, cipo_step
from cipo_fast.view import View

VLLM = importlib.util.find_spec("vllm") is not None
ENGINES = ("local", "vllm", "vllm_server") if VLLM else ("local",)
ROUNDS = 5
B, G, P, R, GLUE = 8, 8, 80, 48, 16  # prompts, their samples; tokens of a prompt, of an answer, of a follow-up turn
SAMPLING = Sampling(temperature=1.0, top_p=1.0, max_tokens=R)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Run]]:
    """One a module: vLLM's engine cannot be built twice in a process."""
    with ExitStack() as stack:
        mesh = stack.enter_context(process_group())
        yield {name: build_run(name, tmp_path_factory.mktemp(name), mesh, stack) for name in ENGINES}


def build_run(engine: str, folder: Path, mesh, stack: ExitStack) -> Run:
    """The embedded job, as it starts without a warm start."""
    overrides = [f"run.dir={folder}", f"rollout.engine={engine}", "data.task=sort", "model.embedded.warm_steps=0"]
    overrides += ["rollout.vllm.max_model_len=512", "rollout.vllm.cpu_kv_gib=0.5"]
    if engine == "vllm_server":
        overrides += ["rollout.server.start=true", f"rollout.server.port={free_port()}"]
    view = stack.enter_context(View("plain", 1, "", quiet=True))
    return build(prepare(load_config([], overrides), mesh, view.note), mesh, view, stack)[0]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def random_prompts(round_: int) -> list[list[int]]:
    return np.random.default_rng(round_).integers(5, 261, size=(B, P)).tolist()


def follow_up(prompts: list[list[int]], answers: list[list[Completion]]) -> list[list[int]]:
    """Every prompt's first answer, shown back."""
    glue = list(range(5, 5 + GLUE))
    return [prompt + found[0].token_ids + glue for prompt, found in zip(prompts, answers, strict=True)]


def check_log_probs(run: Run, prompts: list[list[int]], answers: list[list[Completion]]) -> None:
    """Against a plain forward pass of the policy's weights, every answer alone."""
    model = new_model(run.config, "sdpa").eval()
    for name, tensor in run.learner.policy.full_weights():
        model.get_parameter(name).data.copy_(tensor)
    with torch.no_grad():
        for prompt, completions in zip(prompts, answers, strict=True):
            assert len(completions) == G
            for c in completions:
                logits = model(torch.tensor([prompt + c.token_ids])).logits[0, len(prompt) - 1 : -1]
                expected = logits.log_softmax(-1).gather(1, torch.tensor(c.token_ids)[:, None])[:, 0]
                torch.testing.assert_close(torch.tensor(c.logps), expected, atol=1e-4, rtol=0)


def tokens_of(answers: list[list[Completion]]) -> int:
    return sum(len(c.token_ids) for completions in answers for c in completions)


def timed_generate(engine: Engine, prompts: list[list[int]], seed: int) -> tuple[list[list[Completion]], float]:
    started = time.perf_counter()
    answers = engine.generate(prompts, G, SAMPLING, seed)
    return answers, time.perf_counter() - started


def hit_rate(before: tuple[int, int], after: tuple[int, int]) -> float | None:
    looked_up = after[0] - before[0]
    return (after[1] - before[1]) / looked_up if looked_up else None


def test_generate(benchmark, runs: dict[str, Run], capsys: pytest.CaptureFixture[str]) -> None:
    """Rollouts, then corrections of one attempt a prompt."""
    speeds: dict[str, list[float]] = {name: [] for name in runs}
    hits: dict[str, dict[str, float | None]] = {}
    for round_ in range(ROUNDS + 1):
        for name, run in runs.items():
            engine = run.sampler.engine
            start = engine.prefix_cache()
            prompts = random_prompts(round_)
            answers, seconds = timed_generate(engine, prompts, round_)
            rollouts_only = engine.prefix_cache()
            contexts = follow_up(prompts, answers)
            corrections, more = timed_generate(engine, contexts, -round_ - 1)
            if round_ == 0:  # warm-up
                check_log_probs(run, prompts, answers)
                check_log_probs(run, contexts, corrections)
                hits[name] = {
                    "rollouts": hit_rate(start, rollouts_only),
                    "rollouts and corrections": hit_rate(start, engine.prefix_cache()),
                }
                continue
            speeds[name].append((tokens_of(answers) + tokens_of(corrections)) / (seconds + more))
    medians = {name: statistics.median(found) for name, found in speeds.items()}
    ratios = {
        name: statistics.median(a / b for a, b in zip(found, speeds["local"], strict=True))
        for name, found in speeds.items()
    }
    benchmark.extra_info.update(tokens_per_s=medians, over_local=ratios, prefix_hit_rate=hits)
    with capsys.disabled():
        for name, speed in medians.items():
            print(f"\n{name}: {speed:,.0f} tokens/s, {ratios[name]:.2f} x local; prefix hits {hits[name]}", end="")
        print()
    benchmark.pedantic(lambda: runs[ENGINES[-1]].sampler.engine.generate(random_prompts(0), G, SAMPLING, 0), rounds=3)
    for name in ENGINES[1:]:
        rollouts, both = hits[name].values()
        assert 0.5 < rollouts <= 1  # seven of eight samples find two blocks of their prompt: 64 of 80 tokens
        assert both > rollouts  # a correction finds its attempt, too


def test_sync_and_probe(benchmark, runs: dict[str, Run], capsys: pytest.CaptureFixture[str]) -> None:
    """Whole CIPO steps of the embedded job, each with its sync and probe; then syncs alone."""
    steps: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    syncs: dict[str, list[SyncReport]] = {name: [] for name in runs}
    progress = {name: Progress(0, ReplayState(0.3)) for name in runs}
    for _ in range(ROUNDS + 1):
        for name, run in runs.items():
            metrics, _, progress[name], _ = cipo_step(run, progress[name])
            assert metrics["train/skipped"] == 0
            assert (metrics["sync/parity_mean_abs"] or 0.0) <= 1e-5  # None where no probe was due
            steps[name].append(metrics)
    for i in range(ROUNDS + 1):
        for name, run in runs.items():
            syncs[name].append(run.sampler.engine.sync(run.learner.policy.full_weights(), 100 + i))
    found = {name: summary(steps[name][1:], syncs[name][1:]) for name in runs}  # the first of each is a warm-up
    benchmark.extra_info.update(found)
    with capsys.disabled():
        for name, f in found.items():
            print(
                f"\n{name}: sync {1000 * f['sync_s']:.1f} ms ({f['sync_s_per_gb']:.1f} s/GB), probe "
                f"{f['probe_share']:.2%} of a step of {f['step_s']:.2f} s",
                end="",
            )
        print()
    last = runs[ENGINES[-1]]
    benchmark.pedantic(lambda: last.sync.publish(200), rounds=3)


def summary(steps: list[dict[str, float]], syncs: list[SyncReport]) -> dict[str, float]:
    """Medians."""
    return {
        "sync_s": statistics.median(report.seconds for report in syncs),
        "sync_s_per_gb": statistics.median(1e9 * report.seconds / report.bytes for report in syncs),
        "probe_share": sum(m["time/probe_s"] for m in steps) / sum(m["time/step_s"] for m in steps),
        "step_s": statistics.median(m["time/step_s"] for m in steps),
    }
