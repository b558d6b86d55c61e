"""Where each token of a packed stream of trees stands, and which tokens it sees."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, Self

import torch

from ..dispatch import attention_implementation
from .lists import WorkLists
from .rectangles import varlen_work
from .worklist import tree_work

# A tree of L tokens is cut into runs of about L / 16 queries, within these bounds: the CPU flash kernel's tiles
# have 32 queries at least, and 512 queries of a 16k-token tree already need a float mask of 32 MiB.
MIN_QUERIES, MAX_QUERIES = 32, 512
MAX_BLOCK_PAIRS = 2**23  # (query, key) slots of one block, unless one run alone has more


class QueryBlock(NamedTuple):
    """Runs of consecutive queries of one tree each, every one with the keys that any of its queries sees.

    Runs are padded to common lengths. A padded query repeats its run's last one (it sees something, so no NaN); a
    padded key has `key_end` 0, so nothing sees it.
    """

    query: torch.Tensor  # [n, Lq] token index
    key: torch.Tensor  # [n, Lk] token index
    key_end: torch.Tensor  # [n, Lk] the key's subtree_end

    def mask(self) -> torch.Tensor:
        """Bool [n, Lq, Lk]: does the query see the key."""
        return visible(self.query[:, :, None], self.key[:, None, :], self.key_end[:, None, :])


def visible(query: torch.Tensor, key: torch.Tensor, key_end: torch.Tensor) -> torch.Tensor:
    """Does `query` see `key`: the definition. All three broadcast: token indices, and the keys' `subtree_end`."""
    return (key <= query) & (query < key_end)


@dataclass(frozen=True, eq=False)
class TreeLayout:
    """One stream of T tokens holding several trees, their segments in DFS preorder.

    Preorder makes a segment's subtree one range of tokens, so visibility needs one integer a key:
    `visible(q, k) <=> k <= q < subtree_end[k]`. Ours.

    The segment tensors (int64 [S]) stay on the CPU, where work lists are built without a device synchronisation; the
    token tensors (int64 [T]) move with `to`, and so do the lists that `prepare`, or their first use, has built.
    """

    start: torch.Tensor  # [S] first token
    end: torch.Tensor  # [S] past the last token
    subtree_end: torch.Tensor  # [S] past the last token of the segment's last descendant
    parent: torch.Tensor  # [S] parent segment, -1 for the root of a tree
    position_ids: torch.Tensor  # [T] tokens before this one on its root path
    subtree_end_of_token: torch.Tensor  # [T] its segment's subtree_end

    @classmethod
    def from_parents(cls, lengths: list[int] | torch.Tensor, parents: list[int] | torch.Tensor) -> Self:
        """The layout of segments with these lengths (tokens) and parents (segment index, -1 starts a new tree).

        ValueError, naming the segment: a length below 1, a parent that is not an earlier segment, an order that is
        not a DFS preorder; or no segment, or lists of different sizes.
        """
        lengths, parents = _ints(lengths), _ints(parents)
        if len(lengths) != len(parents) or not lengths:
            raise ValueError(f"{len(lengths)} lengths and {len(parents)} parents: expected one of each a segment")
        start: list[int] = []
        depth: list[int] = []  # tokens above the segment
        subtree_end = [0] * len(lengths)
        open_path: list[int] = []  # the segments that may still get children, root first
        cursor = 0
        for i, (length, parent) in enumerate(zip(lengths, parents, strict=True)):
            if length < 1:
                raise ValueError(f"segment {i}: length {length}, expected at least 1")
            if not -1 <= parent < i:
                raise ValueError(f"segment {i}: parent {parent} is not an earlier segment (nor -1, a new tree)")
            while open_path and open_path[-1] != parent:
                subtree_end[open_path.pop()] = cursor
            if parent >= 0 and not open_path:
                raise ValueError(f"segment {i}: its parent {parent} was already closed, not a DFS preorder")
            start.append(cursor)
            depth.append(depth[parent] + lengths[parent] if parent >= 0 else 0)
            open_path.append(i)
            cursor += length
        for i in open_path:
            subtree_end[i] = cursor
        length_S, start_S, depth_S, subtree_end_S = map(torch.tensor, (lengths, start, depth, subtree_end))
        return cls(
            start=start_S,
            end=start_S + length_S,
            subtree_end=subtree_end_S,
            parent=torch.tensor(parents),
            position_ids=torch.arange(cursor) + (depth_S - start_S).repeat_interleave(length_S),
            subtree_end_of_token=subtree_end_S.repeat_interleave(length_S),
        )

    @property
    def num_tokens(self) -> int:
        return len(self.position_ids)

    @property
    def device(self) -> torch.device:
        return self.position_ids.device

    def to(self, device: torch.device | str) -> Self:
        """The same layout with its token tensors, and the work lists built so far, on `device`. From pinned memory to
        CUDA nothing waits."""
        device = torch.device(device)
        if device == self.device:
            return self
        return self._map(lambda x: x.to(device, non_blocking=device.type == "cuda"))

    def pin_memory(self) -> Self:
        """The same layout in pinned memory; needs CUDA."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, move: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        tokens = {name: move(getattr(self, name)) for name in ("position_ids", "subtree_end_of_token")}
        moved = replace(self, **tokens)
        for name in vars(self).keys() & {"_attention_lists", "_varlen_lists"}:
            vars(moved)[name] = vars(self)[name].map(move)
        return moved

    def prepare(self, impl: str = "auto") -> Self:
        """Builds what `tree_attention(..., impl=impl)` loops over on a GPU, so that no forward pass does; returns self.

        auto: what bf16 runs on this machine. Where that is a back-end without such lists, nothing is built."""
        if impl == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
            impl = attention_implementation(torch.empty(0, dtype=torch.bfloat16, device=device))
        if impl == "triton":
            _ = self._attention_lists
        elif impl == "flash":
            _ = self._varlen_lists
        return self

    def dense_mask(self) -> torch.Tensor:
        """Bool [T, T], query by key: the definition of who sees whom."""
        token = torch.arange(self.num_tokens, device=self.device)
        return visible(token[:, None], token[None, :], self.subtree_end_of_token[None, :])

    def visible_pairs(self) -> int:
        """Visible (query, key) pairs; attention costs 4 D FLOPs a pair and head forward, 10 D backward."""
        # sum over keys k of subtree_end - k: an arithmetic series in each segment
        pairs = (self.end - self.start) * (2 * self.subtree_end - self.start - self.end + 1) // 2
        return int(pairs.sum())

    @cached_property
    def query_blocks(self) -> list[QueryBlock]:
        """The stream cut into blocks of queries with their keys, on `device`; every token is in exactly one run.

        Finished branches drop out of a run's keys: what is computed stays within a small factor of the visible
        pairs. Built once a pack, used by every layer, forward, backward and recomputation.
        """
        first, last, key, key_count = self._query_runs()
        key_offset = key_count.cumsum(0) - key_count
        blocks = []
        for runs in _similar_runs((last - first + 1).tolist(), key_count.tolist()):
            n_queries, n_keys = int((last - first)[runs].max()) + 1, int(key_count[runs].max())
            query_nq = (first[runs, None] + torch.arange(n_queries)).minimum(last[runs, None])
            slot_k = torch.arange(n_keys)
            is_key_nk = slot_k < key_count[runs, None]
            key_nk = key[(key_offset[runs, None] + slot_k).where(is_key_nk, 0)]
            key_end_nk = self._subtree_end_cpu[key_nk].where(is_key_nk, 0)
            blocks.append(QueryBlock(*(x.to(self.device) for x in (query_nq, key_nk, key_end_nk))))
        return blocks

    @cached_property
    def block_slot_of_token(self) -> torch.Tensor:
        """[T] each token's row among the flattened, concatenated queries of `query_blocks`."""
        query = torch.cat([block.query.flatten() for block in self.query_blocks])
        slot = torch.arange(len(query), device=self.device)
        # The first slot of each token: later ones are padding.
        return slot.new_empty(self.num_tokens).scatter_reduce_(0, query, slot, "amin", include_self=False)

    @property
    def attention_work(self) -> list[torch.Tensor]:
        """`TreeWork.tensors()`, what the Triton kernels loop over, on `device`. Built once a pack."""
        return self._attention_lists.tensors

    @property
    def varlen_work(self) -> list[torch.Tensor]:
        """`varlen_work` of the layout, on `device` but for its last tensor, which the host reads. Built once a pack."""
        return self._varlen_lists.tensors

    @cached_property
    def _attention_lists(self) -> WorkLists:
        work = tree_work(self.start, self.end, self.subtree_end, self.parent)
        return WorkLists.of(work.tensors()).map(lambda x: x.to(self.device))

    @cached_property
    def _varlen_lists(self) -> WorkLists:
        *tensors, numbers = varlen_work(self.start, self.end, self.subtree_end, self.parent)
        return WorkLists.of(tensors, on_host=(numbers,)).map(lambda x: x.to(self.device))

    @property
    def _subtree_end_cpu(self) -> torch.Tensor:
        return self.subtree_end.repeat_interleave(self.end - self.start)

    def _query_runs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Each run's first and last query token [R], all runs' keys in a row, and each run's number of keys [R]."""
        root = self.parent < 0
        tree_start, tree_len = self.start[root], (self.subtree_end - self.start)[root]
        n_runs = -(-tree_len // (tree_len // 16).clamp(MIN_QUERIES, MAX_QUERIES))
        tree = torch.arange(len(n_runs)).repeat_interleave(n_runs)
        i = torch.arange(len(tree)) - (n_runs.cumsum(0) - n_runs)[tree]  # a run's number in its tree
        first = tree_start[tree] + tree_len[tree] * i // n_runs[tree]
        last = tree_start[tree] + tree_len[tree] * (i + 1) // n_runs[tree] - 1

        n_before = last + 1 - tree_start[tree]  # tokens of the tree up to the run's last query
        run = torch.arange(len(tree)).repeat_interleave(n_before)
        token = torch.arange(len(run)) - (n_before.cumsum(0) - n_before - tree_start[tree])[run]
        seen = self._subtree_end_cpu[token] > first[run]
        return first, last, token[seen], torch.bincount(run[seen], minlength=len(tree))


def _ints(x: list[int] | torch.Tensor) -> list[int]:
    return x.tolist() if isinstance(x, torch.Tensor) else list(x)


def _similar_runs(n_queries: list[int], n_keys: list[int]) -> list[torch.Tensor]:
    """Groups of runs padded together: key counts within a factor of two, size within MAX_BLOCK_PAIRS."""
    groups: list[list[int]] = []
    for run in sorted(range(len(n_keys)), key=n_keys.__getitem__):
        group = groups[-1] if groups else []
        pairs = (len(group) + 1) * max(n_queries[r] for r in [*group[-1:], run]) * n_keys[run]
        if not group or n_keys[run] > 2 * n_keys[group[0]] or pairs > MAX_BLOCK_PAIRS:
            groups.append(group := [])
        group.append(run)
    return [torch.tensor(group) for group in groups]
