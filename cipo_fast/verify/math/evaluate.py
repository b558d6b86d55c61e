"""Values of expressions: exact rationals where there are any, else 60 digits; and whether two expressions are the same.

Two expressions are the same when they agree, to 40 digits relative to their size, wherever they are tried. A constant
is tried once; symbols get values that depend on their names alone, positive and irrational-looking, or integers where
floors, factorials and binomials stand. Different formulas that agree so at several random points do not occur
(Schwartz-Zippel for polynomials), and nothing is ever rewritten, so nothing can hang.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import partial

from mpmath import mp, mpc, mpf

from cipo_fast.verify.math.parse import Node
from cipo_fast.verify.math.text import Refused
from cipo_fast.verify.math.values import (
    BINARY,
    CLOSE,
    FUNCTIONS,
    Undefined,
    Value,
    add,
    binomial,
    checked,
    divide,
    factorial,
    integer,
    log,
    multiply,
    ordered,
    real,
    root,
    stepped,
    unknown,
)

DIGITS = 60

_MOST_TERMS = 2_000  # of all sums together
_MOST_STEPS = 200_000


class _Evaluator:
    def __init__(self, env: Mapping[str, Value], digits: int) -> None:
        self.env = dict(env)
        self.digits = digits
        self.terms = self.steps = 0

    def of(self, node: Node) -> Value:
        self.steps += 1
        if self.steps > _MOST_STEPS:
            raise Refused("too long a computation")
        kind = node[0]
        if kind == "num":
            return node[1]
        if kind == "sym":
            return self._symbol(node[1])
        if kind in ("add", "mul", "div", "pow"):
            return checked(BINARY[kind](self.of(node[1]), self.of(node[2])))
        if kind == "neg":
            return -self.of(node[1])
        if kind == "pct":
            return checked(self.of(node[1]) / 100)
        if kind == "deg":
            return checked(real(self.of(node[1])) * mp.pi / 180)
        if kind == "fact":
            return checked(factorial(self.of(node[1])))
        if kind == "fn":
            return checked(self._function(node[1], [self.of(argument) for argument in node[2:]]))
        if kind == "call":
            return self._call(node[1], [self.of(argument) for argument in node[2:]])
        if kind in ("sum", "prod"):
            return self._series(node)
        if kind == "pm":
            raise Refused("± has two values")
        raise Refused("infinity is no number" if kind == "inf" else f"{kind} has no value")

    def _symbol(self, name: str) -> Value:
        if name in self.env:
            return self.env[name]
        if name == "pi":
            return +mp.pi
        if name == "e":
            return +mp.e
        if name == "i":
            return mpc(0, 1)
        raise Refused(f"{name} has no value")

    def _function(self, name: str, arguments: list[Value]) -> Value:
        if name == "root":
            return root(*arguments)
        if name == "binom":
            return binomial(*arguments)
        if name in ("floor", "ceil", "abs", "sgn"):
            return stepped(name, arguments[0])
        if name in ("max", "min"):
            return (max if name == "max" else min)(arguments, key=ordered)
        if name in ("gcd", "lcm"):
            numbers = [integer(argument) for argument in arguments]
            return Fraction(math.gcd(*numbers) if name == "gcd" else math.lcm(*numbers))
        if name in ("log", "lg") and len(arguments) == 1:
            return log(arguments[0]) / unknown("base of log", 0)  # ln to some, log10 to others
        if name == "log":
            return divide(log(arguments[0]), log(arguments[1]))
        if name == "cis":
            return mp.expj(real(arguments[0]))
        function = FUNCTIONS.get(name)
        if function is None or len(arguments) != 1:
            raise Refused(f"{name} is not known")
        return function(real(arguments[0]))

    def _call(self, name: str, arguments: list[Value]) -> Value:
        """An unknown function: a number that depends on its name and its arguments alone."""
        told = [mp.nstr(real(argument), 25) for argument in arguments]
        return unknown(f"{name}({','.join(told)})", 0)

    def _series(self, node: Node) -> Value:
        _, variable, first, last, body = node
        begin, end = integer(self.of(first)), integer(self.of(last))
        self.terms += max(0, end - begin + 1)
        if self.terms > _MOST_TERMS:
            raise Refused(f"sums of more than {_MOST_TERMS} terms")
        before = self.env.get(variable)
        total: Value = Fraction(0 if node[0] == "sum" else 1)
        for index in range(begin, end + 1):
            self.env[variable] = Fraction(index)
            term = self.of(body)
            total = checked(add(total, term) if node[0] == "sum" else multiply(total, term))
        if before is None:
            self.env.pop(variable, None)
        else:
            self.env[variable] = before
        return total


def symbols(node: Node) -> set[str]:
    """Names of the symbols that have no value of their own."""
    if node[0] == "sym":
        return set() if node[1] in ("pi", "e", "i") else {node[1]}
    if node[0] in ("sum", "prod"):
        return (symbols(node[4]) - {node[1]}) | symbols(node[2]) | symbols(node[3])
    found: set[str] = set()
    for part in node[1:]:
        if isinstance(part, tuple):
            found |= symbols(part)
    return found


def kinds(node: Node) -> set[str]:
    """What stands in a tree: kinds of nodes and names of functions."""
    found = {node[0]} | ({node[1]} if node[0] == "fn" else set())
    for part in node[1:]:
        if isinstance(part, tuple):
            found |= kinds(part)
    return found


_STEPS = {"floor", "ceil", "fact", "binom", "sum", "prod", "gcd", "lcm"}
_SIGNED = {"abs", "max", "min", "sgn"}


def evaluate(node: Node, env: Mapping[str, Value] | None = None, digits: int = DIGITS) -> Value:
    """The value of a tree: a Fraction, or an mpmath number of `digits` digits. Raises Refused, Undefined."""
    with mp.workdps(digits):
        try:
            return _Evaluator(env or {}, digits).of(node)
        except (OverflowError, MemoryError):
            raise Refused("a number too large to write down") from None
        except (ValueError, ZeroDivisionError, TypeError):
            raise Undefined("no value") from None


def constant(node: Node) -> Value:
    """The value of a tree without symbols."""
    if symbols(node):
        raise Refused("not a constant")
    return evaluate(node)


def points(nodes: list[Node]) -> list[dict[str, Value]]:
    """Values of all symbols of some trees, for each try."""
    names: set[str] = set()
    stand: set[str] = set()
    for node in nodes:
        names |= symbols(node)
        stand |= kinds(node)
    with mp.workdps(DIGITS):
        if not names:
            return [{}]
        if stand & _STEPS:
            return [_integers(names, point) for point in range(14)]
        tries = [{name: unknown(name, point) for name in names} for point in range(1, 5)]
        if stand & _SIGNED:
            tries += [
                {name: unknown(name, point) * (-1 if unknown(name, -point) < 1.5 else 1) for name in names}
                for point in range(5, 13)
            ]
        return tries


def _integers(names: set[str], point: int) -> dict[str, Value]:
    """Small integers; a letter later in the alphabet gets smaller ones by no rule, so both n > k and k > n occur."""
    return {name: Fraction(2 + int(unknown(name, 100 + point) * (4 + 3 * point))) for name in names}


def same(a: Node, b: Node) -> bool:
    """Whether two trees are the same number, or the same function of their symbols."""
    if a == b and a[0] in ("num", "sym", "inf"):
        return True
    if "inf" in kinds(a) | kinds(b):
        return _without_sign(a) == _without_sign(b)
    agreed = 0
    for env in points([a, b]):
        values = [_value_or_none(node, env) for node in (a, b)] if env else [evaluate(a), evaluate(b)]
        if values[0] is None and values[1] is None:
            continue
        if values[0] is None or values[1] is None:
            return False
        if not equal(values[0], values[1], partial(_both, a, b, env)):
            return False
        agreed += 1
    return agreed > (1 if symbols(a) | symbols(b) else 0)


def _without_sign(node: Node) -> tuple[int, Node]:
    sign = 1
    while node[0] == "neg":
        sign, node = -sign, node[1]
    return sign, node


def _value_or_none(node: Node, env: Mapping[str, Value]) -> Value:
    try:
        return evaluate(node, env)
    except Refused:
        return None


def _both(a: Node, b: Node, env: Mapping[str, Value], digits: int) -> tuple[Value, Value]:
    return real(evaluate(a, env, digits)), real(evaluate(b, env, digits))


def equal(a: Value, b: Value, again: Callable[[int], tuple[Value, Value]] | None = None) -> bool:
    """Whether two values are the same: exactly where both are exact, else to 40 digits relative to the larger.
    `again` computes both with more digits: how a true zero is told from a small number."""
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    with mp.workdps(DIGITS):
        a, b = real(a), real(b)
        size, apart = max(abs(a), abs(b)), abs(a - b)
        if apart <= size * mpf(10) ** CLOSE:
            return True
        if apart > mpf(10) ** -20 or again is None:
            return False
    more = 4 * DIGITS
    with mp.workdps(more):
        a, b = again(more)
        return bool(abs(a - b) <= mpf(10) ** -(3 * DIGITS) and max(abs(a), abs(b)) <= mpf(10) ** -(3 * DIGITS))
