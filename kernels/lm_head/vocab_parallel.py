"""The head when the vocabulary is split over the ranks of a group: each has its columns of the logits, all have the
same hidden states and targets.

`forward` and `d_logits` of head.py, made of those of a back-end on this rank's columns, and of two all-reduces of a few
numbers a target. With lse_r, H_r of the softmax over rank r's columns, m = max_r lse_r, l_r = lse_r - m and Z = sum_r
e^l_r, rank r has the share w_r = e^l_r / Z of the probability, and by the chain rule of entropy

    H = sum_r w_r (H_r - log w_r) = log Z + 1/Z sum_r e^l_r (H_r - l_r)
    logp = logp_r + log w_r,    1 - p = (1 - w_r) + w_r (1 - p_r)      r: the rank that has the target's column

1 - w_r and log w_r = -log1p(A / B) come from A = sum of e^l over the other ranks and B = e^l_r, summed apart: they keep
their digits where p is near 1. Source: the two reductions are Megatron-LM's (arXiv 1909.08053), the rest ours.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .head import Head, logits_back_end, reduced


def auto_chunk_targets(weight: Tensor) -> int:
    return int(logits_back_end(weight).auto_chunk_targets(weight))


def new_buffer(head: Head, rows: int) -> Any:
    return logits_back_end(head.hidden).new_buffer(head, rows)


def forward(head: Head, buffer: Any, start: int, end: int) -> Any:
    """The back-end's chunk, its log-probs and entropies those over the whole vocabulary. A collective."""
    how, mine = logits_back_end(head.hidden), head.target_id[start:end] >= 0
    chunk = how.forward(head._replace(target_id=head.target_id.clamp(min=0)), buffer, start, end)
    assert head.group is not None
    lse = chunk.lse.reshape(-1)
    level = lse - reduced(lse.clone(), head.group, dist.ReduceOp.MAX)
    share, nothing = level.exp(), torch.zeros_like(level)
    sums = (
        torch.where(mine, nothing, share),
        torch.where(mine, share, nothing),
        share * (chunk.entropy - level),
        torch.where(mine, chunk.logp, nothing),
        torch.where(mine, chunk.rest, nothing),
    )
    others, own, spread, logp, rest = reduced(torch.stack(sums), head.group)
    total = others + own
    log_total = torch.where(own == 1, others.log1p(), total.log())  # m is the target's rank's: nothing is rounded
    known = own > 0  # no rank has a target outside the vocabulary
    return how.rescaled(
        chunk,
        mine=mine,
        log_share=level - log_total,
        logp=torch.where(known, logp - (others / own).log1p(), torch.nan),
        entropy=log_total + spread / total,
        rest=(others + own * rest) / total,
    )


def d_logits(head: Head, buffer: Any, chunk: Any, g_logp: Tensor, g_entropy: Tensor | None) -> Tensor:
    """This rank's columns of d(logits)."""
    return logits_back_end(head.hidden).d_logits(head, buffer, chunk, g_logp, g_entropy)
