"""Arithmetic on values: exact rationals while they last, mpmath's numbers else. Each operation refuses what would take
long or fill the memory, before it begins."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from fractions import Fraction
from typing import Any

from mpmath import mp, mpc, mpf

from cipo_fast.verify.math.text import Refused

CLOSE = -40  # powers of ten, relative to the larger: two values that are the same
_MOST_BITS = 100_000  # of an exact power or factorial
_MOST_EXPONENT = 10**12  # of two, in a rounded number

Value = Any  # Fraction, mpf or mpc


class Undefined(Refused):
    """No value here: a division by zero, a binomial of a non-integer. Other points may have one."""


class TooMuch(ArithmeticError):
    """The work that one comparison may take is used up. Not Refused: no reader of a part goes on after it."""


_left: ContextVar[list[float] | None] = ContextVar("_left", default=None)


@contextmanager
def budget(work: float) -> Iterator[None]:
    """Work that all evaluations inside may take together, in units of some five microseconds."""
    token = _left.set([work])
    try:
        yield
    finally:
        _left.reset(token)


def spend(work: float) -> None:
    left = _left.get()
    if left is not None:
        left[0] -= work
        if left[0] < 0:
            raise TooMuch("too long a computation")


def real(value: Value) -> Value:
    """An mpmath number of an exact one."""
    return mpf(value.numerator) / value.denominator if isinstance(value, Fraction) else value


def _pair(a: Value, b: Value) -> tuple[Value, Value]:
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a, b
    return real(a), real(b)


def add(a: Value, b: Value) -> Value:
    a, b = _pair(a, b)
    return a + b


def multiply(a: Value, b: Value) -> Value:
    a, b = _pair(a, b)
    return a * b


def divide(a: Value, b: Value) -> Value:
    a, b = _pair(a, b)
    if b == 0:
        raise Undefined("a division by zero")
    return a / b


def power(a: Value, b: Value) -> Value:
    if isinstance(b, Fraction) and b.denominator == 1 and isinstance(a, Fraction):
        exponent = b.numerator
        if a == 0 and exponent < 0:
            raise Undefined("a division by zero")
        if a in (0, 1):
            return a if exponent else Fraction(1)
        if a == -1:
            return Fraction(-1 if exponent % 2 else 1)
        if abs(exponent) * max((abs(part) - 1).bit_length() for part in a.as_integer_ratio()) <= _MOST_BITS:
            return a**exponent
    a, b = real(a), real(b)
    if a == 0:
        if isinstance(b, mpf) and b > 0:
            return mpf(0)
        raise Undefined("a power of zero")
    size = abs(b * mp.log(a))
    if size > _MOST_EXPONENT:
        raise Refused("a number too large to write down")
    return mp.power(a, b)


def root(a: Value, degree: Value) -> Value:
    """The real root of a negative number where the degree is odd; else the principal one. Exact if rational."""
    n = integer(degree) if isinstance(degree, Fraction) else 0
    if isinstance(a, Fraction) and n >= 2:
        if a < 0 and n % 2:
            return -root(-a, degree)
        if a >= 0 and n <= 64:
            above, below = _whole_root(a.numerator, n), _whole_root(a.denominator, n)
            if above is not None and below is not None:
                return Fraction(above, below)
    elif isinstance(a, mpf) and a < 0 and n % 2:
        return -mp.root(-a, n)
    return power(a, divide(Fraction(1), degree))


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


def factorial(a: Value) -> Value:
    if isinstance(a, Fraction) and a.denominator == 1:
        n = a.numerator
        if n < 0:
            raise Undefined("the factorial of a negative number")
        if n > 10_000:
            raise Refused("the factorial of a number above 10,000")
        return Fraction(math.factorial(n)) if n <= 3_000 else mp.factorial(n)
    raise Undefined("the factorial of no integer")


def binomial(n: Value, k: Value) -> Value:
    if not (isinstance(n, Fraction) and isinstance(k, Fraction) and n.denominator == k.denominator == 1):
        raise Undefined("a binomial of no integers")
    if n < 0:
        raise Undefined("a binomial of a negative number")
    if k < 0 or k > n:
        return Fraction(0)
    if n > 20_000:
        raise Refused("a binomial of a number above 20,000")
    if min(k, n - k) > 2_500:
        return mp.binomial(real(n), real(k))
    return Fraction(math.comb(n.numerator, k.numerator))


def stepped(name: str, a: Value) -> Value:
    if name == "abs":
        return abs(a)
    if isinstance(a, mpc):
        raise Undefined("a step of a complex number")
    if name == "sgn":
        return Fraction((a > 0) - (a < 0))
    if isinstance(a, Fraction):
        return Fraction(math.floor(a) if name == "floor" else math.ceil(a))
    near = mp.nint(a)
    if abs(a - near) < mpf(10) ** CLOSE * max(1, abs(a)):
        return Fraction(int(near))  # \log_2 8 is three, and not a bit less
    if abs(a) > mpf(10) ** 30:
        raise Refused("a number too large to round")
    return Fraction(int(mp.floor(a) if name == "floor" else mp.ceil(a)))


def log(a: Value) -> Value:
    a = real(a)
    if a == 0:
        raise Undefined("the logarithm of zero")
    return mp.log(a)


def integer(a: Value) -> int:
    if not (isinstance(a, Fraction) and a.denominator == 1):
        raise Undefined("an integer is needed")
    return a.numerator


def ordered(a: Value) -> Value:
    if isinstance(a, mpc):
        raise Undefined("complex numbers have no order")
    return real(a)


def checked(a: Value) -> Value:
    if isinstance(a, Fraction):
        if a.numerator.bit_length() > 1.5 * _MOST_BITS or a.denominator.bit_length() > 1.5 * _MOST_BITS:
            return checked(real(a))
        return a
    for part in (a.real, a.imag) if isinstance(a, mpc) else (a,):
        if not mp.isfinite(part):
            raise Undefined("no finite value")
        if part and abs(mp.mag(part)) > _MOST_EXPONENT:
            raise Refused("a number too large to write down")
    if isinstance(a, mpc) and a.imag == 0:
        return a.real
    return a


def _guarded(function: Callable[[Value], Value]) -> Callable[[Value], Value]:
    def guarded(a: Value) -> Value:
        if abs(a) > 10**15:
            raise Refused("an argument too large for this function")
        try:
            return function(a)
        except (ValueError, ZeroDivisionError):
            raise Undefined("a pole") from None

    return guarded


FUNCTIONS: dict[str, Callable[[Value], Value]] = {
    **{name: _guarded(getattr(mp, name)) for name in "sin cos tan cot sec csc sinh cosh tanh coth exp".split()},
    **{"arc" + name: _guarded(getattr(mp, "a" + name)) for name in "sin cos tan cot sec csc sinh cosh tanh".split()},
    "ln": log,
    "Re": lambda a: mp.re(a),
    "Im": lambda a: mp.im(a),
    "arg": lambda a: mp.arg(a),
}


def unknown(name: str, point: int) -> Value:
    """A number between 0.5 and 2.5 that depends on a name and a point alone."""
    digest = hashlib.sha256(f"{point}:{name}".encode()).digest()
    return mpf(int.from_bytes(digest, "big")) / mpf(2) ** 255 + mpf("0.5")
