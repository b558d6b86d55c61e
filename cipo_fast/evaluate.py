"""How good a policy is on held-out problems, alone and as its own corrector.

On its own: `python -m cipo_fast.evaluate model.path=FOLDER [configs/x.yaml ...] [key.path=value ...]`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import closing

import numpy as np
import torch
from rich.console import Console

from cipo_fast.cipo.metrics import batch_metrics
from cipo_fast.cipo.prompts import CorrectionPrompts
from cipo_fast.config import Config, parse_args
from cipo_fast.distributed import is_main, leave, process_group
from cipo_fast.engines import build_engine, fit_to_engine
from cipo_fast.errors import TrainingStopped, UserError
from cipo_fast.model import load_model, load_tokenizer
from cipo_fast.records import Anchor, Group
from cipo_fast.rollout import EngineFailure, Sampling
from cipo_fast.sampling import Prompt, Sampler, encode_prompts
from cipo_fast.tasks import load_dataset
from cipo_fast.view import evaluation_table

Evaluation = dict[str, float | None]


def evaluate(
    sampler: Sampler,
    prompts: Sequence[Prompt],
    correct: CorrectionPrompts,
    config: Config,
    pause: Callable[[], None] = lambda: None,
) -> Evaluation:
    """greedy, t1 and pass_at_k accuracy; wrong_to_right and right_to_wrong rates of corrections of one T=1 attempt a
    problem; correction_gap, the former minus the accuracy of fresh retries (the problem's other samples).
    `pause` is called between the parts: it may raise to end the evaluation."""
    k = config.eval.samples
    greedy = sampler.groups(prompts, 1, Sampling(0.0, 1.0, config.eval.max_tokens), 0, "eval-greedy")
    pause()
    sampling = Sampling(1.0, 1.0, config.eval.max_tokens)
    groups = sampler.groups(prompts, k, sampling, 0, "eval")
    pause()
    anchors = first_attempts(groups, correct)
    sampler.correct(anchors, min(k, 4), sampling, 0, "eval-correct")
    sampler.take_times()
    metrics = batch_metrics(groups, anchors, None)
    return {
        "greedy": float(np.mean([g.rollouts[0].reward for g in greedy])),
        "t1": metrics["rollout/accuracy"],
        f"pass_at_{k}": float(np.mean([any(r.reward for r in g.rollouts) for g in groups])),
        "wrong_to_right": metrics["correction/wrong_to_right"],
        "right_to_wrong": metrics["correction/right_to_wrong"],
        "correction_gap": metrics["correction/gap"],
    }


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
    """The command: prints the table for `model.path`. Exit code 2 for bad input, with one line."""
    try:
        config = parse_args(sys.argv[1:] if argv is None else argv)
        if config.model.path == "embedded":
            raise UserError(
                "model.path=embedded has no weights to evaluate: name a folder, such as runs/embedded/model"
            )
        with process_group() as mesh:
            result = evaluate_model(config, mesh.device_type)
            if is_main():
                Console().print(evaluation_table(result))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (EngineFailure, TrainingStopped) as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 1
    return 0


def evaluate_model(config: Config, device: str) -> Evaluation:
    """`evaluate` of the weights in `model.path`, on the config's held-out problems, by the config's engine."""
    tokenizer = load_tokenizer(config)
    problems = load_dataset(config).held_out
    model = load_model(config, "sdpa")
    with closing(build_engine(config, model, tokenizer, device)) as engine:
        config = fit_to_engine(config, engine)
        prompts = encode_prompts(problems, tokenizer, config.data.max_prompt_tokens, "held-out problems", print)
        dtype = getattr(torch, config.model.dtype)
        engine.sync(((name, parameter.detach().to(dtype)) for name, parameter in model.named_parameters()), 0)
        sampler = Sampler(engine, tokenizer, config.seed)
        return evaluate(sampler, prompts, CorrectionPrompts(tokenizer, config.correction), config)


if __name__ == "__main__":
    leave(main())
