"""The rectangles of a tree's visible pairs, as varlen attention calls; tree_attention_flash.py says why."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class VarlenCall(NamedTuple):
    """Rectangle i: tokens query[cu_q[i] : cu_q[i + 1]] by key[cu_k[i] : cu_k[i + 1]]."""

    query: Tensor | slice  # token indices
    key: Tensor | slice
    cu_q: Tensor  # [n + 1] int32
    cu_k: Tensor
    max_q: int  # the most queries of one rectangle
    max_k: int
    causal: bool


def varlen_work(start: Tensor, end: Tensor, subtree_end: Tensor, parent: Tensor) -> list[Tensor]:
    """The calls of a layout (its segments' arrays [S], on the CPU) as tensors, which is all that an operator takes.

    Of the causal call cu_q (it is its cu_k, too), of each other one query, key, cu_q and cu_k; last max_q and max_k of
    every call [n_calls, 2] int64.
    """
    start, end, subtree_end, depth = _merge_chains(start, end, subtree_end, parent)
    tensors, longest = [_cumulative(end - start)], [[int((end - start).max())] * 2]
    for d in range(int(depth.max())):
        at = (depth == d) & (end < subtree_end)
        n_q, n_k = (subtree_end - end)[at], (end - start)[at]
        tensors += _tokens(end[at], n_q), _tokens(start[at], n_k), _cumulative(n_q), _cumulative(n_k)
        longest.append([int(n_q.max()), int(n_k.max())])
    return [*tensors, torch.tensor(longest)]


def varlen_calls(work: list[Tensor]) -> list[VarlenCall]:
    """The calls that `varlen_work` lists."""
    cu, *rectangles, longest = work
    (max_n, _), *max_qk = longest.tolist()
    everything = slice(None)
    calls = [VarlenCall(everything, everything, cu, cu, max_n, max_n, causal=True)]
    for i, (max_q, max_k) in enumerate(max_qk):
        query, key, cu_q, cu_k = rectangles[4 * i : 4 * i + 4]
        calls.append(VarlenCall(query, key, cu_q, cu_k, max_q, max_k, causal=False))
    return calls


def _merge_chains(
    start: Tensor, end: Tensor, subtree_end: Tensor, parent: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """start, end, subtree_end and depth [S'] of the segments, an only child being a part of its parent.

    In preorder an only child starts where its parent ends, and both have the same subtree_end.
    """
    has_parent = parent >= 0
    n_children = torch.bincount(parent[has_parent], minlength=len(parent))
    only_child = has_parent & (n_children[parent] == 1)
    depth: list[int] = []
    for above, only in zip(parent.tolist(), only_child.tolist(), strict=True):
        depth.append(0 if above < 0 else depth[above] + (not only))
    first = ~only_child
    merged_end = torch.cat([start[first][1:], end[-1:]])
    return start[first], merged_end, subtree_end[first], torch.tensor(depth)[first]


def _tokens(first: Tensor, length: Tensor) -> Tensor:
    """The ranges [first, first + length) in a row."""
    skipped = first - (length.cumsum(0) - length)
    return torch.arange(int(length.sum())) + skipped.repeat_interleave(length)


def _cumulative(length: Tensor) -> Tensor:
    return F.pad(length.cumsum(0), (1, 0)).int()
