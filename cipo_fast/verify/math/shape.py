"""The class of an answer, and what was read of it: read.py reads texts into shapes, compare.py compares."""

from __future__ import annotations

from dataclasses import dataclass, field

from cipo_fast.verify.math import region as regions
from cipo_fast.verify.math.exact import Number
from cipo_fast.verify.math.parse import Node
from cipo_fast.verify.math.region import Region
from cipo_fast.verify.math.text import Refused, canonical


@dataclass(frozen=True)
class Shape:
    """A classified answer.

    kind: choice, scalar, list, set, tuple, union, matrix, region, equation, inequality, base, ratio, clock, words,
    opaque (none of these). `name`: the left side of x = 7 or f(x) = 2x. `equation`: left minus right side of the
    same. `items`: of lists, sets, tuples, and rows of matrices; of an equation a + b = 12, the 12.
    """

    kind: str
    text: str
    items: tuple[Shape, ...] = ()
    node: Node | None = None
    number: Number | None = None
    unit: str | None = None
    percent: bool = False
    brackets: str = ""
    name: Node | None = None
    equation: Node | None = None
    region: Region | None = None
    parts: tuple[int, ...] | tuple[str, ...] = field(default=())


def opaque(text: str) -> Shape:
    return Shape("opaque", canonical(text))


def as_region(shape: Shape) -> Region | None:
    """A region of the reals, where the shape is one: an interval, a set of numbers, an inequality."""
    if shape.region is not None:
        return shape.region
    try:
        if shape.kind == "tuple" and len(shape.items) == 2 and shape.brackets:
            low, high = (regions.bound(item.node) if item.node else None for item in shape.items)
            if low is None or high is None or low > high:
                return None
            return regions.interval(low, high, shape.brackets[0] == "[", shape.brackets[1] == "]") or None
        if shape.kind in ("set", "list") or (shape.kind == "scalar" and shape.node):
            items = shape.items if shape.kind != "scalar" else (shape,)
            found = [regions.point(regions.bound(item.node)) for item in items if item.node]
            return regions.union(*found) if len(found) == len(items) and found else None
    except Refused:
        return None
    return None
