"""How good a policy is on held-out problems, alone and as its own corrector.

On its own: `python -m cipo_fast.evaluate model.path=FOLDER [configs/x.yaml ...] [key.path=value ...]`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager

import numpy as np
import torch

from cipo_fast.chat import Chat
from cipo_fast.cipo.metrics import VERDICTS, batch_metrics, verdict_shares
from cipo_fast.cipo.prompts import CorrectionPrompts
from cipo_fast.config import Config, parse_args
from cipo_fast.distributed import is_main, leave_after, prepared_group, starts_first
from cipo_fast.engines import build_engine, fit_to_engine, fit_to_model
from cipo_fast.errors import UserError, command, put
from cipo_fast.marking import build_judges, failures_of, refuse_failures
from cipo_fast.model import cast_weights, load_model, load_shape, load_tokenizer
from cipo_fast.records import Anchor, Group
from cipo_fast.rollout import Sampling
from cipo_fast.run_dir import check_writable
from cipo_fast.sampling import Prompt, Sampler, encode_dataset, fitting
from cipo_fast.tasks import Dataset, load_held_out, quiet
from cipo_fast.try_out import prepare_judges
from cipo_fast.view import Terminal, evaluation_table

Evaluation = dict[str, float | None]


def evaluate(
    sampler: Sampler,
    prompts: Sequence[Prompt],
    correct: CorrectionPrompts,
    config: Config,
    pause: Callable[[], None] = lambda: None,
) -> Evaluation:
    """greedy, t1 and pass_at_k accuracy; wrong_to_right and right_to_wrong rates of corrections of one T=1 attempt a
    problem; correction_gap, the former minus the accuracy of fresh retries (the problem's other samples). Where another
    verifier than exact match judges, the shares of its other verdicts on the T=1 answers. Answers that nobody could
    judge are left out and counted as `failed`, `answers` being those that were judged; too many are a TrainingStopped.
    `pause` is called between the parts: it may raise to end the evaluation."""
    k, most = config.eval.samples, config.verify.max_failed
    greedy = sampler.groups(prompts, 1, Sampling(0.0, 1.0, config.eval.max_tokens), 0, "eval-greedy")
    refuse_failures(failures_of(greedy), len(greedy), most)
    pause()
    sampling = Sampling(1.0, 1.0, config.eval.max_tokens)
    groups = sampler.groups(prompts, k, sampling, 0, "eval")
    refuse_failures(failures_of(groups), k * len(groups), most)
    pause()
    failures = failures_of([*greedy, *groups])
    groups = [group for group in groups if group.rollouts]
    anchors, corrections = first_attempts(groups, correct), min(k, 4)
    sampler.correct(anchors, corrections, sampling, 0, "eval-correct")
    refuse_failures(failures_of([], anchors), corrections * len(anchors), most)
    failures += failures_of([], anchors)
    sampler.take_times()
    anchors = [anchor for anchor in anchors if anchor.corrections]
    return results(greedy, groups, anchors, k) | _judged(greedy, groups, anchors, failures)


def results(greedy: list[Group], groups: list[Group], anchors: list[Anchor], k: int) -> Evaluation:
    metrics = batch_metrics(groups, anchors, None)
    return {
        "greedy": float(np.mean([r.reward for g in greedy for r in g.rollouts])),
        "t1": metrics["rollout/accuracy"],
        f"pass_at_{k}": float(np.mean([any(r.reward for r in g.rollouts) for g in groups])),
        "wrong_to_right": metrics["correction/wrong_to_right"],
        "right_to_wrong": metrics["correction/right_to_wrong"],
        "correction_gap": metrics["correction/gap"],
    }


def _judged(greedy: list[Group], groups: list[Group], anchors: list[Anchor], failures: list[str]) -> Evaluation:
    """What there is to say of the judges."""
    found: Evaluation = {}
    sampled = [r for group in groups for r in group.rollouts]
    if any(r.problem.verifier != "exact" for r in sampled):
        shares = verdict_shares(sampled)
        found |= {verdict: shares[f"verify/{verdict}"] for verdict in VERDICTS if verdict != "right"}
    if failures:
        judged = sum(len(g.rollouts) for g in (*greedy, *groups)) + sum(len(a.corrections) for a in anchors)
        found |= {"answers": judged, "failed": len(failures)}
    return found


def first_attempts(groups: list[Group], correct: CorrectionPrompts) -> list[Anchor]:
    """The first rollout of every group as an anchor, where it is complete and its correction prompt fits."""
    anchors = []
    for g, group in enumerate(groups):
        rollout = group.rollouts[0]
        prompt = None if rollout.truncated else correct(rollout)
        if prompt is not None:
            anchors.append(Anchor(rollout, g, 0, *prompt))
    return anchors


def main(argv: Sequence[str] | None = None) -> int:
    """The command: prints the table for `model.path`. Exit codes as train.py's."""
    return command(lambda: run(sys.argv[1:] if argv is None else argv))


def run(args: Sequence[str]) -> None:
    def prepare() -> Config:
        config = parse_args(args)
        if config.model.path == "embedded":
            raise UserError(
                "model.path=embedded has no weights to evaluate: name a folder, such as runs/embedded/model"
            )
        if config.rollout.engine != "local" and starts_first():
            check_writable(config.run_dir)  # vLLM starts from a folder in it
        return config

    with prepared_group(prepare) as (mesh, config):
        result = evaluate_model(config, mesh.device_type)
        if is_main():
            Terminal().print(evaluation_table(result))


def evaluate_model(config: Config, device: str) -> Evaluation:
    """`evaluate` of the weights in `model.path`, on the config's held-out problems, by the config's engine."""
    with sampler_of(config, device) as (sampler, prompts, fitted):
        return evaluate(sampler, prompts, CorrectionPrompts(sampler.chat, fitted.correction), fitted)


@contextmanager
def sampler_of(config: Config, device: str) -> Iterator[tuple[Sampler, list[Prompt], Config]]:
    """A sampler from the weights in `model.path`, the prompts of the config's held-out problems, and the config as it
    fits model and engine; ended with the context. A collective."""
    say = put if is_main() else quiet
    problems = load_held_out(config, say)
    with ExitStack() as opened:
        judges = opened.enter_context(build_judges(config, say))
        prepare_judges(judges, problems)
        chat = Chat(load_tokenizer(config), config.data)
        _, prompts = encode_dataset(Dataset([], problems), chat, config, say)
        chat.refuse_beyond(load_shape(config).get_text_config().vocab_size)
        model = load_model(config, "sdpa")
        config = config.model_copy(deep=True)
        config.rollout.max_tokens = min(
            config.rollout.max_tokens, config.eval.max_tokens
        )  # nothing longer is asked for
        config = fit_to_model(config, model.config, say)
        say(f"an answer ends with {chat.names(chat.end_ids(model.generation_config))}")
        engine = opened.enter_context(closing(build_engine(config, model, chat, device, say)))
        config = fit_to_engine(config, engine, say)
        prompts = fitting(prompts, config.data.max_prompt_tokens, "held-out problems", say)

        def publish(version: int) -> None:
            engine.sync(cast_weights(model, getattr(torch, config.model.dtype)), version)

        engine.publish = publish
        publish(0)
        yield Sampler(engine, chat, config.seed, judges), prompts, config


if __name__ == "__main__":
    leave_after(main)
