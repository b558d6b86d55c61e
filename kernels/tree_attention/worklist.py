"""What the programs of the Triton tree attention loop over, from the segment arrays alone.

The stream is cut into tiles of at most TILE tokens. Segments shorter than that share them with neighbours. Others
start a tile, unless they can go on in their parent's last one with no more to mask: for tiles of queries, first
children, who see all that the parent's tokens see before the tile; for tiles of keys, only children, seen by the same
later queries. A program owns one tile, or a part of one, and streams the tokens on the other side of the score matrix:
first full tiles, where every pair is visible and no mask is computed, then masked ones, which test each pair. Ours.

    forward, dQ: the tile's queries meet the root path of its first one, then the tile itself
    dK, dV: the tile's keys meet the tile itself, then all queries up to the last `subtree_end`

A tile of queries meets itself in masked tiles that start at its first token, so that a program that owns a part of it
can leave out the keys past its last query.
"""

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

OWN_TILE = 128  # tokens at most of an item's own tile
TILE = 64  # tokens of a full tile, and of a masked one at most; ranges to mask are merged across smaller gaps
# dK/dV of a prompt meets the queries of its whole tree: no program takes more than this share of all the work, and
# none is split below MIN_SPLIT tiles.
MAX_SHARE, MIN_SPLIT = 1 / 64, 16


class Item(IntEnum):
    """Columns of `TileWork.item`."""

    FIRST = 0  # token of the item's own tile
    STOP = 1  # past the last one
    FULL_FIRST = 2  # its range in `full`
    FULL_STOP = 3
    MASKED_FIRST = 4  # and in `masked`
    MASKED_STOP = 5
    SLOT = 6  # among the partial results, -1 where it is alone on its tile


class TileWork(NamedTuple):
    """An item a tile, or a part of a split one, longest first; one or more programs a key head take it. `full` and
    `masked` hold the streamed tiles of all items, and a last one that no item has: programs look one ahead."""

    item: Tensor  # int32 [n, len(Item)]
    full: Tensor  # int32 [n_full + 1] first token
    masked: Tensor  # int32 [n_masked + 1, 2] first token, past the last token

    def n_full(self) -> Tensor:
        """[n] full tiles an item."""
        return self.item[:, Item.FULL_STOP] - self.item[:, Item.FULL_FIRST]

    def n_masked(self) -> Tensor:
        return self.item[:, Item.MASKED_STOP] - self.item[:, Item.MASKED_FIRST]


class TreeWork(NamedTuple):
    """All a pack's launches need. `partial` has a row a slot: its tile's first token, past the last one, and the
    number of partial results to add up from this slot on, 0 in all but a tile's first slot."""

    by_query: TileWork
    by_key: TileWork  # items of more than TILE tokens
    by_few_keys: Tensor  # the other items, which name tiles of `by_key`
    partial: Tensor  # int32 [n_slots, 3]

    def tensors(self) -> list[Tensor]:
        """What an operator takes of it."""
        return [*self.by_query, *self.by_key, self.by_few_keys, self.partial]

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Self:
        """`tensors` undone."""
        n = len(TileWork._fields)
        return cls(TileWork(*tensors[:n]), TileWork(*tensors[n : 2 * n]), *tensors[2 * n :])


def tree_work(start: Tensor, end: Tensor, subtree_end: Tensor, parent: Tensor) -> TreeWork:
    """The work of a layout with these segments, [S] each, in preorder, on the CPU; parent: -1 for a root."""
    first_child = parent == torch.arange(len(parent)) - 1
    first, stop = _tiles(start, end, first_child & (subtree_end == subtree_end[parent]))
    by_key, partial = _split(_work(first, stop, *_query_ranges(first, stop, start, end, subtree_end)))
    first, stop = _tiles(start, end, first_child)
    by_query = _longest_first(_work(first, stop, *_key_ranges(first, stop, start, end, subtree_end, parent)))
    is_short = by_key.item[:, Item.STOP] - by_key.item[:, Item.FIRST] <= TILE
    return TreeWork(by_query, by_key._replace(item=by_key.item[~is_short]), by_key.item[is_short], partial)


def _tiles(start: Tensor, end: Tensor, goes_on: Tensor) -> tuple[Tensor, Tensor]:
    """First and past the last token of each tile; goes_on: bool [S], may the segment share one with that before it.
    Short neighbours always may."""
    short = end - start < OWN_TILE
    opens = torch.ones_like(short)
    opens[1:] = ~(short[1:] & short[:-1] | goes_on[1:])
    run_start = start[opens]
    run_end = torch.cat((run_start[1:], end[-1:]))
    n = _ceil_div(run_end - run_start, OWN_TILE)
    first = _arange_each(run_start, n, OWN_TILE)
    return first, (first + OWN_TILE).minimum(run_end.repeat_interleave(n))


def _key_ranges(
    first: Tensor, stop: Tensor, start: Tensor, end: Tensor, subtree_end: Tensor, parent: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(tile, lo, hi, is_full) of the ranges of keys each tile of queries meets, tile by tile, root first."""
    tile, segment = _paths(first, start, parent)
    lo, hi, is_full = start[segment], end[segment].minimum(first[tile]), subtree_end[segment] >= stop[tile]
    # After its path, the tile itself.
    tile, order = torch.cat((tile, torch.arange(len(first)))).sort(stable=True)
    lo, hi = torch.cat((lo, first))[order], torch.cat((hi, stop))[order]
    is_full = torch.cat((is_full, torch.zeros_like(first, dtype=torch.bool)))[order]

    # What lies between two ranges of a path are finished branches: a mask hides them.
    gap = torch.where(is_full, 0, TILE - 1)
    opens = torch.ones_like(is_full)
    opens[1:] = (tile[1:] != tile[:-1]) | (is_full[1:] != is_full[:-1]) | (lo[1:] - hi[:-1] > gap[1:])
    opens |= lo == first[tile]  # the tile itself
    closes = torch.cat((opens[1:], opens[:1]))
    return tile[opens], lo[opens], hi[closes], is_full[opens]


def _paths(first: Tensor, start: Tensor, parent: Tensor) -> tuple[Tensor, Tensor]:
    """(tile, segment), int64, of the segments that a tile's first query sees and that start before it: tile by tile,
    root first. One pass a level of the trees, over the tiles that reach it."""
    segment = torch.searchsorted(start, first, right=True) - 1  # that of the tile's first query
    segment = torch.where(start[segment] < first, segment, parent[segment])
    tile = torch.arange(len(first))
    path = []
    while len(tile):
        below_root = segment >= 0
        tile, segment = tile[below_root], segment[below_root]
        path.append(tile * len(start) + segment)
        segment = parent[segment]
    tile_and_segment = torch.cat(path).sort().values  # preorder: a parent comes before its children
    return tile_and_segment // len(start), tile_and_segment % len(start)


def _query_ranges(
    first: Tensor, stop: Tensor, start: Tensor, end: Tensor, subtree_end: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(tile, lo, hi, is_full) of the ranges of queries each tile of keys meets, tile by tile: itself, the queries
    that see all its keys, the queries that see some."""
    tile_of_token = torch.arange(len(first)).repeat_interleave(stop - first)
    subtree_end_of_token = subtree_end.repeat_interleave(end - start)
    all_end, any_end = (
        torch.zeros_like(first).scatter_reduce(0, tile_of_token, subtree_end_of_token, reduce, include_self=False)
        for reduce in ("amin", "amax")
    )
    some = all_end.maximum(stop)
    lo = torch.stack((first, stop, some), 1).flatten()
    hi = torch.stack((stop, all_end, any_end), 1).flatten()
    tile = torch.arange(len(first)).repeat_interleave(3)
    is_full = torch.tensor([False, True, False]).repeat(len(first))
    keep = lo < hi
    return tile[keep], lo[keep], hi[keep], is_full[keep]


def _work(first: Tensor, stop: Tensor, tile: Tensor, lo: Tensor, hi: Tensor, is_full: Tensor) -> TileWork:
    """One item a tile, in stream order. What is left of a full range after its full tiles is masked."""
    n_full = torch.where(is_full, (hi - lo) // TILE, 0)
    lo_masked = lo + n_full * TILE
    n_masked = _ceil_div(hi - lo_masked, TILE)
    masked = _arange_each(lo_masked, n_masked, TILE)
    columns = [first, stop]
    for n in (n_full, n_masked):
        stop = torch.zeros_like(first).index_add(0, tile, n).cumsum(0)
        columns += [torch.cat((torch.zeros_like(stop[:1]), stop[:-1])), stop]
    masked = torch.stack((masked, (masked + TILE).minimum(hi.repeat_interleave(n_masked))), 1)
    return TileWork(
        item=torch.stack((*columns, torch.full_like(first, -1)), 1).int(),
        full=F.pad(_arange_each(lo, n_full, TILE), (0, 1)).int(),
        masked=F.pad(masked, (0, 0, 0, 1)).int(),
    )


def _cost(work: TileWork) -> Tensor:
    """Tiles of each item."""
    return work.n_full() + work.n_masked()


def _longest_first(work: TileWork) -> TileWork:
    return work._replace(item=work.item[_cost(work).argsort(descending=True, stable=True)])


def _split(work: TileWork) -> tuple[TileWork, Tensor]:
    """Cuts items above MAX_SHARE of the work into equal parts, each with a slot; returns these slots too."""
    cost = _cost(work)
    n_parts = _ceil_div(cost, max(int(cost.sum() * MAX_SHARE), MIN_SPLIT)).long()
    part = _arange_each(torch.zeros_like(n_parts), n_parts, 1)
    item, n = work.item.repeat_interleave(n_parts, 0), n_parts.repeat_interleave(n_parts)
    is_part = n > 1
    for first, stop in ((Item.FULL_FIRST, Item.FULL_STOP), (Item.MASKED_FIRST, Item.MASKED_STOP)):
        stream_start, length = item[:, first].clone(), item[:, stop] - item[:, first]
        item[:, first] = stream_start + length * part // n
        item[:, stop] = stream_start + length * (part + 1) // n
    item[is_part, Item.SLOT] = torch.arange(int(is_part.sum()), dtype=torch.int32)
    partial = torch.stack((item[:, Item.FIRST], item[:, Item.STOP], torch.where(part == 0, n, 0)), 1)[is_part].int()
    return _longest_first(work._replace(item=item)), partial


def _arange_each(start: Tensor, n: Tensor, step: int) -> Tensor:
    """start, start + step, ... n of them, for each of start and n, in a row."""
    i = torch.arange(int(n.sum())) - (n.cumsum(0) - n).repeat_interleave(n)
    return start.repeat_interleave(n) + i * step


def _ceil_div(a: Tensor, b: int) -> Tensor:
    return (a + b - 1) // b
