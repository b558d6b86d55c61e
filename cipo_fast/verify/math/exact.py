"""Numbers, choice letters and words that need no algebra: read by regular expressions, compared exactly."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from cipo_fast.verify.math.policy import MathPolicy

# An exponent of ten beyond this is no number that an answer writes.
LARGEST_EXPONENT = 2_000


@dataclass(frozen=True)
class Number:
    """A literal number. `unit_place`: the value of its last written digit where it is a decimal, else None."""

    value: Fraction
    unit_place: Fraction | None = None
    percent: bool = False


_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d+)"
_UNSIGNED = rf"(?P<whole>{_DIGITS})?(?:\.(?P<part>\d*))?"
_POWER = (
    r"(?:[eE](?P<e>[+-]?\d{1,5})|\s*(?:\\times|\\cdot|\*|x)\s*10\s*\^\s*(?:\{\s*(?P<b>[+-]?\s*\d{1,5})\s*\}|(?P<c>\d)))"
)
_DECIMAL = re.compile(rf"(?P<sign>[+-]?)\s*{_UNSIGNED}{_POWER}?\s*(?P<percent>\\?%)?", re.ASCII)
_TEN = re.compile(r"(?P<sign>[+-]?)\s*10\s*\^\s*(?:\{\s*(?P<b>[+-]?\s*\d{1,5})\s*\}|(?P<c>\d))", re.ASCII)
_PART = r"(?:\{\s*(?P<{0}a>[+-]?\d+)\s*\}|\s*(?P<{0}b>\d))"
_FRACTION = re.compile(
    rf"(?P<sign>[+-]?)\s*(?:(?P<mixed>\d+)\s*)?(?:\\frac\s*{_PART.replace('{0}', 'n')}\s*{_PART.replace('{0}', 'd')}"
    r"|(?P<above>(?<![\d.])\d+)\s*/\s*(?P<below>\d+))",
    re.ASCII,
)


@lru_cache(maxsize=4096)
def number(text: str) -> Number | None:
    """A prepared text that is one number: an integer, a decimal, a fraction, a mixed number, a percentage, in digits
    alone or in scientific notation. None for all else."""
    match = _DECIMAL.fullmatch(text)
    if match and (match["whole"] or match["part"]):
        return _decimal(match)
    match = _TEN.fullmatch(text)
    if match:
        return _scaled(Fraction(-1 if match["sign"] == "-" else 1), match["b"] or match["c"], None)
    match = _FRACTION.fullmatch(text)
    return _fraction(match) if match else None


def _decimal(match: re.Match[str]) -> Number | None:
    whole, part = (match["whole"] or "").replace(",", "").replace(" ", ""), match["part"] or ""
    value = Fraction(int((whole + part) or "0"), 10 ** len(part))
    place = Fraction(1, 10 ** len(part)) if part else None
    exponent = match["e"] or match["b"] or match["c"]
    if match["sign"] == "-":
        value = -value
    read = _scaled(value, exponent, place or Fraction(1)) if exponent else Number(value, place)
    if read and match["percent"]:
        return Number(read.value / 100, read.unit_place / 100 if read.unit_place else None, percent=True)
    return read


def _scaled(value: Fraction, exponent: str, place: Fraction | None) -> Number | None:
    power = int(exponent.replace(" ", ""))
    if abs(power) > LARGEST_EXPONENT:
        return None
    scale = Fraction(10) ** power
    return Number(value * scale, place * scale if place else None)


def _fraction(match: re.Match[str]) -> Number | None:
    above = int(match["na"] or match["nb"] or match["above"])
    below = int(match["da"] or match["db"] or match["below"])
    if below == 0:
        return None
    value = Fraction(above, below)
    if match["mixed"]:
        if not 0 < value < 1:  # 2\frac54 is not a mixed number, and what else it is cannot be said
            return None
        value += int(match["mixed"])
    return Number(-value if match["sign"] == "-" else value)


def numbers_agree(gold: Number, answer: Number, policy: MathPolicy, error: Fraction | None = None) -> bool:
    """Whether a number is the gold's. `error`: an absolute tolerance that the row gives."""
    if near(gold, answer.value, policy, error):
        return True
    if policy.percent == "either" and gold.percent != answer.percent:
        return near(gold, answer.value * 100 if answer.percent else answer.value / 100, policy, error)
    return False


def near(gold: Number, value: Fraction, policy: MathPolicy, error: Fraction | None = None) -> bool:
    apart = abs(gold.value - value)
    if apart == 0 or (error is not None and apart <= error):
        return True
    if gold.unit_place is None:
        return False  # an exact gold has no neighbours
    if policy.rounding == "gold_digits" and apart <= gold.unit_place / 2:
        return True
    return policy.tolerance > 0 and apart <= abs(gold.value) * Fraction(policy.tolerance)


# \text{Option C}, \text{The answer is (C)}
_CALLED = r"(?i:(?:the )?(?:correct |final )?(?:(?:answer|option|choice)(?: is|:)?\s*){1,2})?"
_CHOICE = re.compile(
    rf"(?:\\text\{{\s*)?{_CALLED}\}}?\s*\(?\s*(?:\\text\{{\s*)?\(?([A-J])\s*\}}?\s*\)?[.:]?\s*\}}?\s*\)?"
)
_LABELLED = re.compile(r"(?:\\text\{\s*)?(?:\(\s*([A-J])\s*\)|([A-J])\s*[).:])\s*\}?\s*(?P<rest>.+)")
# A text that holds no more than these and letters, or begins or ends so, is another choice and no text of this one.
_BESIDE = set("or and nor but not no either both maybe perhaps possibly also then is the answer option choice".split())
_OTHER_CHOICE = re.compile(
    r"(?i:or|nor|and|but|maybe|perhaps|possibly|is|also)\b.*"
    r"|.*\b(?i:or|nor|and|but|not|maybe|perhaps|possibly)\s+(?:(?i:option|choice)\s+)?[A-J]",
    re.DOTALL,
)
_ANY_LABEL = re.compile(r"\([A-J]\)|(?<![A-Za-z])[A-J]\s*[).:]")


def choice(text: str) -> str | None:
    """The letter of a prepared text that is a choice: C, (C), \\text{(C)}."""
    match = _CHOICE.fullmatch(text)
    return match[1] if match else None


def labelled(text: str) -> tuple[str, str] | None:
    """Letter and text of `(C) 17`; None when it names none, or several: the text of a choice is no other letter."""
    match = _LABELLED.fullmatch(text)
    if match is None or _ANY_LABEL.search(match["rest"]):
        return None
    plain = " ".join(
        re.sub(
            r"\\(?:text|to|rightarrow|Rightarrow|implies|equiv)(?![A-Za-z])|[^\w+\-*=<>^\\]", " ", match["rest"]
        ).split()
    )
    letters = re.findall(r"\b[A-J]\b", plain)
    if letters and all(word in letters or word.lower() in _BESIDE for word in plain.split()):
        return None
    if _OTHER_CHOICE.fullmatch(plain):
        return None
    return match[1] or match[2], match["rest"].strip()
