"""Weights from the policy to the engine, and the proof that they arrived.

After a sync two things are compared. Checksums: every tensor that was sent with what the engine computes with, bit for
bit, so that an engine which missed a single small update is found out. Log-probs of the same tokens, on both sides:
equal weights can still be multiplied otherwise (another RoPE, a scale, a cache). When either shows more than rounding
explains, the run stops and names the tensors that are not the same.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from cipo_fast.cipo.metrics import Metrics
from cipo_fast.config import Config
from cipo_fast.errors import PolicyBroken, TrainingStopped
from cipo_fast.packing import Pack, build_trees, make_pack
from cipo_fast.policy import Policy
from cipo_fast.records import Conversation, Group, Segment
from cipo_fast.rollout import Engine
from cipo_fast.rollout.checksums import checksum, differing, to_ints

PROBE_SEQUENCES = 8
PROBE_TOKENS = 4096  # of all sequences together
MEAN_GAP = {"float32": 1e-5, "bfloat16": 0.05}  # nats; bfloat16: from 2 layers on CPU (0.02), not seen on a GPU
MAX_OVER_MEAN = 20.0


@dataclass(frozen=True)
class Gap:
    """|trainer - engine| of log-probs, in nats, over the probe's tokens."""

    mean: float
    max: float


class WeightSync:
    """`prompts`: token sequences to compare log-probs on until `watch` has answers."""

    def __init__(
        self,
        policy: Policy,
        engine: Engine,
        config: Config,
        prompts: list[list[int]],
    ):
        self.policy = policy
        self.engine = engine
        self.config = config.sync
        self.dtype = getattr(torch, config.model.dtype)
        self.max_tokens = min(PROBE_TOKENS, config.train.pack_tokens)
        self.device = next(policy.parameters()).device
        self.tolerance = self.config.tolerance or MEAN_GAP[config.model.dtype]
        self.sent: dict[str, int] = {}  # checksums of the last sync
        self.proven = False  # False: the next probe is due whatever its step
        self._compare_on(prompts)

    def watch(self, groups: Iterable[Group]) -> None:
        """Compare on the longest of these answers from now on: differences of position and precision grow with it."""
        self._compare_on(r.prompt_ids + r.token_ids for group in groups for r in group.rollouts)

    def publish(self, version: int) -> Metrics:
        """Sync and compare, when that is due: every `probe_every` steps, and the first time. Raises TrainingStopped if
        the engine is not the policy, or is lost."""
        before = self.sent
        report = self.engine.sync(self._sending(), version)
        started = time.perf_counter()
        due = not self.proven or version % self.config.probe_every == 0
        gap = self._probe() if due else None
        changed = [name for name, value in self.sent.items() if before.get(name) != value]
        return {
            "sync/parity_max_abs": gap.max if gap else None,
            "sync/parity_mean_abs": gap.mean if gap else None,
            "sync/changed": len(changed) / len(self.sent) if before else None,  # share of the tensors
            "sync/gb": report.bytes / 1e9,
            "time/sync_s": report.seconds,
            "time/probe_s": time.perf_counter() - started,
        }

    def republish(self, version: int) -> None:
        """The same for an engine that was restarted: the comparison is due whatever the step."""
        self.proven = False
        self.publish(version)

    def _sending(self) -> Iterator[tuple[str, Tensor]]:
        """The policy's weights, in the engine's type; `sent` has their checksums once all have gone by."""
        found: dict[str, Tensor] = {}
        for name, tensor in self.policy.full_weights(self.dtype):
            found[name] = checksum(tensor)
            yield name, tensor
        self.sent = to_ints(found)

    def _probe(self) -> Gap:
        gap = self.gap()  # first: a policy that is not finite stops here, and is not to be saved
        wrong = self.differing()
        if wrong or not (gap.mean <= self.tolerance and gap.max <= MAX_OVER_MEAN * self.tolerance):
            raise TrainingStopped(
                f"after the sync to version {self.engine.policy_version} the engine is not the policy: "
                f"{_culprits(wrong)}; log-probs differ by {gap.mean:.3g} nats on average, {gap.max:.3g} at most "
                f"(sync.tolerance {self.tolerance:g})"
            )
        self.proven = True
        return gap

    def differing(self) -> list[str]:
        """Tensors of the last sync that this engine, or another rank's, does not compute with. A collective."""
        sent = self.sent | {name: self.sent[first] for name, first in self.policy.tied_names.items()}
        wrong = differing(sent, self.engine.checksums())
        everyones = [wrong]
        if dist.get_world_size() > 1:
            everyones *= dist.get_world_size()
            dist.all_gather_object(everyones, wrong)
        return list(dict.fromkeys(name for names in everyones for name in names))

    def gap(self) -> Gap:
        """Of this engine against the policy; the worst rank's, on every rank."""
        ours = self.policy.log_probs(self.pack, temperature=1.0)  # [N]; every rank forwards the same pack
        if not ours.isfinite().all():
            version = self.engine.policy_version
            raise PolicyBroken(
                f"policy version {version} gives probabilities that are not finite; the newest checkpoint is the state "
                "to go on from"
            )
        scored = self.engine.score(self.sequences)
        theirs = torch.tensor([logp for sequence in scored for logp in sequence], device=self.device)
        difference = (ours - theirs).abs().nan_to_num(torch.inf)
        worst = torch.stack([difference.mean(), difference.max()])
        if dist.get_world_size() > 1:
            dist.all_reduce(worst, dist.ReduceOp.MAX)
        return Gap(*worst.tolist())

    def _compare_on(self, sequences: Iterable[list[int]]) -> None:
        """The longest ones, as many as there is room for. A rank need not ask another: all have the same."""
        room = self.max_tokens
        longest = self.max_tokens if self.engine.max_model_len is None else self.engine.max_model_len - 1
        found = []
        for ids in sorted(sequences, key=len, reverse=True)[:PROBE_SEQUENCES]:
            ids = ids[: min(room, longest)]
            if len(ids) > 1:
                found.append(ids)
                room -= len(ids)
        self.sequences = found
        self.pack = _pack(found).to(self.device)


def _culprits(wrong: Sequence[str]) -> str:
    if not wrong:
        return "its tensors are the trainer's, so it computes something else with them (config, attention, a cache?)"
    more = ", ..." if len(wrong) > 5 else ""
    return f"{len(wrong)} of its tensors are not the trainer's: {', '.join(wrong[:5])}{more}"


def _pack(sequences: list[list[int]]) -> Pack:
    """Every token but a sequence's first as a target, in order."""
    conversations = [
        Conversation((Segment(ids[:1]), Segment(ids[1:])), None, "rollout", 0.0, 0.0, 0.0) for ids in sequences
    ]
    return make_pack(build_trees(conversations, "rows"))
