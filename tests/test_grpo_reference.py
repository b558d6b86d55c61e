"""The trainer's gradients against GRPO and CIPO written once more, in plain torch on padded rows.

The reference is written from the formulas and shares no code with the trainer: a stock model with its own attention
and mask, its own log-probs, advantages, importance weights, clipping and normalisers. It takes the rollouts; the
trainer takes them through conversations, trees, packs, the policy and the learner. Compared is every parameter's
gradient as the optimiser gets it, in fp64, update by update.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from cipo_fast.config import Config, load_config
from cipo_fast.learner import Learner
from cipo_fast.policy import ATTENTION, Policy, cost_model
from cipo_fast.records import Anchor, Group, Problem, Rollout
from cipo_fast.train import learn

VOCAB, PAD = 50, 0
TOLERANCE = 1e-6  # of a gradient's largest entry: packs hold advantages and weights in fp32, all else is fp64


# ------------------------------------------------------------------------------------- the reference: padded rows


@dataclass
class Row:
    """One answer: what it was sampled from, its tokens, the sampler's log-probs, and its advantage."""

    context: list[int]
    answer: list[int]
    sampler: list[float]
    advantage: float


@dataclass
class Seen:
    """Tokens that were clipped (from above and from below), and importance weights that were capped or not."""

    above: int = 0
    below: int = 0
    capped: int = 0
    uncapped: int = 0
    dual: int = 0  # tokens of a negative advantage beyond the dual clip
    weights: list[float] = field(default_factory=list)  # of N-step


def padded(values: Sequence[Sequence[float]], fill: float, **kwargs: Any) -> Tensor:
    width = max(map(len, values))
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in values], **kwargs)


def log_probs(model: PreTrainedModel, rows: list[Row], temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probs, entropies, mask of sampled tokens), each [rows, width - 1]; column t is about token t + 1."""
    ids = padded([r.context + r.answer for r in rows], PAD)
    attention = padded([[1] * len(r.context + r.answer) for r in rows], 0)
    sampled = padded([[0] * len(r.context) + [1] * len(r.answer) for r in rows], 0, dtype=torch.float64)
    logits = model(input_ids=ids, attention_mask=attention, use_cache=False).logits[:, :-1] / temperature
    every = logits - torch.logsumexp(logits, dim=-1, keepdim=True)
    chosen = every.gather(-1, ids[:, 1:, None])[..., 0]
    return chosen, -(every.exp() * every).sum(-1), sampled[:, 1:]


def rl(
    model: PreTrainedModel, rows: list[Row], c: Config, old: Tensor | None, ref: Tensor | None, seen: Seen
) -> Tensor:
    """-1/Z sum_i sum_t (w min(q A, clip(q) A) - beta k3 + entropy bonus) of one stream."""
    logp, entropy, mask = log_probs(model, rows, c.rollout.temperature)
    old = logp.detach() if old is None else old
    advantage = torch.tensor([r.advantage for r in rows], dtype=torch.float64)[:, None]
    sampler = padded([[0.0] * (len(r.context) - 1) + r.sampler for r in rows], 0.0, dtype=torch.float64)
    difference, drift = (logp - old) * mask, (old - sampler) * mask
    lengths = mask.sum(1, keepdim=True)
    if c.loss.ratio == "sequence":  # GSPO: the geometric mean of the tokens' ratios
        difference = difference.sum(1, keepdim=True) / lengths
    if c.loss.is_level == "sequence":
        drift = drift.sum(1, keepdim=True)
    ratio = difference.exp().expand_as(mask)
    low, high = 1 - c.loss.eps_low, 1 + c.loss.eps_high
    if c.loss.n_step > 1:
        advantage = advantage * n_step(difference.detach(), mask, c, seen)
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)
    if c.loss.dual_clip is not None:
        dual = (advantage < 0) & (ratio > c.loss.dual_clip) & (mask > 0)
        surrogate = torch.where(dual, c.loss.dual_clip * advantage, surrogate)
        seen.dual += int(dual.sum())
    if c.loss.clip == "cispo":
        surrogate = ratio.clamp(low, high).detach() * advantage * logp
    weight = drift.exp() if c.loss.is_cap is None else drift.exp().clamp(max=c.loss.is_cap)
    if c.loss.is_cap is None:
        weight = torch.ones_like(weight)
    else:
        seen.capped += int(((drift.exp() > c.loss.is_cap) & (mask > 0)).sum())
        seen.uncapped += int(((drift.exp() < c.loss.is_cap) & (mask > 0)).sum())
    seen.above += int(((advantage > 0) & (ratio > high) & (mask > 0)).sum())
    seen.below += int(((advantage < 0) & (ratio < low) & (mask > 0)).sum())
    token = -weight * surrogate - c.loss.entropy_coef * entropy
    if ref is not None:
        token = token + c.loss.beta * ((ref - logp).exp() - (ref - logp) - 1)
    if c.loss.normalize == "tokens":
        return (token * mask).sum() / mask.sum()
    return ((token * mask).sum(1, keepdim=True) / lengths).mean()


def n_step(log_ratio: Tensor, mask: Tensor, c: Config, seen: Seen) -> Tensor:
    """exp of the sum of the next n_step - 1 log-ratios of the same answer, bounded by the cap: token by token."""
    weights = torch.ones_like(log_ratio)
    for i, row in enumerate(mask):
        sampled = row.nonzero()[:, 0].tolist()
        for place, t in enumerate(sampled):
            window = sampled[place + 1 : place + c.loss.n_step]
            total = float(sum(log_ratio[i, s] for s in window))
            weights[i, t] = np.exp(min(max(total, -c.loss.n_step_cap), c.loss.n_step_cap))
            seen.weights.append(float(weights[i, t]))
    return weights


def spread(rewards: Tensor, c: Config) -> Tensor:
    return rewards.std() + c.loss.advantage_eps if c.loss.scale_advantages else torch.ones(())


def rollout_rows(groups: list[Group], c: Config) -> list[Row]:
    rows = []
    for group in groups:
        rewards = torch.tensor([r.reward for r in group.rollouts], dtype=torch.float64)
        advantages = (rewards - rewards.mean()) / spread(rewards, c)
        for r, advantage in zip(group.rollouts, advantages.tolist(), strict=True):
            rows.append(Row(group.prompt_ids, r.token_ids, r.sampler_logps, advantage))
    return rows


def context_of(anchor: Anchor) -> list[int]:
    return anchor.prompt_ids + (anchor.rollout.token_ids + anchor.glue_ids if anchor.glue_ids is not None else [])


def correction_rows(anchors: list[Anchor], c: Config) -> list[Row]:
    """raw_std: a wrong correction of a right attempt costs lambda_risk; divided by the spread of the bare rewards."""
    rows = []
    weights = [0.0, 0.0]  # loss weight of wrong and of right anchors: a token's is the same in all of them
    for anchor in anchors:
        rewards = torch.tensor([r.reward for r in anchor.corrections], dtype=torch.float64)
        risk = c.correction.lambda_risk if anchor.rollout.reward == 1 else 0.0
        shaped = torch.where(rewards == 0, -risk, rewards)
        advantages = (shaped - shaped.mean()) / spread(rewards, c)
        for r, advantage in zip(anchor.corrections, advantages.tolist(), strict=True):
            rows.append(Row(context_of(anchor), r.token_ids, r.sampler_logps, advantage))
            weights[int(anchor.rollout.reward)] += abs(advantage) * len(r.token_ids)
    share = c.replay.right_weight_max
    if weights[1] > share * sum(weights):  # right anchors are scaled down to that share
        n = 0
        for anchor in anchors:
            for row in rows[n : (n := n + len(anchor.corrections))]:
                row.advantage *= share / (1 - share) * weights[0] / weights[1] if anchor.rollout.reward else 1.0
    return rows


def start_loss(model: PreTrainedModel, anchors: list[Anchor], c: Config) -> Tensor:
    """Half the mean over tokens of corrected answers, half of kept ones; corrected ones alone where none was kept."""
    means = []
    for reward in (0, 1):
        rows = [
            Row(context_of(anchor), r.token_ids, r.sampler_logps, 0.0)
            for anchor in anchors
            if anchor.rollout.reward == reward
            for r in [r for r in anchor.corrections if r.reward and not r.truncated][: c.correction.max_ce_per_anchor]
        ]
        if rows:
            logp, _, mask = log_probs(model, rows, c.rollout.temperature)
            means.append(-(logp * mask).sum() / mask.sum())
    return torch.stack(means).mean()


def cross_entropy(model: PreTrainedModel, anchors: list[Anchor], c: Config) -> Tensor:
    """Mean over the tokens of right, whole corrections of wrong anchors, the first few an anchor."""
    rows = []
    for anchor in anchors:
        right = [r for r in anchor.corrections if r.reward == 1 and not r.truncated and anchor.rollout.reward == 0]
        for r in right[: c.correction.max_ce_per_anchor]:
            context = context_of(anchor) if c.correction.context == "anchor" else anchor.rollout.prompt_ids
            rows.append(Row(context, r.token_ids, r.sampler_logps, 0.0))
    logp, _, mask = log_probs(model, rows, c.rollout.temperature)
    return -(logp * mask).sum() / mask.sum()


@dataclass
class Reference:
    """Gradients of every update of a step, from the weights before each of them."""

    model: PreTrainedModel  # stock attention
    frozen: PreTrainedModel  # pi_ref
    config: Config
    seen: Seen = field(default_factory=Seen)

    def gradients(
        self, groups: list[Group], anchors: list[Anchor], weights: list[dict[str, Tensor]]
    ) -> list[dict[str, Tensor]]:
        n, found = self.config.train.updates_per_step, []
        for update in range(n):  # each update has every n-th prompt, and its anchors
            own = [a for a in anchors if a.group % n == update]
            if self.config.correction.start_steps:  # the step is the first
                self.model.load_state_dict(weights[update], strict=False)
                self.model.zero_grad()
                start_loss(self.model, own, self.config).backward()
                found.append({name: p.grad.clone() for name, p in self.model.named_parameters()})
                continue
            streams = [(1.0, rollout_rows(groups[update::n], self.config))]
            lambda_corr = self.config.correction.lambda_corr / max(1, self.config.correction.warmup_steps)
            if own and self.config.correction.loss != "ce":
                streams.append((lambda_corr, correction_rows(own, self.config)))
            olds = [self._fixed(self.model, weights[0], rows) for _, rows in streams]
            refs = [self._fixed(self.frozen, None, rows) for _, rows in streams]
            self.model.load_state_dict(weights[update], strict=False)
            self.model.zero_grad()
            for (factor, rows), old, ref in zip(streams, olds, refs, strict=True):
                ref = ref if self.config.loss.beta else None
                (factor * rl(self.model, rows, self.config, old if n > 1 else None, ref, self.seen)).backward()
            if own and self.config.correction.loss != "rl":
                factor = self.config.correction.mu if self.config.correction.loss == "both" else 1.0
                factor *= lambda_corr
                (factor * cross_entropy(self.model, own, self.config)).backward()
            found.append({name: p.grad.clone() for name, p in self.model.named_parameters()})
        return found

    @torch.no_grad()
    def _fixed(self, model: PreTrainedModel, weights: dict[str, Tensor] | None, rows: list[Row]) -> Tensor:
        if weights is not None:
            model.load_state_dict(weights, strict=False)
        return log_probs(model, rows, self.config.rollout.temperature)[0]


# ---------------------------------------------------------------------------------------- the trainer, and the batch


def fp64_model(attention: str, seed: int = 0) -> PreTrainedModel:
    """A small Qwen3 in fp64 throughout: transformers' norms would round to fp32 on the way."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=256, initializer_range=0.3,
        tie_word_embeddings=True, pad_token_id=PAD,
    )  # fmt: skip
    model = Qwen3ForCausalLM._from_config(config, attn_implementation=attention).double()

    def norm(module: torch.nn.Module, x: Tensor) -> Tensor:
        return module.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon)

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(norm, module)
    return model


def trainers_gradients(
    config: Config, groups: list[Group], anchors: list[Anchor]
) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """(weights before, gradients) of every update of a step, as the trainer's own `learn` makes it."""
    model = fp64_model(ATTENTION)
    frozen = Policy(fp64_model(ATTENTION, seed=1), config) if config.loss.beta else None
    learner = Learner(Policy(model, config), config.optim, config.train.updates_per_step, frozen)
    weights, gradients = [], []

    def take(*_: Any) -> None:
        weights.append({name: p.detach().clone() for name, p in model.named_parameters()})
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})

    learner.optimizer.register_step_pre_hook(take)
    cost = cost_model(model.config, model.num_parameters())
    run: Any = SimpleNamespace(config=config, learner=learner, cost=cost, flops=cost)
    learn(run, copy.deepcopy(groups), copy.deepcopy(anchors), step=1)
    return weights, gradients


def sampled(rng: np.random.Generator, prompt: list[int], reward: float, score: Callable[..., list[float]]) -> Rollout:
    """A random answer; its sampler's log-probs are the policy's, give or take."""
    answer = rng.integers(1, VOCAB, size=rng.integers(1, 8)).tolist()
    problem = Problem("p", ({"role": "user", "content": "?"},), "", "test")
    logps = (np.array(score(prompt, answer)) + rng.normal(0, 0.4, len(answer))).astype(np.float32).tolist()
    return Rollout(problem, prompt, answer, logps, "", reward, bool(rng.random() < 0.2), 0)


def batch(config: Config, layout: str = "followup") -> tuple[list[Group], list[Anchor]]:
    """Six prompts of four answers each, one of them without variance; five anchors, right and wrong ones."""
    rng, model = np.random.default_rng(config.seed), fp64_model("sdpa")

    @torch.no_grad()
    def score(prompt: list[int], answer: list[int]) -> list[float]:
        logp, _, mask = log_probs(model, [Row(prompt, answer, [], 0.0)], config.rollout.temperature)
        return logp[mask > 0].tolist()

    groups = []
    for rewards in ([1, 0, 0, 1], [0, 0, 0, 1], [1, 1, 1, 1], [1, 1, 0, 1], [0, 1, 0, 0], [1, 0, 1, 0]):
        prompt = rng.integers(1, VOCAB, size=rng.integers(2, 7)).tolist()
        members = [sampled(rng, prompt, float(reward), score) for reward in rewards]
        groups.append(Group(members[0].problem, prompt, members))
    anchors = []
    for group, index, rewards in ((0, 0, [1, 0, 0]), (0, 1, [0, 1, 1]), (1, 2, [1, 1, 1]), (3, 0, [0, 1, 0]),
                                  (4, 3, [1, 1, 1]), (5, 1, [1, 1, 0])):  # fmt: skip
        rollout = groups[group].rollouts[index]
        extra = rng.integers(1, VOCAB, size=4).tolist()
        own = (rollout.prompt_ids, extra) if layout == "followup" else (extra + rollout.prompt_ids, None)
        anchor = Anchor(rollout, group, index, *own)
        anchor.corrections = [sampled(rng, context_of(anchor), float(reward), score) for reward in rewards]
        anchors.append(anchor)
    return groups, anchors


def compare(*settings: str, corrections: bool, layout: str = "followup") -> Seen:
    """Assert that both give the same gradients for every update; what the reference saw on the way."""
    config = load_config([], ["train.pack_tokens=140", "optim.max_grad_norm=1e9", "optim.lr=0.01", *settings])
    groups, anchors = batch(config, layout)
    anchors = anchors if corrections else []
    weights, ours = trainers_gradients(config, groups, anchors)
    reference = Reference(fp64_model("sdpa"), fp64_model("sdpa", seed=1), config)
    theirs = reference.gradients(groups, anchors, weights)
    assert len(ours) == len(theirs) == config.train.updates_per_step
    for update, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a.keys() == b.keys()
        for name in b:
            scale = b[name].abs().max()
            assert scale > 1e-6, (update, name)
            assert (a[name] - b[name]).abs().max() <= TOLERANCE * scale, (update, name)
    return reference.seen


GRPO = "correction.lambda_corr=0"


@pytest.mark.parametrize(
    "settings",
    [
        [], ["loss.normalize=sequences"], ["loss.scale_advantages=false"], ["rollout.temperature=0.7"],
        ["loss.is_cap=null"], ["loss.is_level=sequence", "loss.is_cap=1.2"], ["loss.entropy_coef=0.05"],
        ["loss.beta=0.1"], ["train.packing=rows"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_one_grpo_update(mesh, settings: list[str]) -> None:
    compare(GRPO, *settings, corrections=False)


def test_importance_weights_are_capped(mesh) -> None:
    seen = compare(GRPO, "loss.is_cap=1.2", corrections=False)
    assert seen.capped > 5
    assert seen.uncapped > 5


@pytest.mark.parametrize(
    "settings",
    [
        [], ["loss.ratio=sequence"], ["loss.ratio=sequence", "loss.normalize=sequences"],
        ["loss.normalize=sequences", "rollout.temperature=1.3"], ["loss.is_level=sequence"],
        ["loss.beta=0.1", "loss.entropy_coef=0.05"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_two_grpo_updates_clip_on_both_sides(mesh, settings: list[str]) -> None:
    """The second update's old log-probs are from before the first; lr is so large that ratios leave the interval."""
    narrow = ["loss.eps_low=0.05", "loss.eps_high=0.08"]
    seen = compare(GRPO, "train.updates_per_step=2", *narrow, *settings, corrections=False)
    assert seen.above > 3
    assert seen.below > 3


def test_dual_clip_and_cispo(mesh) -> None:
    updates = [GRPO, "train.updates_per_step=2", "loss.eps_low=0.05", "loss.eps_high=0.08"]
    seen = compare(*updates, "loss.dual_clip=1.1", "loss.beta=0.1", corrections=False)
    assert seen.dual > 3
    seen = compare(*updates, "loss.clip=cispo", "loss.entropy_coef=0.05", corrections=False)
    assert min(seen.above, seen.below) > 3


@pytest.mark.parametrize("cap", [0.05, 5.0])
def test_n_step(mesh, cap: float) -> None:
    """KL and entropy bonus keep their weights; the second update's ratios are not 1, and leave the smaller cap."""
    settings = ["loss.n_step=3", f"loss.n_step_cap={cap}", "loss.beta=0.1", "loss.entropy_coef=0.05"]
    seen = compare(GRPO, "train.updates_per_step=2", *settings, corrections=False)
    beyond = [abs(np.log(w)) > 0.05 + 1e-9 for w in seen.weights]
    assert any(beyond) == (cap > 0.05)
    assert len(set(seen.weights)) > 5


@pytest.mark.parametrize("layout", ["followup", "quoted"])
@pytest.mark.parametrize(
    "settings",
    [
        [], ["train.updates_per_step=2"], ["loss.normalize=sequences", "rollout.temperature=0.7"],
        ["loss.scale_advantages=false"], ["correction.loss=both"], ["correction.loss=ce"],
        ["correction.loss=both", "correction.context=bare", "train.updates_per_step=2"],
        ["replay.right_weight_max=0.3"], ["replay.right_weight_max=0.2", "train.updates_per_step=2"],
        ["correction.warmup_steps=4", "correction.loss=both"], ["correction.start_steps=1"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_corrections_learn_from_prompt_attempt_and_glue(mesh, settings: list[str], layout: str) -> None:
    weights = ["correction.lambda_corr=0.7", "correction.lambda_risk=0.5", "correction.max_ce_per_anchor=1"]
    compare(*weights, f"correction.layout={layout}", *settings, corrections=True, layout=layout)
