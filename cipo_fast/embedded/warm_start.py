"""Supervised first steps for the embedded model: enough for RL to have right and wrong attempts to learn from.

The same packs, fused loss and optimiser step as RL, with a cross-entropy weight on every target. They stop by their
number and by accuracy, never by the clock: a seed is the same start on a busy machine and on a quiet one.
"""

from __future__ import annotations

import string
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from cipo_fast.chat import Chat
from cipo_fast.cipo.prompts import CorrectionPrompts
from cipo_fast.config import Config, OptimConfig
from cipo_fast.engines import twin_of
from cipo_fast.learner import Learner
from cipo_fast.packing import build_trees, make_pack, pack_trees
from cipo_fast.policy import build_policy, cost_model
from cipo_fast.records import Conversation, Rollout, Segment
from cipo_fast.rollout import Sampling
from cipo_fast.rollout.local import LocalEngine
from cipo_fast.rollout.supervised import SupervisedEngine
from cipo_fast.sampling import Prompt, Sampler, seed_for
from cipo_fast.verify.workers.pool import Judges

CHECK_EVERY = 10
CHECK_PROBLEMS = 256


def warm_start(
    model: PreTrainedModel,
    chat: Chat,
    prompts: list[Prompt],
    config: Config,
    mesh: DeviceMesh,
    note: Callable[[str], None],
    judges: Judges,
) -> dict[str, Tensor]:
    """`model` brought to `warm_accuracy` greedy accuracy on training problems, or through `warm_steps` steps: its
    weights, on every rank. A collective. The problems are of exact answers, which are imitated."""
    shape, limit = config.model.embedded, config.rollout.max_tokens
    twin = twin_of(model, mesh.device_type, torch.float32)
    bare = LocalEngine(twin, chat.end_ids(None), chat.tokenizer.pad_token_id, config.rollout.batch_sequences)
    engine = SupervisedEngine(bare, 0, note)
    sampler = Sampler(engine, chat, config.seed, judges)
    cost = cost_model(model.config, model.num_parameters())
    policy = build_policy(model, config, mesh)
    learner = Learner(policy, OptimConfig(lr=shape.warm_lr, warmup_steps=20), shape.warm_steps)
    correct = CorrectionPrompts(chat, config.correction)
    examples = Examples(prompts[CHECK_PROBLEMS:] or prompts, correct, config.seed)
    started = time.perf_counter()
    step, accuracy = 0, 0.0
    while accuracy < shape.warm_accuracy and step < shape.warm_steps:
        for _ in range(CHECK_EVERY if accuracy < shape.warm_accuracy / 2 else CHECK_EVERY // 2):
            trees = build_trees(examples.batch(shape.warm_batch, step))
            bins = pack_trees(trees, config.train.pack_tokens, cost, dist.get_world_size())
            learner.update([make_pack(members) for members in bins[dist.get_rank()]], step)
            step += 1
        engine.sync(policy.full_weights(), 0)
        greedy = sampler.groups(prompts[:CHECK_PROBLEMS], 1, Sampling(0.0, 1.0, limit), 0, "warm")
        accuracy = float(np.mean([g.rollouts[0].reward for g in greedy]))
        seconds = time.perf_counter() - started
        note(f"warm start: {step} supervised steps, greedy accuracy {accuracy:.3f}, {seconds:.0f}s")
    return {name: tensor.clone() for name, tensor in policy.full_weights()}


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
        answers = [self.correct.chat.answer(p.problem.answer) for p in chosen]
        weight = 1.0 / sum(map(len, answers))
        return [
            Conversation((*context, Segment(answer)), None, "rollout", 0.0, 0.0, weight)
            for context, answer in zip(contexts, answers, strict=True)
        ]

    def _correction_context(self, prompt: Prompt, rng: np.random.Generator) -> tuple[Segment, ...]:
        text = corrupt(prompt.problem.answer, rng) if rng.random() < 0.75 else prompt.problem.answer
        reward = float(text == prompt.problem.answer)
        ids = self.correct.chat.answer(text)
        attempt = Rollout(prompt.problem, prompt.token_ids, ids, [], text, reward, False, 0)
        shown = self.correct(attempt)
        if shown is None:  # too long to be corrected: a plain problem then
            return (Segment(prompt.token_ids),)
        prompt_ids, glue_ids = shown
        return (Segment(prompt_ids),) if glue_ids is None else (Segment(prompt_ids), Segment(ids), Segment(glue_ids))


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
