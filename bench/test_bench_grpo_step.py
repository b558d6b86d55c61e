"""A whole GRPO step (sample 32 x 8, learn) of the embedded job, against TRL's GRPOTrainer on the same model and task.

`pytest bench/ --benchmark-only -k grpo_step`; skips where trl is not installed. Blocks of steps alternate between
the two in one process, so both see the same machine; the figure to read is `ours / trl` in extra_info.
"""

import statistics
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from cipo_fast.checkpoint import Progress
from cipo_fast.cipo.replay import ReplayState
from cipo_fast.config import load_config
from cipo_fast.distributed import process_group
from cipo_fast.embedded.model import embedded_tokenizer, new_model
from cipo_fast.embedded.prepare import prepare
from cipo_fast.embedded.problems import embedded_problems
from cipo_fast.train import Run, build, cipo_step
from cipo_fast.view import View

BLOCKS, STEPS = 5, 8  # blocks of each side, steps a block


def our_run(tmp_path: Path, mesh, open_engine: ExitStack) -> Run:
    # An entropy bonus, however small, keeps answers without an advantage in the step: TRL leaves none out.
    fair = "loss.entropy_coef=1e-9"
    config = load_config(["grpo.yaml"], [f"run.dir={tmp_path}", "data.task=sort", "model.embedded.warm_steps=0", fair])
    with View("plain", 1, "", quiet=True) as view:
        return build(prepare(config, mesh, view.note), mesh, view, open_engine)[0]


def trl_trainer(tmp_path: Path):
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    config = load_config(["grpo.yaml"], [])
    problems, _ = embedded_problems(config.data.task, config.seed, config.held_out)
    data = Dataset.from_list([{"prompt": list(p.messages), "answer": p.answer} for p in problems])

    def reward(completions, answer, **_):
        return [float(c[0]["content"].strip() == a) for c, a in zip(completions, answer, strict=True)]

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_step_begin(self, *_args, **_kwargs):
            self.started = time.perf_counter()

        def on_step_end(self, *_args, **_kwargs):
            self.seconds.append(time.perf_counter() - self.started)

    b, g = config.rollout.prompts_per_step, config.rollout.samples_per_prompt
    arguments = GRPOConfig(
        output_dir=str(tmp_path / "trl"), use_cpu=True, bf16=False, fp16=False, report_to=[], disable_tqdm=True,
        logging_strategy="no", save_strategy="no", gradient_checkpointing=False, max_steps=STEPS,
        per_device_train_batch_size=b * g, num_generations=g, max_completion_length=config.rollout.max_tokens,
        learning_rate=config.optim.lr, lr_scheduler_type="constant", beta=0.0, temperature=1.0, max_grad_norm=1.0,
        loss_type="dapo", epsilon=config.loss.eps_low, epsilon_high=config.loss.eps_high,
    )  # fmt: skip
    clock = Clock()
    trainer = GRPOTrainer(
        model=new_model(config, "sdpa"), reward_funcs=reward, args=arguments, train_dataset=data,
        processing_class=embedded_tokenizer(), callbacks=[clock],
    )  # fmt: skip
    return trainer, clock


def test_grpo_step_against_trl(benchmark, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("trl")
    with process_group() as mesh, ExitStack() as open_engine:
        run = our_run(tmp_path, mesh, open_engine)
        trainer, clock = trl_trainer(tmp_path)
        ours: list[float] = []
        progress = Progress(0, ReplayState(0.3))
        for block in range(BLOCKS + 1):
            for _ in range(STEPS):
                metrics, batch, progress, _ = cipo_step(run, progress)
                assert sum(len(group.rollouts) for group in batch.groups) == 256
                assert metrics["train/skipped"] == 0
                ours.append(metrics["time/step_s"])
            trainer.train()
            if block == 0:  # warm-up
                ours.clear()
                clock.seconds.clear()
        torch.testing.assert_close(metrics["rollout/sampler_gap_max"], 0.0, atol=1e-4, rtol=0)
        mine, theirs = statistics.median(ours), statistics.median(clock.seconds)
        benchmark.extra_info.update(ours_s=mine, trl_s=theirs, ratio=mine / theirs, steps=len(ours))
        with capsys.disabled():
            print(f"\nGRPO step ({len(ours)}): ours {mine:.3f} s, TRL {theirs:.3f} s, ours / TRL {mine / theirs:.2f}")

        def step() -> None:
            nonlocal progress
            progress = cipo_step(run, progress)[2]

        benchmark.pedantic(step, rounds=5)
    assert mine <= theirs
