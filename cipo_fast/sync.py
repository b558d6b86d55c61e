"""Weights from the policy to the engine, and the proof that they arrived.

After a sync a probe compares both sides' log-probs of the same tokens. When they differ by more than rounding explains,
the run stops and names the parameters that are not the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from cipo_fast.cipo.metrics import Metrics
from cipo_fast.config import Config
from cipo_fast.errors import PolicyBroken, TrainingStopped
from cipo_fast.packing import Pack, build_trees, make_pack
from cipo_fast.policy import Policy
from cipo_fast.records import Conversation, Segment
from cipo_fast.rollout import Engine
from cipo_fast.rollout.fingerprints import Fingerprint, differing, of_parameter

PROBE_SEQUENCES = 4
PROBE_TOKENS = 128  # of a sequence, at most
MEAN_GAP = {"float32": 1e-5, "bfloat16": 0.05}  # nats; bfloat16: from 2 layers on CPU (0.02), not seen on a GPU
MAX_OVER_MEAN = 20.0
SAME_PARAMETER = {"float32": 1e-4, "bfloat16": 0.02}  # relative difference of fingerprints that rounding explains


@dataclass(frozen=True)
class Gap:
    """|trainer - engine| of log-probs, in nats, over the probe's tokens."""

    mean: float
    max: float


class WeightSync:
    """`probe_ids`: token sequences to compare on, cut to PROBE_TOKENS."""

    def __init__(
        self,
        policy: Policy,
        engine: Engine,
        config: Config,
        probe_ids: list[list[int]],
        say: Callable[[str], None],
    ):
        self.policy = policy
        self.engine = engine
        self.config = config.sync
        self.dtype_name = config.model.dtype
        self.dtype = getattr(torch, config.model.dtype)
        self.probe_ids = [ids[:PROBE_TOKENS] for ids in probe_ids if len(ids) > 1][:PROBE_SEQUENCES]
        self.device = next(policy.parameters()).device
        self.pack = _pack(self.probe_ids).to(self.device)
        self.say = say
        self.tolerance = self.config.tolerance or MEAN_GAP[config.model.dtype]

    def publish(self, version: int) -> Metrics:
        """Sync and, when it is due, probe. Raises TrainingStopped if the engine is not the policy, or is lost."""
        report = self.engine.sync(self.policy.full_weights(self.dtype), version)
        started = time.perf_counter()
        gap = self._probe() if version % self.config.probe_every == 0 else None
        return {
            "sync/parity_max_abs": gap.max if gap else None,
            "sync/parity_mean_abs": gap.mean if gap else None,
            "sync/gb": report.bytes / 1e9,
            "time/sync_s": report.seconds,
            "time/probe_s": time.perf_counter() - started,
        }

    def _probe(self) -> Gap:
        gap = self.gap()
        if not (gap.mean <= self.tolerance and gap.max <= MAX_OVER_MEAN * self.tolerance):
            raise TrainingStopped(
                f"after the sync to version {self.engine.policy_version} the engine is not the policy: log-probs "
                f"differ by {gap.mean:.3g} nats on average, {gap.max:.3g} at most (sync.tolerance {self.tolerance:g}); "
                f"{self._culprits()}"
            )
        return gap

    def gap(self) -> Gap:
        """Of this engine against the policy; the worst rank's, on every rank. Raises EngineFailure on all or none."""
        ours = self.policy.log_probs(self.pack, temperature=1.0)  # [N]; every rank forwards the same pack
        if not ours.isfinite().all():
            version = self.engine.policy_version
            raise PolicyBroken(f"policy version {version} gives probabilities that are not finite")
        scored = self.engine.score(self.probe_ids)
        theirs = torch.tensor([logp for sequence in scored for logp in sequence], device=self.device)
        difference = (ours - theirs).abs().nan_to_num(torch.inf)
        worst = torch.stack([difference.mean(), difference.max()])
        if dist.get_world_size() > 1:
            dist.all_reduce(worst, dist.ReduceOp.MAX)
        return Gap(*worst.tolist())

    def _culprits(self) -> str:
        """Which parameters differ, by what they do to a fixed input. Every rank gathers; each has its own engine."""
        found = differing(self._fingerprints(), self.engine.fingerprints(), SAME_PARAMETER[self.dtype_name])
        if not found:
            return "no single parameter differs: the engine computes something else (config, attention, a cache?)"
        named = ", ".join(f"{name} ({difference:.1e})" for name, difference in found[:5])
        return f"{len(found)} of its parameters differ, relative to their size: {named}"

    def _fingerprints(self) -> Iterator[tuple[str, Fingerprint]]:
        tied = self.policy.tied_head
        for name, tensor in self.policy.full_weights(self.dtype):
            fingerprint = of_parameter(tensor)
            yield name, fingerprint
            if name == tied:
                yield "lm_head.weight", fingerprint


def _pack(sequences: list[list[int]]) -> Pack:
    """Every token but a sequence's first as a target, in order."""
    conversations = [
        Conversation((Segment(ids[:1]), Segment(ids[1:])), None, "rollout", 0.0, 0.0, 0.0) for ids in sequences
    ]
    return make_pack(build_trees(conversations, "rows"))
