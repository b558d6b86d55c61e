"""The rectangles of a tree's visible pairs, as varlen attention calls; flash.py says why."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class VarlenCall(NamedTuple):
    """Rectangle i: the call's queries cu_q[i] up to cu_q[i + 1] by its keys cu_k[i] up to cu_k[i + 1]."""

    query: Tensor | slice  # token indices; a slice where they are one range: what it selects is no copy
    key: Tensor | slice
    cu_q: Tensor  # [n + 1] int32
    cu_k: Tensor
    max_q: int  # the most queries of one rectangle
    max_k: int
    causal: bool


class VarlenWork(NamedTuple):
    """Calls, and where their results are: `row` and `n_rows` of merge.py, for queries and for keys."""

    calls: list[VarlenCall]
    query_row: Tensor
    n_query_rows: Tensor
    key_row: Tensor


def varlen_work(start: Tensor, end: Tensor, subtree_end: Tensor, parent: Tensor) -> list[Tensor]:
    """The work of a layout (its segments' arrays [S], on the CPU) as tensors, which is all that an operator takes.

    query_row, n_query_rows and key_row; cu_q of the causal call (it is its cu_k, too); query, key, cu_q and cu_k of
    each other one; last, int64 [n_calls, 4]: every call's max_q, max_k, and its first query and first key where its
    queries or keys are one range, else -1.
    """
    start, end, subtree_end, depth = _merge_chains(start, end, subtree_end, parent)
    longest = int((end - start).max())
    rectangles, numbers = [_cumulative(end - start)], [[longest, longest, 0, 0]]
    queries, keys = [], []
    for d in range(int(depth.max())):
        at = (depth == d) & (end < subtree_end)
        n_q, n_k = (subtree_end - end)[at], (end - start)[at]
        query, key = _tokens(end[at], n_q), _tokens(start[at], n_k)
        rectangles += query, key, _cumulative(n_q), _cumulative(n_k)
        numbers.append([int(n_q.max()), int(n_k.max()), _first_of_range(query), _first_of_range(key)])
        queries.append(query)
        keys.append(key)
    T = int(end[-1])
    n_rows = torch.tensor([T, *map(len, queries)], dtype=torch.int32)
    return [_rows(queries, T), n_rows, _rows(keys, T), *rectangles, torch.tensor(numbers)]


def read_varlen_work(work: list[Tensor]) -> VarlenWork:
    """`varlen_work` undone."""
    query_row, n_query_rows, key_row, cu, *rectangles, numbers = work
    (longest, *_), *others = numbers.tolist()
    everything = slice(None)
    calls = [VarlenCall(everything, everything, cu, cu, longest, longest, causal=True)]
    for i, (max_q, max_k, first_q, first_k) in enumerate(others):
        query, key, cu_q, cu_k = rectangles[4 * i : 4 * i + 4]
        tokens = _as_range(query, first_q), _as_range(key, first_k)
        calls.append(VarlenCall(*tokens, cu_q, cu_k, max_q, max_k, causal=False))
    return VarlenWork(calls, query_row, n_query_rows, key_row)


def _first_of_range(tokens: Tensor) -> int:
    """The first of ascending token indices if they are one range, else -1."""
    first, last = int(tokens[0]), int(tokens[-1])
    return first if last - first == len(tokens) - 1 else -1


def _as_range(tokens: Tensor, first: int) -> Tensor | slice:
    return tokens if first < 0 else slice(first, first + len(tokens))


def _rows(tokens: list[Tensor], T: int) -> Tensor:
    """int32 [n, T]: the place of each token in each of n lists of token indices, -1 where it is not there."""
    row = torch.full((len(tokens), T), -1, dtype=torch.int32)
    for row_i, tokens_i in zip(row, tokens, strict=True):
        row_i[tokens_i] = torch.arange(len(tokens_i), dtype=torch.int32)
    return row


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
