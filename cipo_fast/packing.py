"""Conversations -> token trees -> packs: every shared token once, every target exactly once.

A tree is stored in DFS preorder, so visibility needs one integer a key: visible(q, k) <=> k <= q < subtree_end[k].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from cipo_kernels import TreeLayout
from torch import Tensor

from cipo_fast.errors import UserError
from cipo_fast.records import STREAMS, Conversation, Segment


@dataclass(eq=False)
class Node:
    """A segment in a tree. Where `conversation` is given, its tokens from `first_target` on are that one's targets."""

    token_ids: list[int]
    conversation: Conversation | None = None
    first_target: int = 0
    children: list[Node] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) + sum(child.num_tokens for child in self.children)

    @property
    def longest_path(self) -> int:
        """Tokens from here to the farthest leaf."""
        return len(self.token_ids) + max((child.longest_path for child in self.children), default=0)


@dataclass(frozen=True)
class CostModel:
    """FLOPs of a forward and backward pass; or its time, what packs are balanced by, in FLOPs of the linear layers."""

    per_token: float  # linear layers
    per_pair: float  # attention, one visible (query, key) pair; for time, its FLOPs times linear rate / attention rate
    per_target: float  # language-model head

    @property
    def forward(self) -> CostModel:
        """Of the forward pass alone: 2 of 6 FLOPs a weight, 4 of 14 a pair and dimension (policy.flops_model)."""
        return CostModel(self.per_token / 3, self.per_pair * 2 / 7, self.per_target / 3)

    def of(self, node: Node, depth: int = 0) -> float:
        n = len(node.token_ids)
        pairs = n * depth + n * (n + 1) // 2
        targets = n - node.first_target if node.conversation else 0
        own = n * self.per_token + pairs * self.per_pair + targets * self.per_target
        return own + sum(self.of(child, depth + n) for child in node.children)


@dataclass(frozen=True)
class Pack:
    """One stream of trees and its targets, N rows; what a forward and backward pass eats.

    `conversation` says which conversation of `conversations` a target belongs to; a conversation's targets are
    consecutive. old_logp None means on-policy (the current log-prob), ref_logp None means no KL term.
    """

    input_ids: Tensor  # [T] int64
    layout: TreeLayout
    pred_index: Tensor  # [N] int64, the token whose hidden state predicts the target
    target_id: Tensor  # [N] int64
    conversation: Tensor  # [N] int64, index into `conversations`
    stream: Tensor  # [N] int64, index into STREAMS
    advantage: Tensor  # [N] fp32
    rl_weight: Tensor  # [N] fp32
    ce_weight: Tensor  # [N] fp32
    sampler_logp: Tensor  # [N] fp32, nan where no engine sampled the token
    last_token: Tensor  # [conversations] int64, where each one ends in the stream
    conversations: tuple[Conversation, ...]
    old_logp: Tensor | None = None  # [N] fp32
    ref_logp: Tensor | None = None  # [N] fp32

    @property
    def target_counts(self) -> list[int]:
        """Targets of each conversation: known to the host, whatever device the pack is on."""
        return [len(c.segments[-1].token_ids) for c in self.conversations]

    def to(self, device: torch.device) -> Pack:
        """From pinned memory to CUDA nothing waits."""
        return self._map(
            lambda x: x.to(device, non_blocking=device.type == "cuda") if isinstance(x, Tensor) else x.to(device)
        )

    def pin_memory(self) -> Pack:
        """The same pack in pinned memory; needs CUDA."""
        return self._map(lambda x: x.pin_memory())

    def _map(self, move: Callable[[Any], Any]) -> Pack:
        moved: dict[str, Any] = {
            f.name: move(value)
            for f in dataclasses.fields(self)
            if isinstance(value := getattr(self, f.name), Tensor | TreeLayout)
        }
        return dataclasses.replace(self, **moved)


# ------------------------------------------------------------------------------------------ conversations -> trees


def build_trees(conversations: list[Conversation], packing: str = "tree") -> list[Node]:
    """Conversations that share segments (by identity) become one tree; packing="rows" makes each a tree of its own."""
    if packing == "rows":
        return [_row(conversation) for conversation in conversations]
    roots: list[Node] = []
    nodes: dict[Segment, Node] = {}
    for conversation in conversations:
        siblings = roots
        for segment in conversation.segments:
            if segment not in nodes:
                nodes[segment] = Node(segment.token_ids)
                siblings.append(nodes[segment])
            node = nodes[segment]
            siblings = node.children
        node.conversation = conversation
    return roots


def _row(conversation: Conversation) -> Node:
    tokens = [token for segment in conversation.segments for token in segment.token_ids]
    return Node(tokens, conversation, len(tokens) - len(conversation.segments[-1].token_ids))


def row_tokens(conversations: list[Conversation]) -> int:
    """Tokens that one row a conversation would cost."""
    return sum(len(segment.token_ids) for conversation in conversations for segment in conversation.segments)


def split_tree(tree: Node, capacity: int) -> list[Node]:
    """Cut a tree into trees of at most `capacity` tokens. A piece repeats its ancestors as context, without targets,
    so every target stays in exactly one piece; a rollout keeps its whole correction subtree where that fits."""
    if tree.longest_path > capacity:
        raise UserError(
            f"train.pack_tokens={capacity} cannot hold one conversation of {tree.longest_path} tokens: raise it"
        )
    return _split(tree, capacity)


def _split(node: Node, room: int) -> list[Node]:
    if node.num_tokens <= room:
        return [node]
    room -= len(node.token_ids)
    pieces: list[Node] = []
    left = 0
    for part in (part for child in node.children for part in _split(child, room)):
        size = part.num_tokens
        if not pieces or size > left:
            pieces.append(Node(node.token_ids, None if pieces else node.conversation, node.first_target))
            left = room
        pieces[-1].children.append(part)
        left -= size
    return pieces


# ------------------------------------------------------------------------------------------------- trees -> packs


def pack_trees(trees: list[Node], capacity: int, cost: CostModel, ranks: int = 1) -> list[list[list[Node]]]:
    """Distribute trees over packs of at most `capacity` tokens: `[rank][pack] -> trees`, equally many packs a rank.

    Longest processing time first: the costliest piece goes to the cheapest pack it fits in. The number of packs is
    the smallest multiple of `ranks` for which that works out. Deterministic; every rank computes the same answer.
    """
    pieces = [piece for tree in trees for piece in split_tree(tree, capacity)]
    sizes = [piece.num_tokens for piece in pieces]
    costs = [cost.of(piece) for piece in pieces]
    order = sorted(range(len(pieces)), key=lambda i: (-costs[i], i))
    n_bins = -(-max(1, -(-sum(sizes) // capacity)) // ranks) * ranks
    while (bins := _fill(order, sizes, costs, n_bins, capacity)) is None:
        n_bins += ranks
    packs = [[pieces[i] for i in sorted(members)] for members in bins]
    return [packs[rank::ranks] for rank in range(ranks)]


def _fill(order: list[int], sizes: list[int], costs: list[float], n_bins: int, capacity: int) -> list[list[int]] | None:
    bins: list[list[int]] = [[] for _ in range(n_bins)]
    used = [0] * n_bins
    load = [0.0] * n_bins
    for i in order:
        best = min(
            (b for b in range(n_bins) if used[b] + sizes[i] <= capacity), key=lambda b: (load[b], b), default=None
        )
        if best is None:
            return None
        bins[best].append(i)
        used[best] += sizes[i]
        load[best] += costs[i]
    return bins


def make_pack(trees: list[Node], attention: str = "auto") -> Pack:
    """Lay trees out as one stream. Without trees the pack is a single token with no targets: it weighs nothing, and
    lets a rank without work take part in the collectives.

    What `attention` (model.attention) loops over is built here, once, and where there is a GPU the pack is pinned: the
    learner then queues one pack after the other, and waits neither for a list nor for a copy."""
    lengths: list[int] = []
    parents: list[int] = []
    ends: list[int] = []
    input_ids: list[int] = []
    pred_index: list[int] = []
    target_id: list[int] = []
    found: list[Conversation] = []
    last_token: list[int] = []
    for node, parent in _preorder(trees or [Node([0])]):
        start, n = len(input_ids), len(node.token_ids)
        input_ids += node.token_ids
        lengths.append(n)
        parents.append(parent)
        ends.append(start + n)
        if node.conversation is not None:
            first = node.first_target
            branch = (
                start + first - 1 if first else ends[parent] - 1
            )  # a segment's first token is predicted by its parent
            pred_index += [branch, *range(start + first, start + n - 1)]
            target_id += node.token_ids[first:]
            found.append(node.conversation)
            last_token.append(ends[-1] - 1)
    counts = torch.tensor([len(c.segments[-1].token_ids) for c in found], dtype=torch.int64)
    pack = Pack(
        input_ids=torch.tensor(input_ids),
        layout=TreeLayout.from_parents(lengths, parents).prepare(attention),
        pred_index=torch.tensor(pred_index, dtype=torch.int64),
        target_id=torch.tensor(target_id, dtype=torch.int64),
        conversation=torch.arange(len(found)).repeat_interleave(counts),
        stream=torch.tensor([STREAMS.index(c.stream) for c in found], dtype=torch.int64).repeat_interleave(counts),
        advantage=torch.tensor([c.advantage for c in found], dtype=torch.float32).repeat_interleave(counts),
        rl_weight=torch.tensor([c.rl_weight for c in found], dtype=torch.float32).repeat_interleave(counts),
        ce_weight=torch.tensor([c.ce_weight for c in found], dtype=torch.float32).repeat_interleave(counts),
        sampler_logp=torch.tensor([lp for c in found for lp in _sampler_logps(c)], dtype=torch.float32),
        last_token=torch.tensor(last_token, dtype=torch.int64),
        conversations=tuple(found),
    )
    return pack.pin_memory() if torch.cuda.is_available() else pack


def _preorder(trees: list[Node]) -> Iterator[tuple[Node, int]]:
    """(node, its parent's place in this order or -1), DFS preorder."""
    stack = [(tree, -1) for tree in reversed(trees)]
    index = 0
    while stack:
        node, parent = stack.pop()
        yield node, parent
        stack.extend((child, index) for child in reversed(node.children))
        index += 1


def _sampler_logps(conversation: Conversation) -> list[float]:
    n = len(conversation.segments[-1].token_ids)
    return conversation.sampler_logps if conversation.sampler_logps is not None else [float("nan")] * n
