"""Supervised first steps for the embedded model: enough for RL to have right and wrong attempts to learn from.

The same packs, fused loss and optimiser step as RL, with a cross-entropy weight on every target. The result is cached
in the run directory, so a second run starts at once.
"""

from __future__ import annotations

import hashlib
import string
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedTokenizerBase

from cipo_fast.cipo.prompts import CorrectionPrompts
from cipo_fast.config import Config, OptimConfig
from cipo_fast.distributed import is_main
from cipo_fast.errors import UserError
from cipo_fast.learner import Learner
from cipo_fast.packing import CostModel, build_trees, make_pack, pack_trees
from cipo_fast.policy import Policy
from cipo_fast.records import Conversation, Rollout, Segment
from cipo_fast.rollout import Sampling
from cipo_fast.sampling import Prompt, Sampler, seed_for
from cipo_fast.sync import WeightSync

CHECK_EVERY = 10
CHECK_PROBLEMS = 256
Report = Callable[[int, float, float], None]  # steps done, greedy accuracy, seconds


def warm_start(
    policy: Policy,
    prompts: list[Prompt],
    correct: CorrectionPrompts,
    sampler: Sampler,
    sync: WeightSync,
    config: Config,
    cost: CostModel,
    report: Report,
) -> None:
    """Bring `policy` to `warm_accuracy` greedy accuracy (or `warm_seconds`), or load where an earlier run got to."""
    cache = cache_file(config)
    if cache.is_file():
        load_weights(policy, load_file(cache))
        return
    shape = config.model.embedded
    limit = config.rollout.max_tokens
    if all(len(answer_ids(correct.tokenizer, p.problem.answer)) > limit for p in prompts):
        raise UserError(f"every answer is longer than rollout.max_tokens={limit}: raise it (and eval.max_tokens)")
    examples = Examples(prompts[CHECK_PROBLEMS:] or prompts, correct, config.seed)
    optim = OptimConfig(lr=shape.warm_lr, warmup_steps=20)
    learner = Learner(policy, optim, total_updates=10**6)
    sampling = Sampling(0.0, 1.0, limit)
    started = time.perf_counter()
    step, accuracy, elapsed = 0, 0.0, 0.0
    while accuracy < shape.warm_accuracy and elapsed < shape.warm_seconds:
        for _ in range(CHECK_EVERY if accuracy < shape.warm_accuracy / 2 else CHECK_EVERY // 2):
            trees = build_trees(examples.batch(shape.warm_batch, step))
            bins = pack_trees(trees, config.train.pack_tokens, cost, dist.get_world_size())
            learner.update([make_pack(members) for members in bins[dist.get_rank()]], step)
            step += 1
        sync.publish(0)
        greedy = sampler.groups(prompts[:CHECK_PROBLEMS], 1, sampling, 0, "warm")
        accuracy = float(np.mean([g.rollouts[0].reward for g in greedy]))
        elapsed = _same_on_all_ranks(time.perf_counter() - started)
        report(step, accuracy, elapsed)
    weights = {name: tensor.clone() for name, tensor in policy.full_weights()}
    if is_main():
        cache.parent.mkdir(parents=True, exist_ok=True)
        unfinished = cache.with_suffix(".part")
        save_file(weights, unfinished)
        unfinished.rename(cache)


class Examples:
    """Supervised batches: one plain problem in four, else the correction of an attempt made by corrupting the answer
    (one attempt in four is left right). Targets are right answers."""

    def __init__(self, prompts: list[Prompt], correct: CorrectionPrompts, seed: int):
        self.prompts = prompts
        self.correct = correct
        self.seed = seed

    def batch(self, n: int, step: int) -> list[Conversation]:
        rng = np.random.default_rng(seed_for(self.seed, step, "warm"))
        chosen = [self.prompts[i] for i in rng.integers(len(self.prompts), size=n)]
        contexts = [
            (Segment(p.token_ids),) if i % 4 == 0 else self._correction_context(p, rng) for i, p in enumerate(chosen)
        ]
        answers = [answer_ids(self.correct.tokenizer, p.problem.answer) for p in chosen]
        weight = 1.0 / sum(map(len, answers))
        return [
            Conversation((*context, Segment(answer)), None, "rollout", 0.0, 0.0, weight)
            for context, answer in zip(contexts, answers, strict=True)
        ]

    def _correction_context(self, prompt: Prompt, rng: np.random.Generator) -> tuple[Segment, ...]:
        text = corrupt(prompt.problem.answer, rng) if rng.random() < 0.75 else prompt.problem.answer
        reward = float(text == prompt.problem.answer)
        ids = answer_ids(self.correct.tokenizer, text)
        attempt = Rollout(prompt.problem, prompt.token_ids, ids, [], text, reward, False, 0)
        shown = self.correct(attempt)
        if shown is None:  # too long to be corrected: a plain problem then
            return (Segment(prompt.token_ids),)
        prompt_ids, glue_ids = shown
        return (Segment(prompt_ids),) if glue_ids is None else (Segment(prompt_ids), Segment(ids), Segment(glue_ids))


def answer_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """An answer as the policy would sample it: its tokens and the end of turn."""
    return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def corrupt(answer: str, rng: np.random.Generator) -> str:
    """One to six edits, such as a half-trained model makes: two characters swapped, one replaced by one of its kind,
    or one lost and another doubled. Few edits alone would teach to copy the attempt."""
    characters = list(answer)
    for _ in range(rng.integers(1, 7)):
        i, j = rng.integers(len(characters), size=2)
        edit = rng.integers(3)
        if edit == 0:
            characters[i], characters[j] = characters[j], characters[i]
        elif edit == 1:
            kind = string.digits if characters[i].isdigit() else string.ascii_lowercase
            characters[i] = kind[rng.integers(len(kind))]
        else:
            doubled = characters[j]
            del characters[i]
            characters.insert(min(j, len(characters)), doubled)
    return "".join(characters)


def load_weights(policy: Policy, weights: dict[str, Tensor]) -> None:
    """Copy whole tensors into the (sharded) parameters."""
    for name, parameter in policy.model.named_parameters():
        value = weights[name].to(parameter.device)
        if isinstance(parameter, DTensor):
            value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
        with torch.no_grad():
            parameter.copy_(value)


def _same_on_all_ranks(seconds: float) -> float:
    value = torch.tensor(seconds)
    dist.broadcast(value, 0)
    return value.item()


def cache_file(config: Config) -> Path:
    """In the run directory, named by all that the warm-started weights depend on."""
    file = config.data.train.stat() if config.data.train else None
    key = [
        config.seed,
        config.model.embedded,
        config.data,
        file and (file.st_size, file.st_mtime_ns),
        config.rollout.max_tokens,
        config.correction.model_dump(include={"layout", "followup", "verdict", "max_prompt_tokens"}),
    ]
    digest = hashlib.sha256(repr(key).encode()).hexdigest()[:12]
    return config.run_dir / "warm_start" / f"{digest}.safetensors"
