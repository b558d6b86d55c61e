"""Supervised first steps for the embedded model: enough for RL to have right and wrong attempts to learn from.

The same packs, fused loss and optimiser step as RL, with a cross-entropy weight on every target. They stop by their
number and by accuracy, never by the clock: a seed is the same start on a busy machine and on a quiet one.
"""

from __future__ import annotations

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
from cipo_fast.embedded.tasks.task import NearMiss, Start
from cipo_fast.engines import twin_of
from cipo_fast.learner import Learner
from cipo_fast.packing import build_trees, make_pack, pack_trees
from cipo_fast.policy import build_policy, cost_model
from cipo_fast.records import Anchor, Conversation, Rollout, Segment
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
    near_miss: NearMiss,
    start: Start,
    check: Callable[[], None],
) -> dict[str, Tensor]:
    """`model` brought to what `start` asks for in greedy accuracy on training problems, right attempts kept and wrong
    ones mended, or through its steps: the weights, on every rank. A collective. Every problem has an answer, which is
    imitated. `check` may end it between steps: a collective, too."""
    limit = config.rollout.max_tokens
    twin = twin_of(model, mesh.device_type, torch.float32)
    bare = LocalEngine(twin, chat.end_ids(None), chat.tokenizer.pad_token_id, config.rollout.batch_sequences)
    engine = SupervisedEngine(bare, 0, note)
    sampler = Sampler(engine, chat, config.seed, judges)
    cost = cost_model(model.config, model.num_parameters())
    policy = build_policy(model, config, mesh)
    learner = Learner(policy, OptimConfig(lr=config.model.embedded.warm_lr, warmup_steps=20), start.steps)
    correct = CorrectionPrompts(chat, config.correction)
    examples = Examples(prompts[CHECK_PROBLEMS:] or prompts, correct, start, near_miss, config.seed)
    batch = config.model.embedded.warm_batch
    started = time.perf_counter()
    step, accuracy, kept, mended = 0, 0.0, 0.0, 0.0

    def there() -> bool:
        return accuracy >= start.accuracy and kept >= start.kept and mended >= start.mended

    while not there() and step < start.steps:
        for _ in range(CHECK_EVERY if accuracy < start.accuracy / 2 else CHECK_EVERY // 2):
            trees = build_trees(examples.batch(batch, step))
            bins = pack_trees(trees, config.train.pack_tokens, cost, dist.get_world_size())
            learner.update([make_pack(members) for members in bins[dist.get_rank()]], step)
            step += 1
        engine.sync(policy.full_weights(), 0)
        greedy = sampler.groups(prompts[:CHECK_PROBLEMS], 1, Sampling(0.0, 1.0, limit), 0, "warm")
        accuracy = float(np.mean([g.rollouts[0].reward for g in greedy]))
        said = ""
        if start.own or start.kept or start.mended:
            attempts = own_attempts(sampler, examples, limit, config.seed, step)
            examples.own = [anchor.rollout for anchor in attempts if not anchor.right]
            kept, mended = (mean_correction(attempts, right) for right in (True, False))
            said = f", right attempts kept {kept:.3f}, wrong ones corrected {mended:.3f}"
        seconds = time.perf_counter() - started
        note(f"warm start: {step} supervised steps, greedy accuracy {accuracy:.3f}{said}, {seconds:.0f}s")
        check()
    if accuracy < start.accuracy:
        asked = f"model.embedded.warm_accuracy={start.accuracy}"
        note(
            f"warm start: its steps are over, and {accuracy:.3f} is below {asked}; it compares with each row's answer: "
            "where several are right, see `before training`. If that is near 0, too: easier or shorter answers, or a "
            "model of your own"
        )
    return {name: tensor.clone() for name, tensor in policy.full_weights()}


def own_attempts(sampler: Sampler, examples: Examples, limit: int, seed: int, step: int) -> list[Anchor]:
    """Attempts of the policy as it is, one a problem, each corrected once, all at T=1."""
    rng = np.random.default_rng(seed_for(seed, step, "warm-own"))
    asked = [examples.prompts[i] for i in rng.permutation(len(examples.prompts))[:CHECK_PROBLEMS]]
    sampling = Sampling(1.0, 1.0, limit)
    anchors = []
    for g, group in enumerate(sampler.groups(asked, 1, sampling, step, "warm-own")):
        rollout = group.rollouts[0]
        prompt = None if rollout.truncated else examples.correct(rollout)
        if prompt is not None:
            anchors.append(Anchor(rollout, g, 0, *prompt))
    sampler.correct(anchors, 1, sampling, step, "warm-correct")
    return anchors


def mean_correction(anchors: list[Anchor], right: bool) -> float:
    """Accuracy of the corrections of the right or the wrong ones; 0 where there are none."""
    rewards = [r.reward for anchor in anchors if anchor.right == right for r in anchor.corrections]
    return float(np.mean(rewards)) if rewards else 0.0


class Examples:
    """Supervised batches: answers to bare prompts, and corrections of attempts: right ones, which are to be kept, the
    half-trained policy's own wrong ones, and near misses. Targets are right answers."""

    def __init__(self, prompts: list[Prompt], correct: CorrectionPrompts, start: Start, near_miss: NearMiss, seed: int):
        self.prompts = prompts
        self.correct = correct
        self.start = start
        self.near_miss = near_miss
        self.seed = seed
        self.own: list[Rollout] = []  # wrong attempts of the policy, of some steps ago

    def batch(self, n: int, step: int) -> list[Conversation]:
        rng = np.random.default_rng(seed_for(self.seed, step, "warm"))
        examples = [self._example(rng, plain=i < round(self.start.plain * n)) for i in range(n)]
        weight = 1.0 / sum(len(answer) for _, answer in examples)
        return [
            Conversation((*context, Segment(answer)), None, "rollout", 0.0, 0.0, weight) for context, answer in examples
        ]

    def _example(self, rng: np.random.Generator, plain: bool) -> tuple[tuple[Segment, ...], list[int]]:
        """(context, the tokens to be learned)."""
        prompt = self.prompts[rng.integers(len(self.prompts))]
        attempt = None if plain else self._attempt(prompt, rng)
        problem = prompt.problem if attempt is None else attempt.problem
        shown = None if attempt is None else self.correct(attempt)
        answer = self.correct.chat.answer(problem.answer)
        if attempt is None or shown is None:  # what is too long to be shown is a plain problem
            return (Segment(prompt.token_ids if attempt is None else attempt.prompt_ids),), answer
        prompt_ids, glue_ids = shown
        if glue_ids is None:
            return (Segment(prompt_ids),), answer
        return (Segment(prompt_ids), Segment(attempt.token_ids), Segment(glue_ids)), answer

    def _attempt(self, prompt: Prompt, rng: np.random.Generator) -> Rollout:
        right, own = rng.random(2) < (self.start.right, self.start.own)
        if self.own and own and not right:
            return self.own[rng.integers(len(self.own))]
        problem = prompt.problem
        text = problem.answer if right else self.near_miss(problem.messages[-1]["content"], problem.answer, rng)
        ids = self.correct.chat.answer(text)
        return Rollout(problem, prompt.token_ids, ids, [], text, float(text == problem.answer), False, 0)
