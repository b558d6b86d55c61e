"""What an answer may be called, and whether two names are the same one.

Left of a value stands a plain name or the answer is an equation: x^2 = 45 and -x = 45 do not say 45.
"""

from __future__ import annotations

import re
from itertools import pairwise

from cipo_fast.verify.math.parse import Node
from cipo_fast.verify.math.points import symbols
from cipo_fast.verify.math.shape import Shape

# A label with such a word says more than a name does.
_HEDGES = {"or", "and", "not", "no", "maybe", "perhaps", "either", "neither", "wrong", "never"}
_NAMING = {"det", "max", "min", "gcd", "lcm"}  # \det A = 3, \gcd(a, b) = 3
SELF: Node = ("self",)  # the name in 1 = 1, which is not x = 1
_WORD_SUBSCRIPT = re.compile(r"_\\?[a-z]{2,}$")


def is_name(shape: Shape) -> bool:
    """x, x_1, f(x), P(A), AB, |AB|, \\angle ABC, \\det A, (x, y), a short label: what is called and not what it is."""
    if shape.kind == "choice":
        return True
    if shape.kind == "tuple":
        return all(is_name(item) for item in shape.items)
    if shape.kind == "words":
        return len(shape.text.split()) <= 4 and not _HEDGES & set(shape.text.split())
    if shape.node is None or shape.kind != "scalar" or shape.unit is not None:
        return False
    return _is_name(shape.node)


def _is_name(node: Node) -> bool:
    if node[0] == "sym":
        return node[1] not in ("pi", "e", "i")
    if node[0] == "call":
        return all(part[0] == "sym" or not symbols(part) for part in node[2:])
    if node[0] == "mul":
        return _capitals(node) or (node[1] == ("sym", "m") and str(node[2][1]).startswith("∠"))
    if node[0] == "fn" and node[1] == "abs":
        return _capitals(node[2])
    return node[0] == "fn" and node[1] in _NAMING and all(_is_name(part) or is_sum(part) for part in node[2:])


def _capitals(node: Node) -> bool:
    """AB, ABC: points, not a product."""
    if node[0] == "mul":
        return _capitals(node[1]) and _capitals(node[2])
    return node[0] == "sym" and node[1][:1].isupper()


def is_sum(node: Node) -> bool:
    """m + n, a + b + c, AB + CD: what a question asks for, of names that differ."""
    parts = [node]
    while parts[0][0] == "add":
        parts = [parts[0][1], parts[0][2], *parts[1:]]
    return 1 < len(parts) == len(set(parts)) and all(
        (part[0] == "sym" and _is_name(part) and "'" not in part[1]) or _capitals(part) for part in parts
    )


def defines(name: Node, value: Node | None) -> bool:
    """Whether name = value can be a definition: x = 2x and f(x) = 2f(x) are equations."""
    if value is None:
        return True
    if name[0] == "call":
        return name[1] not in _functions(value) and name[1] not in symbols(value)
    return not symbols(name) & symbols(value)


def _functions(node: Node) -> set[str]:
    found = {node[1]} if node[0] == "call" else set()
    for part in node[1:]:
        if isinstance(part, tuple):
            found |= _functions(part)
    return found


def names_agree(gold: Shape, answer: Shape) -> bool:
    """x = 7 is not y = 7, nor is x_1 = 7 x_2 = 7. An answer without a name, or to a gold without one, may have any; but
    the names of a tuple say the order of its items: where the gold has none, only the alphabetic order is neutral."""
    one, other = gold.name, answer.name
    if other is not None and other[0] == "tuple":
        if one is not None and one[0] == "tuple":
            return len(one) == len(other) and set(one) == set(other)
        return _alphabetic([str(part[1]) for part in other[1:]])
    if one is None or other is None or one == other or one[0] == "tuple":
        return True
    if one[0] == other[0] == "call":
        return one[1] == other[1] and _renames(gold, answer)
    if one[0] == other[0] == "sym" and "_" in one[1] and "_" in other[1]:
        return False  # m_max is m, and not m_min
    return bool(_spellings(one) & _spellings(other)) or (_is_graph(one) and _is_graph(other))


def _renames(gold: Shape, answer: Shape) -> bool:
    """f(t) = 2t for f(x) = 2x: one plain argument, of which both values speak. P(A) = 3 is not P(B) = 3."""
    assert gold.name is not None
    assert answer.name is not None
    ours, theirs = gold.name[2:], answer.name[2:]
    return len(ours) == len(theirs) == 1 and all(
        argument[0] == "sym" and shape.node is not None and argument[1] in symbols(shape.node)
        for argument, shape in ((ours[0], gold), (theirs[0], answer))
    )


def _spellings(name: Node) -> set[str]:
    """m of m_max; f of f(x); a_n of a(n)."""
    if name[0] == "sym":
        return {name[1], _WORD_SUBSCRIPT.sub("", name[1])}
    if name[0] == "call" and all(part[0] == "sym" for part in name[2:]):
        return {name[1], f"{name[1]}_{name[2][1]}"}
    return {str(name)}


def _is_graph(name: Node) -> bool:
    """y or f(x): y = 2x is f(x) = 2x."""
    return name == ("sym", "y") or (name[0] == "call" and name[1] == "f" and len(name) == 3 and name[2][0] == "sym")


def _alphabetic(names: list[str]) -> bool:
    """(x, y), (a, b, c), (x_1, x_2), and (r, \\theta): Greek letters come last, in any order."""
    keys = ["~" if name.startswith("\\") else name for name in names]
    return len(set(names)) == len(names) and all(a <= b for a, b in pairwise(keys))
