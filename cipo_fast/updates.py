"""A batch becomes optimiser updates: what is learned from it is packed, and what it tells is measured."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from cipo_fast.cipo.metrics import Metrics
from cipo_fast.cipo.objective import as_sampled, conversations, left_out
from cipo_fast.config.job import RunConfig
from cipo_fast.errors import note
from cipo_fast.learner import ALL_STATS, STATS, Sampled, Update
from cipo_fast.packing import CostModel, Pack, build_trees, make_pack, pack_trees, row_tokens
from cipo_fast.records import STREAMS, Anchor, Conversation, Group, Rollout, TokenStats

if TYPE_CHECKING:
    from cipo_fast.train import Run


def learn(run: Run, groups: list[Group], anchors: list[Anchor], step: int) -> tuple[list[Update], Metrics, float]:
    """The step's optimiser updates: (updates, metrics of the tokens, seconds for old and reference log-probs).

    `flops/train` are the forward and backward passes of what is learned from, over all ranks; not counted are passes
    without a gradient (old and reference log-probs, `train.measure_every`) and what is recomputed."""
    per_step = run.config.train.updates_per_step
    n = min(per_step, len(groups))  # fewer, where whole groups could not be judged
    every = run.config.train.measure_every
    measured = every > 0 and step % every == 0
    kept = watched_answers(groups, anchors, run.config.run, step)
    run.learner.watched = {id(r.sampler_logps): r.tokens for r in kept if r.tokens is not None}
    batches: list[list[Pack]] = []
    rests: list[list[Pack]] = []
    forwarded = rows = 0
    flops = 0.0
    for part in range(n):
        members = [replace(a, group=a.group // n) for a in anchors if a.group % n == part]
        batch = conversations(groups[part::n], members, run.config, step)
        rest = left_out(groups[part::n], members, batch) if measured else []
        note_advantages(groups[part::n], members, batch, run.config.correction.loss)
        packs, tokens, part_flops = make_packs(batch, run)
        batches.append(packs)
        rests.append(make_packs(rest, run)[0] if rest else [])
        forwarded += tokens
        flops += part_flops
        rows += row_tokens(batch)
    old_logp_s = 0.0
    need_old = per_step > 1 or (run.config.loss.is_cap is not None and run.config.loss.is_level == "sequence")
    if need_old or run.learner.reference is not None:
        started = time.perf_counter()
        batches = [run.learner.with_log_probs(packs, need_old) for packs in batches]
        rests = [run.learner.with_log_probs(packs, need_old, need_ref=False) for packs in rests]
        old_logp_s = time.perf_counter() - started
    updates, sampled = [], []
    for part, packs in enumerate(batches):
        if measured:
            sampled.append(run.learner.measure(rests[part]))  # by the weights that this update starts from
        updates.append(run.learner.update(packs, (step - 1) * per_step + part))
        if updates[-1].bad_pack is not None:
            keep_bad_pack(run, updates[-1].bad_pack, step)
    gather_tokens(kept)
    saved = 1 - forwarded / rows if rows else None
    seen: Metrics = {"tokens/forwarded": forwarded, "tokens/rows": rows, "tokens/saved": saved}
    seen |= {**sampling_work(groups, anchors, run.flops), "flops/train": flops}
    seen |= sampled_metrics([*sampled, *(u.sampled for u in updates)] if measured else [])
    return updates, seen, old_logp_s


def watched_answers(groups: list[Group], anchors: list[Anchor], c: RunConfig, step: int) -> list[Rollout]:
    """Answers of a recorded step whose tokens are kept, at most `run.save_tokens` of them: an attempt that was shown
    back goes first, with its corrections, because that is what people look at. Each gets its `TokenStats`."""
    if not (c.save_tokens and c.save_rollouts_every and step % c.save_rollouts_every == 0):
        return []
    shown = [r for anchor in anchors for r in (anchor.rollout, *anchor.corrections)]
    room, found = c.save_tokens, []
    for answer in (*shown, *(r for group in groups for r in group.rollouts)):
        if answer.tokens is None and len(answer.token_ids) <= room:
            answer.tokens = TokenStats()
            room -= len(answer.token_ids)
            found.append(answer)
    return found


def note_advantages(groups: list[Group], anchors: list[Anchor], batch: list[Conversation], loss: str) -> None:
    """Give every answer its advantage: that of what is learned from it, 0 where it was left out of `batch`."""
    taught = {id(c.sampler_logps): float(c.advantage) for c in batch}
    for answer in (r for group in groups for r in group.rollouts):
        answer.advantage = taught.get(id(answer.sampler_logps), 0.0)
    for answer in (r for anchor in anchors for r in anchor.corrections):
        answer.advantage = None if loss == "ce" else taught.get(id(answer.sampler_logps), 0.0)


def gather_tokens(kept: list[Rollout]) -> None:
    """Every rank has seen the tokens of its own packs; the first one, which records them, gets all."""
    if dist.get_world_size() == 1 or not kept:
        return
    mine = {i: r.tokens for i, r in enumerate(kept) if r.tokens is not None and r.tokens.logps}
    parts: list[dict[int, TokenStats] | None] = [None] * dist.get_world_size()
    dist.gather_object(mine, parts if dist.get_rank() == 0 else None)
    for i, tokens in (item for part in parts if part for item in part.items()):
        kept[i].tokens = tokens


def sampling_work(groups: list[Group], anchors: list[Anchor], flops: CostModel) -> Metrics:
    """What the step's judged answers took to sample: `tokens/sampled`, the tokens of rollouts and corrections, and
    `flops/sample`, one forward pass of every token of their trees (prompts, attempts and follow-ups once, as with a
    prefix cache that forgets nothing) and the head once an answer's token. Evaluation is not counted."""
    answers = as_sampled(groups, anchors)
    return {
        "tokens/sampled": sum(len(c.segments[-1].token_ids) for c in answers),
        "flops/sample": sum(flops.forward.of(tree) for tree in build_trees(answers)),
    }


def make_packs(batch: list[Conversation], run: Run) -> tuple[list[Pack], int, float]:
    """This rank's packs of a batch; the tokens and FLOPs, forward and backward, of all ranks' packs."""
    trees = build_trees(batch, run.config.train.packing)
    ranks = pack_trees(trees, run.config.train.pack_tokens, run.cost, dist.get_world_size())
    pieces = [tree for packs in ranks for members in packs for tree in members]
    tokens, flops = sum(tree.num_tokens for tree in pieces), sum(run.flops.of(tree) for tree in pieces)
    packs = [make_pack(members, run.config.model.attention) for members in ranks[dist.get_rank()]]
    return packs, tokens, flops


def update_metrics(updates: list[Update]) -> Metrics:
    """The step's updates as metrics; a value that is not finite becomes None."""
    metrics: Metrics = {
        "loss/total": sum(u.loss for u in updates) / len(updates),
        "grad/norm": max(u.grad_norm for u in updates),
        "optim/lr": updates[-1].lr,
        "train/skipped": sum(not u.applied for u in updates),
    }
    for stream in STREAMS:
        found = [u.streams[stream] for u in updates if stream in u.streams]
        for key in STATS:
            values = [f[key] for f in found] or [math.nan]  # nothing in the stream to learn from
            metrics[f"{stream}/{key}"] = max(values) if key.endswith("max") else sum(values) / len(values)
    return {k: v if v is None or math.isfinite(v) else None for k, v in metrics.items()}


def sampled_metrics(found: list[Sampled]) -> Metrics:
    """Means over every token that was sampled, learned from or not; None where none was measured or is finite."""
    metrics: Metrics = {}
    for stream in STREAMS:
        tokens, *sums = (sum(column) for column in zip(*(f[stream] for f in found), strict=True)) if found else [0.0]
        for key, total in zip(ALL_STATS, sums or [0.0] * len(ALL_STATS), strict=True):
            metrics[f"{stream}/{key}"] = total / tokens if tokens and math.isfinite(total) else None
    return metrics


def keep_bad_pack(run: Run, pack: Pack, step: int) -> None:
    path = run.config.run_dir / "failed" / f"step-{step}-rank-{dist.get_rank()}.pt"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(pack, path)
    except (OSError, RuntimeError) as error:  # one rank's full disk must not part it from the others
        note(f"{path} cannot be written: {error}")
