"""One optimiser step from packs: forward, fused loss and backward a pack, clipping, AdamW; and what it saw."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from cipo_kernels import k3
from torch import Tensor
from torch.distributed.tensor import DTensor

from cipo_fast.config import OptimConfig
from cipo_fast.long_act import LongAct
from cipo_fast.n_step import with_n_step
from cipo_fast.packing import Pack, make_pack
from cipo_fast.policy import Policy
from cipo_fast.records import STREAMS, TokenStats

STATS = (
    "entropy",
    "clip_fraction",
    "approx_kl",
    "ratio_max",
    "sampler_gap",
    "sampler_gap_max",
    "mismatch_kl",
    "mismatch_outside",
)


# Of all that an engine sampled: a stream -> [tokens, sums of ALL_STATS over them].
Sampled = dict[str, list[float]]
# Answers whose tokens are kept, by the id of their sampler_logps, a list of its own each; filled as packs are seen.
Watched = dict[int, TokenStats]
ALL_STATS = ("all_entropy", "all_approx_kl", "all_mismatch_kl", "all_mismatch_outside")


@dataclass(frozen=True)
class Update:
    """What an optimiser step did. `streams[name]` holds STATS over the targets learned from: those of the loss, and the
    trainer's log-probs against the sampler's: sampler_gap (mean |difference|), sampler_gap_max, mismatch_kl (k3
    estimate of KL(sampler || trainer), nats a token), mismatch_outside (share of ratios outside [0.9, 1.1])."""

    loss: float
    grad_norm: float
    lr: float
    applied: bool  # False: the loss or a gradient was not finite, nothing changed
    streams: dict[str, dict[str, float]]
    sampled: Sampled  # ... of these packs
    bad_pack: Pack | None = None  # this rank's pack that was not finite


class Learner:
    def __init__(self, policy: Policy, config: OptimConfig, total_updates: int, reference: Policy | None = None):
        self.policy = policy
        self.reference = reference
        self.config = config
        self.total_updates = total_updates
        self.device = next(policy.parameters()).device
        self.optimizer = torch.optim.AdamW(
            policy.parameters(), lr=config.lr, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay
        )
        self.watched: Watched = {}
        self.long_act = LongAct(policy.model, config.long_act) if config.long_act is not None else None

    def measure(self, packs: Sequence[Pack]) -> Sampled:
        """What an `update` would see of these packs, by the weights as they are; nothing is learned from them. Every
        rank must bring equally many packs."""
        sampled = _SampledStats(self.device, self.watched)
        for pack in packs:
            pack = pack.to(self.device)
            sampled.add(*self.policy.measure(pack), pack)
        return sampled.result()

    def update(self, packs: Sequence[Pack], step: int) -> Update:
        """One optimiser step on this rank's packs; `step` counts optimiser steps from 0 and sets the learning rate.
        Every rank must bring equally many packs: a pack is a collective. loss.n_step above 1 takes a forward pass more,
        for the ratios of the weights as they are before it."""
        packs = [self._with_n_step(pack) for pack in packs]
        lr = learning_rate(self.config, step, self.total_updates)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        losses, stats, sampled = [], _Stats(self.device), _SampledStats(self.device, self.watched)
        long_act = self.long_act
        if long_act is not None:
            long_act.reset()
        for pack in packs:
            pack = pack.to(self.device)
            with long_act.seeing(pack) if long_act is not None else nullcontext():
                output = self.policy(pack)
            output.loss.backward()
            losses.append(output.loss.detach())
            stats.add(output.logp, output.entropy, output.ratio, output.clipped, pack)
            sampled.add(output.logp, output.entropy, pack)
        with long_act.masked() if long_act is not None else nullcontext():
            norm = self._clip_gradients()
            loss = _reduce(torch.stack(losses).sum(), dist.ReduceOp.SUM).item()
            applied = math.isfinite(loss) and math.isfinite(norm)
            if applied:
                self.optimizer.step()
        self.optimizer.zero_grad()
        bad_pack = None if applied else self._find_bad(packs)
        return Update(loss, norm, lr, applied, stats.result(), sampled.result(), bad_pack)

    def with_log_probs(self, packs: Sequence[Pack], need_old: bool, need_ref: bool = True) -> list[Pack]:
        """The packs with old_logp (where a batch gets several updates) and ref_logp (where there is a reference)."""
        filled = []
        for pack in packs:
            moved = pack.to(self.device)
            old = self.policy.log_probs(moved) if need_old else None
            ref = self.reference.log_probs(moved) if need_ref and self.reference is not None else None
            filled.append(dataclasses.replace(moved, old_logp=old, ref_logp=ref))
        return filled

    def _with_n_step(self, pack: Pack) -> Pack:
        loss = self.policy.loss
        if loss.n_step == 1:
            return pack
        pack = pack.to(self.device)
        return with_n_step(pack, self.policy.log_probs(pack), loss.n_step, loss.n_step_cap)

    def _clip_gradients(self) -> float:
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.config.max_grad_norm)
        return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()

    def _find_bad(self, packs: Sequence[Pack]) -> Pack | None:
        """This rank's first pack whose own gradients are not finite. A gradient is the sum over ranks, so where it is
        not finite each rank's pack is looked at alone, the others bringing one that weighs nothing."""
        world, rank, found, nothing = dist.get_world_size(), dist.get_rank(), None, make_pack([])
        for pack in packs:
            if self._finite(pack):
                continue
            alone = [self._finite(pack if r == rank else nothing) for r in range(world)] if world > 1 else [False]
            if found is None and not alone[rank]:
                found = pack
        return found

    def _finite(self, pack: Pack) -> bool:
        """Of the summed loss and gradients of all ranks' packs, by one pass that changes nothing."""
        output = self.policy(pack.to(self.device))
        output.loss.backward()
        norm = self._clip_gradients()
        self.optimizer.zero_grad()
        return math.isfinite(_reduce(output.loss.detach().clone(), dist.ReduceOp.SUM).item()) and math.isfinite(norm)


def learning_rate(config: OptimConfig, step: int, total: int) -> float:
    """Linear warm-up, then constant, linear or cosine to 0 at `total`."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    done = (step - config.warmup_steps) / max(1, total - config.warmup_steps)
    return config.lr * (1 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done)))


class _Stats:
    """Sums and maxima over targets, a stream each, added up over packs and ranks without a sync."""

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(len(STREAMS), 8, dtype=torch.float64, device=device)
        self.maxima = torch.zeros(len(STREAMS), 2, dtype=torch.float64, device=device)

    def add(self, logp: Tensor, entropy: Tensor, ratio: Tensor, clipped: Tensor, pack: Pack) -> None:
        old = logp if pack.old_logp is None else pack.old_logp
        sampled = ~pack.sampler_logp.isnan()
        sampler = torch.where(sampled, pack.sampler_logp, old)
        gap = (old - sampler).abs()
        outside = ((old - sampler).exp() - 1).abs() > 0.1
        ones = torch.ones_like(logp)
        columns = [ones, entropy, clipped, k3(logp, old), sampled, gap, k3(old, sampler), outside]
        self.sums.index_add_(0, pack.stream, torch.stack([c.double() for c in columns], dim=1))
        peaks = torch.stack([ratio, gap], dim=1).double()
        self.maxima = self.maxima.scatter_reduce(0, pack.stream[:, None].expand_as(peaks), peaks, "amax")

    def result(self) -> dict[str, dict[str, float]]:
        sums, maxima = _reduce(self.sums, dist.ReduceOp.SUM).tolist(), _reduce(self.maxima, dist.ReduceOp.MAX).tolist()
        found = {}
        for name, (n, entropy, clipped, kl, sampled, gap, mismatch, outside), (ratio_max, gap_max) in zip(
            STREAMS, sums, maxima, strict=True
        ):
            n_sampled = max(sampled, 1.0)
            if n:
                found[name] = {
                    "entropy": entropy / n,
                    "clip_fraction": clipped / n,
                    "approx_kl": kl / n,
                    "ratio_max": ratio_max,
                    "sampler_gap": gap / n_sampled,
                    "sampler_gap_max": gap_max,
                    "mismatch_kl": mismatch / n_sampled,
                    "mismatch_outside": outside / n_sampled,
                }
        return found


class _SampledStats:
    """Sums over all tokens that an engine sampled, learned from or not, a stream each, over packs and ranks, without a
    sync; and the values of `watched` answers' tokens, which wait on the device for the result."""

    def __init__(self, device: torch.device, watched: Watched):
        self.sums = torch.zeros(len(STREAMS), 1 + len(ALL_STATS), dtype=torch.float64, device=device)
        self.watched = watched
        self.seen: list[tuple[Tensor, list[TokenStats | None], list[int]]] = []

    def add(self, logp: Tensor, entropy: Tensor, pack: Pack) -> None:
        """logp and entropy [N] by the weights of now."""
        old = logp if pack.old_logp is None else pack.old_logp
        found = [self.watched.get(id(c.sampler_logps)) for c in pack.conversations]
        if any(tokens is not None for tokens in found):
            self.seen.append((torch.stack([old, entropy]).detach(), found, pack.target_counts))
        sampled = ~pack.sampler_logp.isnan()
        gap = old - pack.sampler_logp
        outside = (gap.exp() - 1).abs() > 0.1
        columns = [torch.ones_like(logp), entropy, k3(logp, old), k3(old, pack.sampler_logp), outside]
        values = torch.stack([c.double() for c in columns], dim=1)
        self.sums.index_add_(0, pack.stream, torch.where(sampled[:, None], values, 0.0))

    def _watch(self) -> None:
        """The first look counts: with several updates a step, old_logp stays but entropies move."""
        for values, found, counts in self.seen:
            logps, entropies = values.tolist()
            start = 0
            for tokens, n in zip(found, counts, strict=True):
                if tokens is not None and not tokens.logps:
                    tokens.logps, tokens.entropies = logps[start : start + n], entropies[start : start + n]
                start += n

    def result(self) -> Sampled:
        self._watch()
        return dict(zip(STREAMS, _reduce(self.sums, dist.ReduceOp.SUM).tolist(), strict=True))


def _reduce(value: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(value, op)
    return value
