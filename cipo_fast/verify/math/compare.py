"""Whether an answer is the gold: by the comparator of the gold's class and by no other. What does not fit is wrong."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from mpmath import mpc

from cipo_fast.verify.math import region as regions
from cipo_fast.verify.math.evaluate import constant, equal, evaluate, same
from cipo_fast.verify.math.exact import Number, labelled, near, numbers_agree
from cipo_fast.verify.math.fallback import math_verify_agrees
from cipo_fast.verify.math.names import names_agree
from cipo_fast.verify.math.parse import Node
from cipo_fast.verify.math.points import has_corners, points, positive, speaks_of_i, symbols
from cipo_fast.verify.math.policy import MathPolicy
from cipo_fast.verify.math.read import read
from cipo_fast.verify.math.shape import Shape, as_region
from cipo_fast.verify.math.text import Refused, prepared
from cipo_fast.verify.math.units import unit_of
from cipo_fast.verify.math.values import TooMuch, Undefined, budget, divide

_MOST_WORK = 60_000  # of one comparison: a third of a second, whatever is written
_VECTOR = re.compile(r"\\nabla|\\vec|\\hat|\\overrightarrow")
_CROSS = re.compile(r"\S*\s*\\times\s*\S*")


@dataclass(frozen=True)
class Terms:
    """What a comparison needs beside the two shapes: the policy, and an absolute tolerance that the row gives."""

    policy: MathPolicy
    error: Fraction | None = None
    pair: bool = False  # the row says that (a, b) is a tuple and no interval


def agree(golds: list[str], answer: str, policy: MathPolicy, row: Mapping[str, Any], error: Fraction | None) -> bool:
    """Whether a prepared answer is what the golds ask for: one, or all of several in any order. Raises Refused for an
    answer that cannot be judged."""
    try:
        with budget(_MOST_WORK):
            return _agrees(golds, answer, policy, row, error)
    except TooMuch as told:
        raise Refused(str(told)) from None


def _agrees(golds: list[str], answer: str, policy: MathPolicy, row: Mapping[str, Any], error: Fraction | None) -> bool:
    gold = gold_shape(golds, row)
    terms = Terms(policy, error, pair="tuple" in str(row.get("answer_type") or "").lower())
    given = read(answer, _unit(gold))
    if _agree(gold, given, terms):
        return True
    if gold.kind == "opaque" and len(golds) == 1:
        return math_verify_agrees(prepared(golds[0]), answer)
    return False


def check(golds: list[str], policy: MathPolicy, row: Mapping[str, Any], error: Fraction | None) -> str | None:
    """Why a gold cannot be judged, or None: its class is known, and its class's comparator finds it equal to itself."""
    try:
        with budget(_MOST_WORK):
            return _check(golds, policy, row, error)
    except (TooMuch, RecursionError) as told:
        return f"the gold {', '.join(golds)[:60]!r} cannot be judged: {told}"


def _check(golds: list[str], policy: MathPolicy, row: Mapping[str, Any], error: Fraction | None) -> str | None:
    shape = gold_shape(golds, row)
    told = ", ".join(golds)
    if shape.kind == "opaque":
        if math_verify_agrees(shape.text, shape.text):
            return None
        return f"the gold {told[:60]!r} is of no class that can be compared"
    if shape.kind == "words" and len(shape.text.split()) > 12:
        return f"the gold {told[:60]!r} is a sentence and no answer"
    if not _agree(shape, read(prepared(told)), Terms(policy, error)):
        return f"the gold {told[:60]!r} is not equal to itself"
    return None


def gold_shape(golds: list[str], row: Mapping[str, Any]) -> Shape:
    """The golds as one shape. A row's `unit` is the gold's, where the gold itself has none."""
    unit = unit_of(str(row["unit"])) if row.get("unit") not in (None, "", "None") else None
    shapes = [read(prepared(gold)) for gold in golds]
    shape = shapes[0]
    if len(shapes) > 1:
        flat = tuple(part for one in shapes for part in (one.items if one.kind == "list" else (one,)))
        shape = Shape("list", ", ".join(golds), items=flat)
    return _with_unit(shape, unit) if unit else shape


def _with_unit(shape: Shape, unit: str) -> Shape:
    if shape.kind == "list":
        return replace(shape, items=tuple(_with_unit(item, unit) for item in shape.items))
    return replace(shape, unit=shape.unit or unit) if shape.kind == "scalar" else shape


def _unit(gold: Shape) -> str | None:
    return gold.unit or (gold.items[0].unit if gold.kind == "list" and gold.items else None)


def _agree(gold: Shape, answer: Shape, terms: Terms) -> bool:
    if not names_agree(gold, answer):  # x = 2y is y = x/2
        return bool(gold.equation and answer.equation and _proportional(gold.equation, answer.equation) is not None)
    comparator = _COMPARATORS.get(gold.kind)
    return comparator is not None and comparator(gold, answer, terms)


def _scalar(gold: Shape, answer: Shape, terms: Terms) -> bool:
    if answer.kind == "choice" and gold.node is not None:
        return gold.node == answer.node
    if answer.kind == "equation":
        if gold.equation is not None:
            return answer.node is not None and _proportional(gold.equation, answer.node) is not None
        return bool(answer.items) and _agree(gold, answer.items[0], terms)  # a + b = 12
    if answer.kind == "set" and len(answer.items) == 1:
        return _agree(gold, answer.items[0], terms)
    if answer.kind == "ratio":
        return terms.policy.ratio == "fraction" and len(answer.items) == 2 and _as_fraction(answer, gold)
    if answer.kind == "opaque" or answer.kind == "words":
        if answer.kind == "words" and gold.text.isalpha() and answer.text == gold.text.casefold():
            return True  # II and \\text{II}
        named = labelled(answer.text)
        if named and terms.policy.choices == "with_text" and answer.kind == "opaque":
            return _agree(gold, read(prepared(named[1])), terms)
        return False
    if answer.kind != "scalar" or gold.node is None or answer.node is None:
        return False
    if not _units_agree(gold.unit, answer.unit, terms.policy):
        return False
    if gold.number is not None:
        return _meets(gold.number, answer, terms)
    node = _renamed(answer, gold)
    if node is None or not _same_products(gold, answer):
        return False
    if same(gold.node, node):
        return True
    if terms.error is not None and not symbols(gold.node) and not symbols(node):
        return _within(gold.node, node, terms.error)
    if terms.policy.percent == "either" and gold.percent != answer.percent:
        factor: Node = ("num", Fraction(100) if answer.percent else Fraction(1, 100))
        return same(gold.node, ("mul", factor, node))
    return False


def _same_products(gold: Shape, answer: Shape) -> bool:
    r"""\nabla \times E is not \nabla \cdot E: with vectors about, both write their products alike."""
    if not any(_VECTOR.search(shape.text) for shape in (gold, answer)):
        return True
    ours, theirs = (_CROSS.findall(shape.text) for shape in (gold, answer))
    return ours == theirs


def _renamed(answer: Shape, gold: Shape) -> Node | None:
    """The answer's tree in the gold's variables, where both define a function: f(t) = 2t is f(x) = 2x, and
    f(t) = 2x is not (None)."""
    assert answer.node is not None
    if gold.name is None or answer.name is None or gold.name[0] != "call" or answer.name[0] != "call":
        return answer.node
    ours, theirs = gold.name[2:], answer.name[2:]
    if len(ours) != len(theirs) or any(part[0] != "sym" for part in ours + theirs):
        return answer.node
    names = {their[1]: our[1] for their, our in zip(theirs, ours, strict=True)}
    if any(new != old and new in symbols(answer.node) for old, new in names.items()):
        return None
    return _substituted(answer.node, names)


def _substituted(node: Node, names: Mapping[str, str]) -> Node:
    if node[0] == "sym":
        return ("sym", names.get(node[1], node[1]))
    return tuple(_substituted(part, names) if isinstance(part, tuple) else part for part in node)


def _meets(gold: Number, answer: Shape, terms: Terms) -> bool:
    """Whether an answer has a literal number's value. One with symbols never has."""
    if answer.number is not None:
        return numbers_agree(gold, answer.number, terms.policy, terms.error)
    assert answer.node is not None
    if symbols(answer.node):
        return False
    try:
        value = constant(answer.node)
    except Undefined:
        return False
    if isinstance(value, Fraction):
        return numbers_agree(gold, Number(value, percent=answer.percent), terms.policy, terms.error)
    if isinstance(value, mpc):
        return False
    if same(("num", gold.value), answer.node):
        return True
    exact = terms.policy.rounding == "exact" and not terms.policy.tolerance
    if terms.error is None and (exact or gold.unit_place is None):
        return False
    if not 1e-300 < abs(value) < 1e300:  # no literal is so far away, nor is its decimal short
        return False
    return near(gold, Fraction(str(value)), terms.policy, terms.error)


def _within(gold: Node, answer: Node, error: Fraction) -> bool:
    try:
        return bool(abs(evaluate(("add", gold, ("neg", answer)))) <= error.numerator / error.denominator)
    except Undefined:
        return False


def _units_agree(gold: str | None, answer: str | None, policy: MathPolicy) -> bool:
    if policy.units == "ignore" or gold is None:
        return True
    if answer is None:
        return policy.units != "required"
    return gold == answer


def _list(gold: Shape, answer: Shape, terms: Terms) -> bool:
    """All items, in any order; how often each stands matters unless the answer is a set."""
    if answer.kind == "set":
        return _matched(gold.items, _distinct(answer.items, terms), terms)
    if answer.kind == "region":  # x = 1 or x = 2 never is one; {1} \cup {2} may be
        ours = as_region(gold)
        return ours is not None and answer.region is not None and regions.equal_regions(ours, answer.region)
    return answer.kind == "list" and _matched(gold.items, answer.items, terms)


def _set(gold: Shape, answer: Shape, terms: Terms) -> bool:
    if not gold.items and answer.kind == "set":
        return not answer.items
    if answer.kind in ("set", "list"):
        return _matched(_distinct(gold.items, terms), _distinct(answer.items, terms), terms)
    if answer.kind == "region":
        return _region(gold, answer, terms)
    return len(gold.items) == 1 and _agree(gold.items[0], answer, terms)


def _matched(golds: tuple[Shape, ...], answers: tuple[Shape, ...], terms: Terms) -> bool:
    """Whether each gold has an answer of its own."""
    left = list(answers)
    if len(golds) != len(left):
        return False
    for gold in golds:
        partner = next((answer for answer in left if _agree(gold, answer, terms)), None)
        if partner is None:
            return False
        left.remove(partner)
    return True


def _distinct(items: tuple[Shape, ...], terms: Terms) -> tuple[Shape, ...]:
    kept: list[Shape] = []
    for item in items:
        if not any(_agree(other, item, terms) for other in kept):
            kept.append(item)
    return tuple(kept)


def _tuple(gold: Shape, answer: Shape, terms: Terms) -> bool:
    if answer.kind == "tuple":
        items = answer.items
        if gold.name and answer.name and gold.name[0] == answer.name[0] == "tuple":
            # (y, x) = (2, 1) is (x, y) = (1, 2)
            named = dict(zip(answer.name[1:], items, strict=True))
            items = tuple(named[name] for name in gold.name[1:])
        return gold.brackets == answer.brackets and _in_order(gold.items, items, terms)
    return not terms.pair and answer.kind == "region" and _region(gold, answer, terms)


def _in_order(golds: tuple[Shape, ...], answers: tuple[Shape, ...], terms: Terms) -> bool:
    return len(golds) == len(answers) and all(
        _agree(gold, answer, terms) for gold, answer in zip(golds, answers, strict=True)
    )


def _union(gold: Shape, answer: Shape, terms: Terms) -> bool:
    return answer.kind == "union" and _matched(gold.items, answer.items, terms)


def _region(gold: Shape, answer: Shape, terms: Terms) -> bool:
    if answer.kind not in ("region", "tuple", "set"):
        return False
    ours, theirs = as_region(gold), as_region(answer)
    return ours is not None and theirs is not None and regions.equal_regions(ours, theirs)


def _matrix(gold: Shape, answer: Shape, terms: Terms) -> bool:
    if answer.kind != "matrix" or gold.brackets != answer.brackets or len(gold.items) != len(answer.items):
        return False
    return all(_in_order(row.items, other.items, terms) for row, other in zip(gold.items, answer.items, strict=True))


def _equation(gold: Shape, answer: Shape, terms: Terms) -> bool:
    """The same up to a factor that is not zero. Its right side alone is no equation."""
    theirs = answer.node if answer.kind == "equation" else answer.equation
    return gold.node is not None and theirs is not None and _proportional(gold.node, theirs) is not None


def _inequality(gold: Shape, answer: Shape, terms: Terms) -> bool:
    if answer.kind != "inequality" or len(gold.items) != len(answer.items):
        return False
    for ours, theirs in zip(gold.items, answer.items, strict=True):
        if ours.node is None or theirs.node is None or ours.text != theirs.text:
            return False
        factor = _proportional(ours.node, theirs.node)
        if factor is None or not factor > 0:
            return False
    return True


def _proportional(a: Node, b: Node) -> Any:
    """The constant that a is b times, or None. Where a has no value b need not have one."""
    reals = not (speaks_of_i(a) or speaks_of_i(b))
    cornered = has_corners(a) or has_corners(b)
    factor = None
    tries = missing = 0
    for env in points([a, b]):
        try:
            one = evaluate(a, env, reals=reals)
        except Undefined:
            continue
        try:
            other = evaluate(b, env, reals=reals)
        except Undefined:
            missing += cornered or positive(env)
            continue
        if one == other == 0:
            continue
        if other == 0 or one == 0:
            return None
        ratio = divide(one, other)
        if factor is not None and not equal(factor, ratio):
            return None
        factor, tries = ratio, tries + 1
    return factor if tries > 1 and missing * 6 <= tries and not isinstance(factor, mpc) else None


def _base(gold: Shape, answer: Shape, terms: Terms) -> bool:
    if answer.kind == "base":
        return gold.text == answer.text and gold.parts == answer.parts
    return terms.policy.base == "optional" and answer.kind == "scalar" and answer.text.strip() == gold.text


def _ratio(gold: Shape, answer: Shape, terms: Terms) -> bool:
    if answer.kind == "scalar" and terms.policy.ratio == "fraction" and len(gold.items) == 2:
        return _as_fraction(gold, answer)
    if answer.kind != "ratio" or len(gold.items) != len(answer.items):
        return False
    ours, theirs = ([constant(item.node) for item in shape.items if item.node] for shape in (gold, answer))
    return all(ours[0] * other == theirs[0] * one for one, other in zip(ours, theirs, strict=True))


def _as_fraction(ratio: Shape, fraction: Shape) -> bool:
    above, below = (item.node for item in ratio.items)
    return fraction.node is not None and same(("div", above, below), fraction.node)


def _clock(gold: Shape, answer: Shape, terms: Terms) -> bool:
    """The same time; where both say a.m. or p.m., the same half of the day."""
    if answer.kind != "clock" or gold.parts[:2] != answer.parts[:2]:
        return False
    return gold.parts[2] == answer.parts[2] or not (gold.parts[2] and answer.parts[2])


def _choice(gold: Shape, answer: Shape, terms: Terms) -> bool:
    if answer.kind == "choice":
        return gold.text == answer.text
    named = labelled(answer.text) if terms.policy.choices == "with_text" else None
    return named is not None and named[0] == gold.text


def _words(gold: Shape, answer: Shape, terms: Terms) -> bool:
    if answer.kind == "words":
        return gold.text == answer.text
    return answer.kind == "scalar" and len(gold.text) < 5 and answer.text.casefold() == gold.text


def _nothing(gold: Shape, answer: Shape, terms: Terms) -> bool:
    return False


_COMPARATORS = {
    "scalar": _scalar, "list": _list, "set": _set, "tuple": _tuple, "union": _union, "region": _region,
    "matrix": _matrix, "equation": _equation, "inequality": _inequality, "base": _base, "ratio": _ratio,
    "clock": _clock, "choice": _choice, "words": _words, "opaque": _nothing,
}  # fmt: skip
