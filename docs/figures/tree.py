"""docs/figures/tree.svg: one prompt's answers as a tree, as the stream that is computed, and as rows.

    python docs/figures/tree.py          (from the repository's root)

Segments, ranges and token counts are those that cipo_fast.packing makes of these conversations.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from cipo_fast.packing import Node, build_trees, make_pack, row_tokens
from cipo_fast.records import Conversation, Segment

LENGTHS = {"P": 40, "A": 60, "G": 10, "C1": 55, "C2": 45, "B": 50, "D": 70}
PATHS = ("P A", "P A G C1", "P A G C2", "P B", "P D")  # a conversation each; the last segment is what was sampled
CONTEXT, ROLLOUT, CORRECTION = "#d5d9e0", "#9cc3ea", "#f5bf7f"
LANES = {"P": 0, "A": 0, "G": 0, "C1": 0, "C2": 1, "B": 2, "D": 3}
SCALE, LEFT, HEIGHT, LANE = 1.55, 24, 22, 32  # px a token, and px
WIDTH, TALL = 860, 556
NOTES = ("A is shown back: it is the anchor,", "G asks to check it, C1 and C2 answer")


def color(name: str) -> str:
    return CONTEXT if name in ("P", "G") else CORRECTION if name.startswith("C") else ROLLOUT


def text(x: float, y: float, words: str, style: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" {style}>{words}</text>'


def box(x: float, y: float, name: str) -> str:
    """A segment: its length is its tokens."""
    width = LENGTHS[name] * SCALE
    label = text(x + width / 2, y + 15, name, 'text-anchor="middle"')
    rect = f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{HEIGHT}" rx="3" fill="{color(name)}" stroke="#445"/>'
    return rect + label


def built() -> tuple[list[str], list[int], list[int], list[int], int]:
    """Of the stream: (names, start, end, subtree_end of each segment, tokens of one row a conversation)."""
    segments = {name: Segment([0] * length) for name, length in LENGTHS.items()}
    conversations = [
        Conversation(
            tuple(segments[name] for name in path.split()),
            [0.0] * LENGTHS[path.split()[-1]],
            "correction" if "C" in path else "rollout",
            1.0,
            1.0,
            0.0,
        )
        for path in PATHS
    ]
    trees = build_trees(conversations)
    layout = make_pack(trees).layout
    of = {id(segment.token_ids): name for name, segment in segments.items()}
    names = [of[id(node.token_ids)] for tree in trees for node in preorder(tree)]
    return names, layout.start.tolist(), layout.end.tolist(), layout.subtree_end.tolist(), row_tokens(conversations)


def preorder(node: Node) -> Iterator[Node]:
    yield node
    for child in node.children:
        yield from preorder(child)


def tree_panel(top: float) -> Iterator[str]:
    yield text(LEFT, top, "The tree: a segment begins at its position", 'class="head"')
    parents = {path.split()[-1]: path.split()[-2] for path in PATHS} | {"G": "A"}
    position = {"P": 0}
    for name in LENGTHS:
        if name != "P":
            position[name] = position[parents[name]] + LENGTHS[parents[name]]
    for name, start in position.items():
        x, y = LEFT + start * SCALE, top + 14 + LANES[name] * LANE
        parent = parents.get(name)
        if parent is not None and LANES[parent] != LANES[name]:
            above = top + 14 + LANES[parent] * LANE + HEIGHT
            yield f'<path d="M{x - 7:g} {above:g} V{y + HEIGHT / 2:g} H{x:g}" fill="none" stroke="#445"/>'
        yield box(x, y, name)
    for i, note in enumerate(NOTES):
        yield text(LEFT + 180 * SCALE, top + 28 + 18 * i, note)


def stream_panel(top: float, names: list[str], start: list[int], subtree_end: list[int]) -> Iterator[str]:
    total = subtree_end[0]
    yield text(LEFT, top, f"The stream: {total} tokens, segments in depth-first order", 'class="head"')
    for name, at in zip(names, start, strict=True):
        yield box(LEFT + at * SCALE, top + 14, name)
    y = top + 14 + HEIGHT + 12
    yield text(LEFT, y + 4, "who sees a segment: from its start to subtree_end", 'class="small"')
    y += 16
    for name, at, end in zip(names, start, subtree_end, strict=True):
        x0, x1 = LEFT + at * SCALE, LEFT + end * SCALE
        yield f'<line x1="{x0:g}" x2="{x1:g}" y1="{y:g}" y2="{y:g}" stroke="{color(name)}" stroke-width="5"/>'
        yield f'<line x1="{x1:g}" x2="{x1:g}" y1="{y - 5:g}" y2="{y + 5:g}" stroke="#445"/>'
        yield text(x0 - 3, y + 4, name, 'text-anchor="end" class="small"')
        y += 13


def rows_panel(top: float, tokens: int, rows: int) -> Iterator[str]:
    saved = f"{1 - tokens / rows:.0%} of them saved by the tree"
    yield text(LEFT, top, f"One row a conversation: {rows} tokens, {saved}", 'class="head"')
    for lane, path in enumerate(PATHS):
        x = float(LEFT)
        for name in path.split():
            yield box(x, top + 14 + lane * (HEIGHT + 5), name)
            x += LENGTHS[name] * SCALE


def mask_panel(
    left: float, top: float, names: list[str], start: list[int], end: list[int], subtree_end: list[int]
) -> Iterator[str]:
    """visible(q, k): k <= q < subtree_end[k]; a square of two segments is full, causal or empty."""
    side = 250 / subtree_end[0]
    yield text(left, top, "Row sees column", 'class="head"')
    top += 32
    size = subtree_end[0] * side
    yield f'<rect x="{left:g}" y="{top:g}" width="{size:g}" height="{size:g}" fill="#fff" stroke="#445"/>'
    for k, key in enumerate(names):
        x, x1 = left + start[k] * side, left + end[k] * side
        y, y1, below = top + start[k] * side, top + end[k] * side, top + subtree_end[k] * side
        yield f'<path d="M{x:g} {y:g} L{x1:g} {y1:g} H{x:g} Z" fill="{color(key)}" stroke="none"/>'
        yield f'<rect x="{x:g}" y="{y1:g}" width="{x1 - x:g}" height="{below - y1:g}" fill="{color(key)}"/>'
        yield text((x + x1) / 2, top - 5, key, 'text-anchor="middle" class="small"')
        yield text(left - 5, (y + y1) / 2 + 4, key, 'text-anchor="end" class="small"')
        for at in (x, y - top + left):
            yield f'<line x1="{at:g}" x2="{at:g}" y1="{top:g}" y2="{top + size:g}" stroke="#445" stroke-width="0.3"/>'
        yield f'<line x1="{left:g}" x2="{left + size:g}" y1="{y:g}" y2="{y:g}" stroke="#445" stroke-width="0.3"/>'


def legend(left: float, top: float) -> Iterator[str]:
    words = ((CONTEXT, "context: prompt, glue"), (ROLLOUT, "rollouts: targets"), (CORRECTION, "corrections: targets"))
    for i, (fill, what) in enumerate(words):
        y = top + 20 * i
        yield f'<rect x="{left:g}" y="{y:g}" width="16" height="12" rx="2" fill="{fill}" stroke="#445"/>'
        yield text(left + 24, y + 11, what)


def figure() -> str:
    names, start, end, subtree_end, rows = built()
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {TALL}" width="{WIDTH}" height="{TALL}">',
        "<style>text{font:12px sans-serif;fill:#222}.head{font-weight:bold;font-size:13px}.small{font-size:10px}",
        "</style>",
        f'<rect width="{WIDTH}" height="{TALL}" fill="#fff"/>',
        *tree_panel(28),
        *stream_panel(206, names, start, subtree_end),
        *rows_panel(392, subtree_end[0], rows),
        *mask_panel(WIDTH - 276, 206, names, start, end, subtree_end),
        *legend(WIDTH - 276, 42),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(figure(), encoding="utf-8")
