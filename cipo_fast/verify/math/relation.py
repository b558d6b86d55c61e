"""Equations, chains of them and inequalities, from parts that have been read."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from cipo_fast.verify.math import region as regions
from cipo_fast.verify.math.evaluate import same, symbols
from cipo_fast.verify.math.parse import Node
from cipo_fast.verify.math.region import Region
from cipo_fast.verify.math.shape import Shape, opaque
from cipo_fast.verify.math.text import Refused

# A label with such a word says more than a name does.
_HEDGES = {"or", "and", "not", "no", "maybe", "perhaps", "either", "neither", "wrong", "never"}


def chain(text: str, parts: list[Shape], signs: list[str]) -> Shape:
    """x = 7, f(x) = 2x, (x, y) = (1, 2), 3 + 4 = 7; a chain whose values differ is no answer at all."""
    if is_name(parts[-1]) and not is_name(parts[0]):
        parts, signs = parts[::-1], signs[::-1]
    name = parts[0] if is_name(parts[0]) else None
    values = parts[1:] if name else parts
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
        if one.node is None or other.node is None or not _consistent(one.node, other.node, sign):
            return opaque(text)
    exact = [value for value, sign in zip(values, ["=", *signs], strict=False) if sign == "="]
    chosen = exact[-1] if exact else values[-1]
    if name is None:
        return chosen
    if name.kind == "tuple":
        return chosen
    equation: Node | None = ("add", name.node, ("neg", chosen.node)) if chosen.node and name.node else None
    return replace(chosen, text=text, name=name.node, equation=equation)


def _consistent(a: Node, b: Node, sign: str) -> bool:
    if sign == "=":
        return same(a, b)
    try:
        one: regions.Bound = regions.bound(a)
        other: regions.Bound = regions.bound(b)
    except Refused:
        return False
    apart = one - other if one > other else other - one
    return apart * 50 <= (other if other > 0 else -other)


def _equation(text: str, left: Shape, right: Shape) -> Shape:
    value = (right,) if left.node and _is_soft_name(left.node) and right.node and not symbols(right.node) else ()
    return Shape("equation", text, node=("add", left.node, ("neg", right.node)), items=value)


def is_name(shape: Shape) -> bool:
    """x, x_1, f(x), P(A), |AB|, (x, y): what an answer is called and not what it is."""
    if shape.kind == "choice":
        return True
    if shape.kind == "tuple":
        return all(is_name(item) for item in shape.items)
    if shape.kind == "words":
        return len(shape.text.split()) <= 4 and not _HEDGES & set(shape.text.split())
    node = shape.node
    if node is None or shape.kind != "scalar":
        return False
    if node[0] == "fn" and node[1] == "abs":
        node = node[2]
    if node[0] == "call":
        return True
    letters = node
    while letters[0] == "mul" and letters[2][0] == "sym":
        letters = letters[1]
    return letters[0] == "sym" and (letters is node or _capitals(node)) and letters[1] not in ("pi", "e", "i")


def _capitals(node: Node) -> bool:
    """AB, ABC: points, not a product."""
    if node[0] == "mul":
        return _capitals(node[1]) and _capitals(node[2])
    return node[0] == "sym" and node[1][:1].isupper()


def _is_soft_name(node: Node) -> bool:
    """a + b, xy, x^2 + y^2: sums of products of symbols with no number but an exponent."""
    if node[0] in ("add", "mul", "div"):
        return _is_soft_name(node[1]) and _is_soft_name(node[2])
    if node[0] == "neg":
        return _is_soft_name(node[1])
    if node[0] == "pow":
        return node[1][0] == "sym" and node[2][0] == "num"
    return node[0] == "sym" and "'" not in node[1]


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
