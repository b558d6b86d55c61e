"""Where two functions are tried.

Formulas without corners (polynomials, quotients, exp, sin, ...) that agree near a few positive points agree everywhere.
Others are tried at several scales (hundredths, near one, tens, thousands, and around each number that they hold) and
with both signs. Of absolute values, maxima, floors and gcd, all symbols get both signs; of roots, logarithms and
inverse functions only a variable (x, y, z, t, theta, or the only symbol), for a and R are lengths more often than not.
Symbols inside factorials, binomials, gcd and a sum's bounds are integers, and so are i to n, p to s, K, M and N
wherever floors or the like stand; any other symbol under a floor gets integers and fractions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fractions import Fraction

from cipo_fast.verify.math.parse import Node
from cipo_fast.verify.math.values import Value, unknown

_COUNTED = {"fact", "binom", "sum", "prod"}
_WHOLE = {"floor", "ceil", "gcd", "lcm"} | _COUNTED
_CORNERS = {"abs", "max", "min", "sgn"} | _WHOLE
_BRANCHES = {"root", "ln", "log", "lg", "arg", "Re", "Im"}
_BRANCHES |= {"arc" + name for name in "sin cos tan cot sec csc sinh cosh tanh".split()}
_INTEGERS = set("jklmnpqrsKMN") | {"\\ell"}
_VARIABLES = set("xyzt") | {"\\theta"}
_SCALES = (Fraction(1), Fraction(1, 60), Fraction(15), Fraction(300), Fraction(4_000), Fraction(50_000))
_MOST_NUMBERS = 8
_PER_SCALE = 4


def symbols(node: Node) -> set[str]:
    """Names of the symbols that have no value of their own."""
    found: set[str] = set()
    left = [node]
    while left:
        part = left.pop()
        if part[0] == "sym":
            found |= {part[1]} - {"pi", "e", "i"}
        elif part[0] in ("sum", "prod"):
            found |= symbols(part[4]) - {part[1]}
            left += part[2:4]
        else:
            left += [child for child in part[1:] if isinstance(child, tuple)]
    return found


def inner(node: Node) -> Iterator[Node]:
    """A tree and all trees in it."""
    left = [node]
    while left:
        part = left.pop()
        yield part
        left += [child for child in part[1:] if isinstance(child, tuple)]


def kinds(node: Node) -> set[str]:
    """What stands in a tree: kinds of nodes and names of functions."""
    return {part[0] for part in inner(node)} | {part[1] for part in inner(node) if part[0] == "fn"}


def points(nodes: list[Node]) -> list[dict[str, Value]]:
    """Values of all symbols of some trees, for each try."""
    parts = [part for node in nodes for part in inner(node)]
    names = sorted({name for node in nodes for name in symbols(node)})
    stand = {part[0] for part in parts} | {part[1] for part in parts if part[0] == "fn"}
    counted = {name for part in parts for name in _counted(part)}
    if not names:
        return [{}]
    numbers = sorted({abs(part[1]) for part in parts if part[0] == "num"} - {0, 1, 2})[-_MOST_NUMBERS:]
    if stand & _COUNTED or (counted and not stand & _CORNERS):
        tries = [_integers(names, point) for point in range(14)]
        return tries + [dict.fromkeys(names, n) for n in numbers if n.denominator == 1 and n <= 200]
    if not stand & (_CORNERS | _BRANCHES) and not any(_is_fractional(part) for part in parts):
        return [{name: unknown(name, point) for name in names} for point in range(1, 7)]
    signed = set(names) if stand & _CORNERS else {n for n in names if len(names) == 1 or _letter(n) in _VARIABLES}
    whole = counted | {n for n in names if _letter(n) in _INTEGERS} if stand & _WHOLE else counted
    tries = []
    for at, scale in enumerate([*_SCALES, *(n for n in numbers if n < 10**9)]):
        for turn in range(_PER_SCALE):
            tries.append(_scaled(names, scale, at * _PER_SCALE + turn, signed, whole, bool(stand & _WHOLE)))
        if at >= len(_SCALES) and scale.denominator == 1 and stand & _WHOLE:
            tries += [dict.fromkeys(names, scale * times) for times in (1, 2, 3)]  # gcd(n, 37)
    return tries


def has_corners(node: Node) -> bool:
    return bool(kinds(node) & _CORNERS)


def positive(env: Mapping[str, Value]) -> bool:
    return all(value > 0 for value in env.values())


def _counted(part: Node) -> set[str]:
    """Names in a part that takes integers alone; of (-1)^n too, where they are letters of integers."""
    if part[0] == "fact" or (part[0] == "fn" and part[1] in ("binom", "gcd", "lcm")):
        return symbols(part)
    if part[0] in ("sum", "prod"):
        return symbols(part[2]) | symbols(part[3])
    if part[0] == "pow" and (part[1][0] == "neg" or (part[1][0] == "num" and part[1][1] < 0)) and not symbols(part[1]):
        found = symbols(part[2])
        return found if all(_letter(name) in _INTEGERS for name in found) else set()
    return set()


def _is_fractional(part: Node) -> bool:
    """x^{1/2}, x^{0.3}"""
    return part[0] == "pow" and not symbols(part[2]) and any(p[0] == "div" or _is_part(p) for p in inner(part[2]))


def _is_part(node: Node) -> bool:
    return node[0] == "num" and node[1].denominator != 1


def _letter(name: str) -> str:
    return name.split("_")[0]


def _integers(names: list[str], point: int) -> dict[str, Value]:
    """Small integers; a letter later in the alphabet gets smaller ones by no rule, so both n > k and k > n occur."""
    return {name: Fraction(2 + int(unknown(name, 100 + point) * (4 + 3 * point))) for name in names}


def _scaled(
    names: list[str], scale: Fraction, point: int, signed: set[str], whole: set[str], steps: bool
) -> dict[str, Value]:
    env: dict[str, Value] = {}
    for at, name in enumerate(names):
        value = unknown(name, 200 + point)
        here = scale if point % 2 == 0 or at % 2 == 0 else _SCALES[int(value * 1000) % len(_SCALES)]
        value = value * here.numerator / here.denominator
        if name in whole:
            value = Fraction(1 + int(value))
        elif steps and (point + at) % 3 == 0:
            value = Fraction(1 + int(value * 2), 2)
        if name in signed and (point // 2 + (at if point % 2 else 0)) % 2:
            value = -value
        env[name] = value
    return env


def speaks_of_i(node: Node) -> bool:
    return any(part == ("sym", "i") or part[:2] in (("fn", "cis"), ("fn", "arg"), ("fn", "Im")) for part in inner(node))
