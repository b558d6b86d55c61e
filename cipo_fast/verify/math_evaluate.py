"""Values of expressions: exact rationals where there are any, else 60 digits; and whether two expressions are the same.

Two expressions are the same when they agree, to 40 digits relative to their size, wherever they are tried. A constant
is tried once; symbols get values that depend on their names alone, positive and irrational-looking, or integers where
floors, factorials and binomials stand. Different formulas that agree so at several random points do not occur
(Schwartz-Zippel for polynomials), and nothing is ever rewritten, so nothing can hang.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from mpmath import mp, mpc, mpf

from cipo_fast.verify.math_parse import Node
from cipo_fast.verify.math_text import Refused

DIGITS = 60
_CLOSE = -40  # powers of ten, relative
_MOST_BITS = 100_000  # of an exact power or factorial
_MOST_TERMS = 2_000  # of all sums together
_MOST_EXPONENT = 10**12  # of two, in a rounded number
_MOST_STEPS = 200_000

Value = Any  # Fraction, mpf or mpc


class Undefined(Refused):
    """No value here: a division by zero, a binomial of a non-integer. Other points may have one."""


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
            return _checked(_BINARY[kind](self.of(node[1]), self.of(node[2])))
        if kind == "neg":
            return -self.of(node[1])
        if kind == "pct":
            return _checked(self.of(node[1]) / 100)
        if kind == "deg":
            return _checked(_real(self.of(node[1])) * mp.pi / 180)
        if kind == "fact":
            return _checked(_factorial(self.of(node[1])))
        if kind == "fn":
            return _checked(self._function(node[1], [self.of(argument) for argument in node[2:]]))
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
            return _root(*arguments)
        if name == "binom":
            return _binomial(*arguments)
        if name in ("floor", "ceil", "abs", "sgn"):
            return _stepped(name, arguments[0])
        if name in ("max", "min"):
            return (max if name == "max" else min)(arguments, key=_ordered)
        if name in ("gcd", "lcm"):
            numbers = [_integer(argument) for argument in arguments]
            return Fraction(math.gcd(*numbers) if name == "gcd" else math.lcm(*numbers))
        if name in ("log", "lg") and len(arguments) == 1:
            return _log(arguments[0]) / _unknown("base of log", 0)  # ln to some, log10 to others
        if name == "log":
            return _divide(_log(arguments[0]), _log(arguments[1]))
        if name == "cis":
            return mp.expj(_real(arguments[0]))
        function = _MP_FUNCTIONS.get(name)
        if function is None or len(arguments) != 1:
            raise Refused(f"{name} is not known")
        return function(_real(arguments[0]))

    def _call(self, name: str, arguments: list[Value]) -> Value:
        """An unknown function: a number that depends on its name and its arguments alone."""
        told = [mp.nstr(_real(argument), 25) for argument in arguments]
        return _unknown(f"{name}({','.join(told)})", 0)

    def _series(self, node: Node) -> Value:
        _, variable, first, last, body = node
        begin, end = _integer(self.of(first)), _integer(self.of(last))
        self.terms += max(0, end - begin + 1)
        if self.terms > _MOST_TERMS:
            raise Refused(f"sums of more than {_MOST_TERMS} terms")
        before = self.env.get(variable)
        total: Value = Fraction(0 if node[0] == "sum" else 1)
        for index in range(begin, end + 1):
            self.env[variable] = Fraction(index)
            term = self.of(body)
            total = _checked(_add(total, term) if node[0] == "sum" else _multiply(total, term))
        if before is None:
            self.env.pop(variable, None)
        else:
            self.env[variable] = before
        return total


def _real(value: Value) -> Value:
    """An mpmath number of an exact one."""
    return mpf(value.numerator) / value.denominator if isinstance(value, Fraction) else value


def _pair(a: Value, b: Value) -> tuple[Value, Value]:
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a, b
    return _real(a), _real(b)


def _add(a: Value, b: Value) -> Value:
    a, b = _pair(a, b)
    return a + b


def _multiply(a: Value, b: Value) -> Value:
    a, b = _pair(a, b)
    return a * b


def _divide(a: Value, b: Value) -> Value:
    a, b = _pair(a, b)
    if b == 0:
        raise Undefined("a division by zero")
    return a / b


def _power(a: Value, b: Value) -> Value:
    if isinstance(b, Fraction) and b.denominator == 1 and isinstance(a, Fraction):
        exponent = b.numerator
        if a == 0 and exponent < 0:
            raise Undefined("a division by zero")
        if a in (0, 1):
            return a if exponent else Fraction(1)
        if a == -1:
            return Fraction(-1 if exponent % 2 else 1)
        if abs(exponent) * max(a.numerator.bit_length(), a.denominator.bit_length()) <= _MOST_BITS:
            return a**exponent
    if isinstance(b, Fraction) and b.denominator % 2 == 1 and b.denominator > 1 and isinstance(a, Fraction) and a < 0:
        pass  # (-8)^{1/3}: the principal value, as everywhere
    a, b = _real(a), _real(b)
    if a == 0:
        if isinstance(b, mpf) and b > 0:
            return mpf(0)
        raise Undefined("a power of zero")
    size = abs(b * mp.log(a))
    if size > _MOST_EXPONENT:
        raise Refused("a number too large to write down")
    return mp.power(a, b)


def _root(a: Value, degree: Value) -> Value:
    """The real root of a negative number where the degree is odd; else the principal one. Exact where it is rational."""
    n = _integer(degree) if isinstance(degree, Fraction) else 0
    if isinstance(a, Fraction) and n >= 2:
        if a < 0 and n % 2:
            return -_root(-a, degree)
        if a >= 0 and n <= 64:
            above, below = _whole_root(a.numerator, n), _whole_root(a.denominator, n)
            if above is not None and below is not None:
                return Fraction(above, below)
    elif isinstance(a, mpf) and a < 0 and n % 2:
        return -mp.root(-a, n)
    return _power(a, _divide(Fraction(1), degree))


def _whole_root(a: int, n: int) -> int | None:
    if a.bit_length() > 2_000:
        return None
    if n == 2:
        root = math.isqrt(a)
    else:
        root, high = 0, 1 << (a.bit_length() // n + 1)
        while root < high:
            middle = (root + high + 1) // 2
            root, high = (middle, high) if middle**n <= a else (root, middle - 1)
    return root if root**n == a else None


def _factorial(a: Value) -> Value:
    if isinstance(a, Fraction) and a.denominator == 1:
        n = a.numerator
        if n < 0:
            raise Undefined("the factorial of a negative number")
        if n > 10_000:
            raise Refused("the factorial of a number above 10,000")
        return Fraction(math.factorial(n)) if n <= 3_000 else mp.factorial(n)
    raise Undefined("the factorial of no integer")


def _binomial(n: Value, k: Value) -> Value:
    if not (isinstance(n, Fraction) and isinstance(k, Fraction) and n.denominator == k.denominator == 1):
        raise Undefined("a binomial of no integers")
    if n < 0:
        raise Undefined("a binomial of a negative number")
    if k < 0 or k > n:
        return Fraction(0)
    if n > 20_000:
        raise Refused("a binomial of a number above 20,000")
    return Fraction(math.comb(n.numerator, k.numerator))


def _stepped(name: str, a: Value) -> Value:
    if name == "abs":
        return abs(a)
    if isinstance(a, mpc):
        raise Undefined("a step of a complex number")
    if name == "sgn":
        return Fraction((a > 0) - (a < 0))
    if isinstance(a, Fraction):
        return Fraction(math.floor(a) if name == "floor" else math.ceil(a))
    near = mp.nint(a)
    if abs(a - near) < mpf(10) ** _CLOSE * max(1, abs(a)):
        return Fraction(int(near))  # \log_2 8 is three, and not a bit less
    if abs(a) > mpf(10) ** 30:
        raise Refused("a number too large to round")
    return Fraction(int(mp.floor(a) if name == "floor" else mp.ceil(a)))


def _log(a: Value) -> Value:
    a = _real(a)
    if a == 0:
        raise Undefined("the logarithm of zero")
    return mp.log(a)


def _integer(a: Value) -> int:
    if not (isinstance(a, Fraction) and a.denominator == 1):
        raise Undefined("an integer is needed")
    return a.numerator


def _ordered(a: Value) -> Value:
    if isinstance(a, mpc):
        raise Undefined("complex numbers have no order")
    return _real(a)


def _checked(a: Value) -> Value:
    if isinstance(a, Fraction):
        if a.numerator.bit_length() > 4 * _MOST_BITS or a.denominator.bit_length() > 4 * _MOST_BITS:
            return _checked(_real(a))
        return a
    for part in (a.real, a.imag) if isinstance(a, mpc) else (a,):
        if not mp.isfinite(part):
            raise Undefined("no finite value")
        if part and abs(mp.mag(part)) > _MOST_EXPONENT:
            raise Refused("a number too large to write down")
    if isinstance(a, mpc) and a.imag == 0:
        return a.real
    return a


_BINARY: dict[str, Callable[[Value, Value], Value]] = {
    "add": _add,
    "mul": _multiply,
    "div": _divide,
    "pow": _power,
}


def _guarded(function: Callable[[Value], Value]) -> Callable[[Value], Value]:
    def guarded(a: Value) -> Value:
        if abs(a) > 10**15:
            raise Refused("an argument too large for this function")
        try:
            return function(a)
        except (ValueError, ZeroDivisionError):
            raise Undefined("a pole") from None

    return guarded


_MP_FUNCTIONS: dict[str, Callable[[Value], Value]] = {
    **{name: _guarded(getattr(mp, name)) for name in "sin cos tan cot sec csc sinh cosh tanh coth exp".split()},
    **{"arc" + name: _guarded(getattr(mp, "a" + name)) for name in "sin cos tan cot sec csc sinh cosh tanh".split()},
    "ln": _log,
    "Re": lambda a: mp.re(a),
    "Im": lambda a: mp.im(a),
    "arg": lambda a: mp.arg(a),
}


def _unknown(name: str, point: int) -> Value:
    """A number between 0.5 and 2.5 that depends on a name and a point alone."""
    digest = hashlib.sha256(f"{point}:{name}".encode()).digest()
    return mpf(int.from_bytes(digest, "big")) / mpf(2) ** 255 + mpf("0.5")


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
        tries = [{name: _unknown(name, point) for name in names} for point in range(1, 5)]
        if stand & _SIGNED:
            tries += [
                {name: _unknown(name, point) * (-1 if _unknown(name, -point) < 1.5 else 1) for name in names}
                for point in range(5, 13)
            ]
        return tries


def _integers(names: set[str], point: int) -> dict[str, Value]:
    """Small integers; a letter later in the alphabet gets smaller ones by no rule, so both n > k and k > n occur."""
    return {name: Fraction(2 + int(_unknown(name, 100 + point) * (4 + 3 * point))) for name in names}


def same(a: Node, b: Node) -> bool:
    """Whether two trees are the same number, or the same function of their symbols."""
    if a == b and a[0] in ("num", "sym", "inf"):
        return True
    if "inf" in kinds(a) | kinds(b):
        return _without_sign(a) == _without_sign(b)
    agreed = 0
    for env in points([a, b]):
        values = [_value_or_none(node, env) for node in (a, b)]
        if values[0] is None and values[1] is None:
            continue
        if values[0] is None or values[1] is None:
            return False
        if not equal(values[0], values[1], lambda digits, env=env: (_again(a, env, digits), _again(b, env, digits))):
            return False
        agreed += 1
    return agreed > 0


def _without_sign(node: Node) -> tuple[int, Node]:
    sign = 1
    while node[0] == "neg":
        sign, node = -sign, node[1]
    return sign, node


def _value_or_none(node: Node, env: Mapping[str, Value]) -> Value:
    try:
        return evaluate(node, env)
    except Undefined:
        return None


def _again(node: Node, env: Mapping[str, Value], digits: int) -> Value:
    return _real(evaluate(node, env, digits))


def equal(a: Value, b: Value, again: Callable[[int], tuple[Value, Value]] | None = None) -> bool:
    """Whether two values are the same: exactly where both are exact, else to 40 digits relative to the larger.
    `again` computes both with more digits: how a true zero is told from a small number."""
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    with mp.workdps(DIGITS):
        a, b = _real(a), _real(b)
        size, apart = max(abs(a), abs(b)), abs(a - b)
        if apart <= size * mpf(10) ** _CLOSE:
            return True
        if apart > mpf(10) ** -20 or again is None:
            return False
    more = 4 * DIGITS
    with mp.workdps(more):
        a, b = again(more)
        return bool(abs(a - b) <= mpf(10) ** -(3 * DIGITS) and max(abs(a), abs(b)) <= mpf(10) ** -(3 * DIGITS))
