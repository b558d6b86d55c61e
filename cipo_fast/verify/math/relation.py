"""Equations, chains of them and inequalities, from parts that have been read."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

from cipo_fast.verify.math import region as regions
from cipo_fast.verify.math.evaluate import same
from cipo_fast.verify.math.names import SELF, defines, is_name, is_sum
from cipo_fast.verify.math.parse import Node
from cipo_fast.verify.math.points import symbols
from cipo_fast.verify.math.region import Region
from cipo_fast.verify.math.shape import Shape, opaque
from cipo_fast.verify.math.text import Refused, canonical


def chain(text: str, parts: list[Shape], signs: list[str]) -> Shape:
    """x = 7, f(x) = 2x, (x, y) = (1, 2), 3 + 4 = 7; a chain whose values differ is no answer at all."""
    if is_name(parts[-1]) and not is_name(parts[0]):
        parts, signs = parts[::-1], signs[::-1]
    name = parts[0] if is_name(parts[0]) else None
    if name and name.node and not defines(name.node, parts[-1].node):
        name = None
    summed = parts[0].node if name is None and parts[0].node and is_sum(parts[0].node) and len(parts) > 2 else None
    values = parts[1:] if name or summed else parts
    while name and len(values) > 1 and is_name(values[0]):
        values, signs = values[1:], signs[1:]
    signs = signs[len(signs) - len(values) + 1 :] if len(values) > 1 else []
    if name is None and len(values) == 2 and values[0].node and values[1].node:
        if symbols(values[0].node):
            return _equation(text, values[0], values[1])
        if symbols(values[1].node):  # 6 = 2x + 4y
            return _equation(text, values[1], values[0])
    if name is None and any(value.node is None or symbols(value.node) for value in values):
        return opaque(text)
    for (one, other), sign in zip(pairwise(values), signs, strict=False):
        if not _consistent(one, other, sign):
            return opaque(text)
    exact = [value for value, sign in zip(values, ["=", *signs], strict=False) if sign == "="]
    chosen = exact[-1] if exact else values[-1]
    if summed and chosen.node:
        return Shape("equation", text, node=("add", summed, ("neg", chosen.node)), items=(chosen,))
    if name is None:
        trivial = len({canonical(value.text) for value in values}) == 1
        return replace(chosen, name=SELF) if trivial else chosen
    if name.kind == "tuple":
        if chosen.kind != "tuple":
            return opaque(text)
        return replace(chosen, text=text, name=("tuple", *(item.node for item in name.items)))
    equation: Node | None = ("add", name.node, ("neg", chosen.node)) if chosen.node and name.node else None
    return replace(chosen, text=text, name=name.node, equation=equation)


def _consistent(a: Shape, b: Shape, sign: str) -> bool:
    """Whether a = b, or one of them is what the other rounds to in its written digits."""
    if a.node is None or b.node is None:
        return False
    if sign == "=":
        return same(a.node, b.node)
    rounded, value = (b.number, a.node) if b.number else (a.number, b.node)
    if rounded is None:
        return False
    try:
        bound = regions.bound(value)
    except Refused:
        return False
    return abs(Fraction(bound) - rounded.value) <= (rounded.unit_place or 1) / Fraction(2)


def _equation(text: str, left: Shape, right: Shape) -> Shape:
    """Left minus right. It also says its right side where the left is a sum of names, or is the same by algebra."""
    assert left.node is not None
    assert right.node is not None
    if symbols(right.node):
        value = (right,) if same(left.node, right.node) else ()
    else:
        value = (right,) if is_sum(left.node) else ()
    return Shape("equation", text, node=("add", left.node, ("neg", right.node)), items=value)


def inequality(text: str, nodes: list[Node], signs: list[str]) -> Shape:
    directions = {sign[0] for sign in signs}
    if len(directions) > 1 or ("!=" in signs and len(signs) > 1):
        return opaque(text)
    if ">" in directions:
        nodes, signs = nodes[::-1], [sign.replace(">", "<") for sign in signs[::-1]]
    bare = [at for at, node in enumerate(nodes) if node[0] in ("sym", "call") and symbols(node)]
    others = [node for at, node in enumerate(nodes) if at not in bare]
    if len(bare) == 1 and not any(symbols(node) for node in others):
        region = _region_of(nodes, signs, bare[0])
        if region is not None:
            return Shape("region", text, region=region, name=nodes[bare[0]], brackets="<")
    if "!=" in signs or any(a[0] == "inf" or b[0] == "inf" for a, b in pairwise(nodes)):
        return opaque(text)
    steps = tuple(
        Shape("step", sign, node=("add", a, ("neg", b))) for (a, b), sign in zip(pairwise(nodes), signs, strict=True)
    )
    return Shape("inequality", text, items=steps)


def _region_of(nodes: list[Node], signs: list[str], at: int) -> Region | None:
    try:
        if signs == ["!="]:
            return regions.complement(regions.point(regions.bound(nodes[1 - at])))
        found = regions.EVERYTHING
        for k, sign in enumerate(signs):
            closed = sign == "<="
            if k < at:  # what stands on the left is smaller
                found = regions.intersection(found, regions.interval(regions.bound(nodes[k]), mp_inf(), closed, False))
            else:
                high = regions.bound(nodes[k + 1])
                found = regions.intersection(found, regions.interval(-mp_inf(), high, False, closed))
        return found
    except Refused:
        return None


def mp_inf() -> regions.Bound:
    return regions.EVERYTHING[0].high
