"""Values of expressions: exact rationals where there are any, else 60 digits; and whether two expressions are the same.

Two expressions are the same when they agree, to 40 digits relative to their size, wherever they are tried (points.py).
Different formulas that agree so at several random points do not occur (Schwartz-Zippel for polynomials), and nothing
is ever rewritten, so nothing can hang.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import partial

from mpmath import mp, mpc, mpf

from cipo_fast.verify.math.parse import Node
from cipo_fast.verify.math.points import has_corners, kinds, points, positive, speaks_of_i, symbols
from cipo_fast.verify.math.text import Refused
from cipo_fast.verify.math.values import (
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
    power,
    real,
    root,
    spend,
    stepped,
    unknown,
)

DIGITS = 60
MORE_DIGITS = 500

_MOST_TERMS = 2_000  # of all sums together


class _Evaluator:
    def __init__(self, env: Mapping[str, Value], digits: int, reals: bool) -> None:
        self.env = dict(env)
        self.reals = reals
        self.weight = 1 if digits <= DIGITS else 4
        self.terms = 0

    def of(self, node: Node) -> Value:
        value = self._of(node)
        if isinstance(value, Fraction):
            bits = value.numerator.bit_length() + value.denominator.bit_length()
            spend(1 if bits < 500 else bits / 1_000 + (bits / 1_000) ** 2 / 2)
        else:
            spend(self.weight)
            if self.reals and isinstance(value, mpc):
                raise Undefined("no real value")
        return value

    def _of(self, node: Node) -> Value:
        kind = node[0]
        if kind == "num":
            return node[1]
        if kind == "sym":
            return self._symbol(node[1])
        if kind == "pow":
            spend(12 * self.weight)
            return checked(self._power(self.of(node[1]), self.of(node[2])))
        if kind in ("add", "mul"):
            return self._chain(kind, node)
        if kind == "div":
            return checked(divide(self.of(node[1]), self.of(node[2])))
        if kind == "neg":
            return -self.of(node[1])
        if kind == "pct":
            return checked(self.of(node[1]) / 100)
        if kind == "deg":
            return checked(real(self.of(node[1])) * mp.pi / 180)
        if kind == "fact":
            spend(60)
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

    def _chain(self, kind: str, node: Node) -> Value:
        """a + b + c + ..., without a call for each step: such trees are a thousand deep."""
        later: list[Node] = []
        while node[0] == kind:
            later.append(node[2])
            node = node[1]
        value = self.of(node)
        for part in reversed(later):
            spend(self.weight)
            value = checked((add if kind == "add" else multiply)(value, self.of(part)))
        return value

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

    def _power(self, a: Value, b: Value) -> Value:
        """Over the reals (-8)^{1/3} is -2, and (-8)^{1/2} is nothing."""
        if self.reals and isinstance(b, Fraction) and b.denominator % 2 and b.denominator > 1 and a < 0:
            return power(root(a, Fraction(b.denominator)), Fraction(b.numerator))
        return power(a, b)

    def _function(self, name: str, arguments: list[Value]) -> Value:
        spend(10 * self.weight)
        if name == "root":
            return root(*arguments)
        if name == "binom":
            spend(150)
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
        value = unknown(f"{name}({','.join(told)})", 0)
        return -value if self.reals and int(value * 1000) % 2 else value

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


def evaluate(node: Node, env: Mapping[str, Value] | None = None, digits: int = DIGITS, reals: bool = False) -> Value:
    """The value of a tree: a Fraction, or an mpmath number of `digits` digits. `reals`: nothing in it may be complex.
    Raises Refused, Undefined."""
    with mp.workdps(digits):
        try:
            return _Evaluator(env or {}, digits, reals).of(node)
        except (OverflowError, MemoryError):
            raise Refused("a number too large to write down") from None
        except RecursionError:
            raise Refused("nested too deep") from None
        except (ValueError, ZeroDivisionError, TypeError):
            raise Undefined("no value") from None


def constant(node: Node) -> Value:
    """The value of a tree without symbols."""
    if symbols(node):
        raise Refused("not a constant")
    return evaluate(node)


def same(a: Node, b: Node) -> bool:
    r"""Whether a gold's tree and another are the same number, or the same function of their symbols.

    Functions are compared where the gold is defined, over the reals unless an i stands in one of them. Where the gold
    has a value and the other has none, it is another function, but for a few points (a quotient of factorials may have
    none at an integer) and for negative ones of roots and logarithms: \ln(xy) is \ln x + \ln y. What is too large to
    compute says nothing.
    """
    if a == b and a[0] in ("num", "sym", "inf"):
        return True
    if "inf" in kinds(a) | kinds(b):
        return _without_sign(a) == _without_sign(b)
    if not symbols(a) | symbols(b):
        one, other = evaluate(a), evaluate(b)
        if a != b and not isinstance(one, Fraction) and abs(one) > mpf(10) ** (MORE_DIGITS - 60):
            return False  # a rounded number so large may be off by one
        return equal(one, other, partial(_both, a, b, {}, False))
    agreed = None if speaks_of_i(a) or speaks_of_i(b) else _same_function(a, b, True)
    return bool(_same_function(a, b, False) if agreed is None else agreed)


def _same_function(a: Node, b: Node, reals: bool) -> bool | None:
    """None where the gold, a, has hardly any values."""
    agreed = missing = 0
    cornered = has_corners(a) or has_corners(b)
    for env in points([a, b]):
        try:
            one = evaluate(a, env, reals=reals)
        except Refused:
            continue
        try:
            other = evaluate(b, env, reals=reals)
        except Undefined:
            missing += cornered or positive(env)
            continue
        except Refused:
            continue
        if not (agreed and equal(one, other)) and not equal(one, other, partial(_both, a, b, env, reals)):
            return False
        agreed += 1
    if agreed + missing < 2:
        return None
    return agreed > 1 and missing * 6 <= agreed


def _without_sign(node: Node) -> tuple[int, Node]:
    sign = 1
    while node[0] == "neg":
        sign, node = -sign, node[1]
    return sign, node


def _both(a: Node, b: Node, env: Mapping[str, Value], reals: bool, digits: int) -> tuple[Value, Value]:
    return real(evaluate(a, env, digits, reals)), real(evaluate(b, env, digits, reals))


def equal(a: Value, b: Value, again: Callable[[int], tuple[Value, Value]] | None = None) -> bool:
    """Whether two values are the same: exactly where both are exact, else to 40 digits relative to the larger.
    `again` computes both with 500 digits, of which 440 must agree: how a zero is told from a small number, and
    \\sqrt2 from a long decimal."""
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    with mp.workdps(DIGITS):
        size, apart = _apart(a, b)
        if again is None:
            return bool(apart <= size * mpf(10) ** CLOSE)
        if apart > mpf(10) ** -20 and apart > size * mpf(10) ** -20:
            return False
    if any(isinstance(value, Fraction) and _bits(value) > 3 * MORE_DIGITS for value in (a, b)):
        return False  # no answer writes an irrational number with so many digits
    with mp.workdps(MORE_DIGITS):
        size, apart = _apart(*again(MORE_DIGITS))
        few = mpf(10) ** (60 - MORE_DIGITS)
        return bool(apart <= size * few or size <= few)


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())


def _apart(a: Value, b: Value) -> tuple[Value, Value]:
    a, b = real(a), real(b)
    return max(abs(a), abs(b)), abs(a - b)
