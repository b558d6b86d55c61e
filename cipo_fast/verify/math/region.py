"""Sets of real numbers: unions of intervals and points, whichever way they are written."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from mpmath import mpc, mpf

from cipo_fast.verify.math.evaluate import constant
from cipo_fast.verify.math.parse import Node
from cipo_fast.verify.math.text import Refused

Bound = Fraction | float  # float: only the infinities


@dataclass(frozen=True)
class Piece:
    low: Bound
    high: Bound
    low_in: bool
    high_in: bool


Region = tuple[Piece, ...]
EVERYTHING: Region = (Piece(-math.inf, math.inf, False, False),)


def bound(node: Node) -> Bound:
    """The value of an interval's end. Raises Refused where it is no real constant."""
    sign = 1
    inner = node
    while inner[0] == "neg":
        sign, inner = -sign, inner[1]
    if inner[0] == "inf":
        return sign * math.inf
    value = constant(node)
    if isinstance(value, mpc):
        raise Refused("an interval of complex numbers")
    if isinstance(value, Fraction):
        return value
    if abs(value) > mpf(10) ** 300 or abs(value) < mpf(10) ** -300:
        raise Refused("an interval's end too large or too small")
    sign, digits, exponent, _ = value._mpf_
    return Fraction((-1) ** sign * int(digits)) * Fraction(2) ** int(exponent)


def interval(low: Bound, high: Bound, low_in: bool, high_in: bool) -> Region:
    """One interval; () where it is empty. An infinite end is never in it."""
    if low > high or (_same(low, high) and not (low_in and high_in)):
        return ()
    return (Piece(low, high, low_in and low != -math.inf, high_in and high != math.inf),)


def point(value: Bound) -> Region:
    return interval(value, value, True, True)


def union(*regions: Region) -> Region:
    pieces = sorted((piece for region in regions for piece in region), key=lambda p: (p.low, not p.low_in))
    merged: list[Piece] = []
    for piece in pieces:
        if merged and _touch(merged[-1], piece):
            last = merged.pop()
            if _same(last.high, piece.high):
                high, high_in = last.high, last.high_in or piece.high_in
            else:
                further = max((last, piece), key=lambda p: p.high)
                high, high_in = further.high, further.high_in
            low_in = last.low_in or (_same(last.low, piece.low) and piece.low_in)
            merged.append(Piece(last.low, high, low_in, high_in))
        else:
            merged.append(piece)
    return tuple(merged)


def _touch(left: Piece, right: Piece) -> bool:
    if _same(left.high, right.low):
        return left.high_in or right.low_in
    return bool(left.high > right.low)


def intersection(a: Region, b: Region) -> Region:
    found: Region = ()
    for p in a:
        for q in b:
            if _same(p.low, q.low):
                low, low_in = p.low, p.low_in and q.low_in
            else:
                higher = max((p, q), key=lambda piece: piece.low)
                low, low_in = higher.low, higher.low_in
            if _same(p.high, q.high):
                high, high_in = p.high, p.high_in and q.high_in
            else:
                lower = min((p, q), key=lambda piece: piece.high)
                high, high_in = lower.high, lower.high_in
            found += interval(low, high, low_in, high_in)
    return union(found)


def complement(region: Region) -> Region:
    found: Region = ()
    low: Bound = -math.inf
    low_in = False
    for piece in union(region):
        found += interval(low, piece.low, low_in, not piece.low_in)
        low, low_in = piece.high, not piece.high_in
    return found + (interval(low, math.inf, low_in, False) if low != math.inf else ())


def equal_regions(a: Region, b: Region) -> bool:
    a, b = union(a), union(b)
    return len(a) == len(b) and all(
        p.low_in == q.low_in and p.high_in == q.high_in and _same(p.low, q.low) and _same(p.high, q.high)
        for p, q in zip(a, b, strict=True)
    )


def _same(a: Bound, b: Bound) -> bool:
    """Equal to 40 digits: an irrational end has been rounded."""
    if isinstance(a, float) or isinstance(b, float) or a == b:
        return a == b
    return abs(a - b) <= max(abs(a), abs(b)) * Fraction(1, 10**40)
