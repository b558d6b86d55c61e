"""Answers as text: light normalisation, limits, and where brackets match. Nothing here evaluates anything.

Every function takes time linear in its text, which is at most LONGEST characters.
"""

from __future__ import annotations

import re
from functools import lru_cache

LONGEST, DEEPEST = 4_000, 64
_LONGEST_RAW = 5 * LONGEST  # with redundant parentheses and spacing commands


class Refused(Exception):
    """The text is no answer that can be judged: too long, too deep, too large a number, or no mathematics known
    here. The message is one line."""


_UNICODE = {
    **{"−": "-", "–": "-", "—": "-", "﹣": "-", "－": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot "},
    **{"∙": r"\cdot ", "÷": r"\div ", "∗": "*", "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge "},
    **{"≠": r"\ne ", "≈": r"\approx ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "°": r"^\circ ", "∅": r"\emptyset "},
    **{"±": r"\pm ", "∓": r"\mp ", "％": r"\%", "，": ",", "；": ";", "：": ":", "（": "(", "）": ")"},
    **{"∖": r"\setminus ", "¢": r"\text{ cents}"},
    **{"½": r"\frac12 ", "¼": r"\frac14 ", "¾": r"\frac34 ", "⅓": r"\frac13 ", "⅔": r"\frac23 ", "⅛": r"\frac18 "},
    **{"√": r"\sqrt ", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "⟨": r"\langle ", "⟩": r"\rangle ", "∨": r"\lor "},
    **{"⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ", "′": "'", "’": "'", "‘": "'"},
    **{"€": r"\text{€}", "£": r"\text{£}", "∠": r"\angle ", "∧": r"\land ", "≡": r"\equiv ", "…": r"\ldots "},
    **dict.fromkeys("\u00a0\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u3000\t\n\r", " "),
    **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff", ""),
    **dict(zip("０１２３４５６７８９", "0123456789", strict=True)),
    **{up: f"^{{{plain}}}" for up, plain in zip("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789", strict=True)},
    **{down: f"_{{{plain}}}" for down, plain in zip("₀₁₂₃₄₅₆₇₈₉", "0123456789", strict=True)},
    **{g: f"\\{name} " for g, name in zip(
        "αβγδεζηθκλμνξρστφχψωΓΔΘΛΞΣΦΨΩ",
        "alpha beta gamma delta epsilon zeta eta theta kappa lambda mu nu xi rho sigma tau phi chi psi omega Gamma "
        "Delta Theta Lambda Xi Sigma Phi Psi Omega".split(), strict=True)},
}  # fmt: skip
_TRANSLATION = str.maketrans(_UNICODE)

# A plain number needs none of the passes below.
_PLAIN = re.compile(r"[+-]?[0-9]+(?:\.[0-9]+)?")
# 1{,}000, 1\,000, 1,\!000: one number. A digit on the left, exactly three on the right. A comma and a space (1,\,000)
# part two items; a plain comma is left as it is: exact.py joins it where the whole answer is one number.
_THOUSANDS = re.compile(r"(?<=\d)(?:\{,\}(?:\\!)*|,(?:\\!)+|\\[,!:; ]|~)\s*(?=\d{3}(?!\d))")
# As wide a space between two numbers parts them.
_PARTED = re.compile(r"(?<=\d)\s*\\(?:q?quad(?![A-Za-z])|[hv]space\*?\{[^{}]*\}|phantom\{[^{}]*\})\s*(?=\d)")
_LONE_BACKSLASH = re.compile(r"(?<!\\)\\\Z")  # of `3\ `, once stripped
# \text{The answer is }12, \text{Total: }12
_LEAD = re.compile(
    r"\\text\{\s*(?:(?:so|thus|the|our|final|correct) )*(?:answer|result|total|value|probability)(?: is:?|:)\s*\}",
    re.IGNORECASE,
)
_MODULO = re.compile(r"\(?\s*(?:\\(?:[bp]mod|mod)(?![A-Za-z])|\\text\{\s*mod\s*\})\s*\{?\s*(\w+)\s*\}?\s*\)?")
_CASES_COMMA = re.compile(r"[,.;]\s*(?=&|\\\\|\\end\{)|\\text\{\s*(?:if|for|when)\s*\}")
_DROPPED = re.compile(
    r"(?<!\\)\\(?:left|right|middle|[bB]igg?[lrm]?)(?![A-Za-z])\s*\.?|(?<!\\)\\!"
    r"|\\(?:displaystyle|textstyle|limits|nolimits|hfill)(?![A-Za-z])|(?<!\\)\\[()\[\]]"
    r"|\\label\{[^{}]*\}|\\(?:text)?color(?:box)?\s*(?:\[[^\]]*\])?\{[^{}]*\}"
)
_SPACES = re.compile(
    r"(?<!\\)\\[,;:> ]|\\(?:quad|qquad|enspace|thinspace)(?![A-Za-z])|~|\\(?:[hv]space\*?|phantom)\{[^{}]*\}|\s+"
)
_RENAMED = (
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\[dt]binom(?![A-Za-z])"), r"\\binom"),
    (re.compile(r"\\(?:leq|leqslant|leqq)(?![A-Za-z])"), r"\\le "),
    (re.compile(r"\\(?:geq|geqslant|geqq)(?![A-Za-z])"), r"\\ge "),
    (re.compile(r"\\neq(?![A-Za-z])"), r"\\ne "),
    (re.compile(r"\\lt(?![A-Za-z])"), "<"),
    (re.compile(r"\\gt(?![A-Za-z])"), ">"),
    (re.compile(r"\\(?:varnothing)(?![A-Za-z])"), r"\\emptyset "),
    (re.compile(r"\\(?:degree)(?![A-Za-z])"), r"^\\circ "),
    (re.compile(r"\\(?:lbrace)(?![A-Za-z])"), r"\\{"),
    (re.compile(r"\\(?:rbrace)(?![A-Za-z])"), r"\\}"),
    (re.compile(r"\\(?:lbrack)(?![A-Za-z])"), "["),
    (re.compile(r"\\(?:rbrack)(?![A-Za-z])"), "]"),
    (re.compile(r"\\(?:[lr]vert|vert)(?![A-Za-z])"), "|"),
    (re.compile(r"\\(?:colon)(?![A-Za-z])"), ":"),
    (re.compile(r"\^\s*\{\s*\\circ\s*\}"), r"^\\circ "),
    (re.compile(r"\\(?:mathrm|text|operatorname)\{\s*([eid])\s*\}"), r"\1"),
    (re.compile(r"\\(?:textbf|textit|textrm|textsf|texttt|textnormal|mathrm|mathit|mathsf|mathtt|mbox|hbox|rm|bf|mathbf"
                r"|boldsymbol|operatorname\*?|emph|textup)\s*(?=\{)"), r"\\text"),
    (re.compile(r"\{\\(?:rm|bf|it)\s+([^{}]*)\}"), r"\\text{\1}"),
    (re.compile(r"\\text\s*\{([^{}A-Za-z€£]*)\}"), r" \1 "),  # no letter inside: no text
    (re.compile(r"\\text\s+\{"), r"\\text{"),
    (re.compile(r"\\text\{\s*(?:percent|percentage|per cent)\s*\}|(?<=[\d}]) ?percent(?![A-Za-z])"), r"\\%"),
    # \text{kg m^{2} s^{-1}}: no braces inside
    *[(re.compile(r"(\\text\{[^{}]*)\^\s*\{\s*(-?\d)\s*\}"), r"\1^\2 ")] * 3,
    (re.compile(r"(?<![\^_\\])\{\s*([-+=<>])\s*\}"), r"\1"),  # 2{-}1
)  # fmt: skip
_EDGES = " .,;:"  # at the end; at the beginning a point belongs to a number


def _trimmed(text: str) -> str:
    return text.rstrip(_EDGES).lstrip(" ,;:")


@lru_cache(maxsize=4096)
def prepared(raw: str) -> str:
    """An answer in one spelling: no spacing commands, no delimiters' sizes, no dollars around, one name a command.
    Raises Refused for what is too long or nests too deep."""
    text = raw.strip()
    if _PLAIN.fullmatch(text) and len(text) <= LONGEST:
        return text
    if len(text) > _LONGEST_RAW:
        raise Refused(f"longer than {LONGEST} characters")
    text = _LONE_BACKSLASH.sub("", text)
    text = _PARTED.sub(", ", _THOUSANDS.sub("", text.translate(_TRANSLATION)))
    text = _without_dollars(text)
    text = _SPACES.sub(" ", _DROPPED.sub("", text))
    for pattern, plain in _RENAMED:
        text = pattern.sub(plain, text)
    if r"\begin{cases}" in text:
        text = _CASES_COMMA.sub(" ", text)
    if r"\equiv" in text:
        text = _MODULO.sub(r"\\pmod \1", text)
    lead = _LEAD.match(text.lstrip())
    if lead:
        text = text.lstrip()[lead.end() :]
    text = unwrapped(_trimmed(text))
    if len(text) > LONGEST:
        raise Refused(f"longer than {LONGEST} characters")
    if depth(text) > DEEPEST:
        raise Refused(f"brackets nest deeper than {DEEPEST}")
    return text


def _without_dollars(text: str) -> str:
    """Mathematics' dollars removed; a single one before a digit is money."""
    bare = text.replace(r"\$", "\0")
    if bare.count("$") == 1 and re.match(r"\s*-?\s*\$\s*[\d.]", bare):
        return bare.replace("$", r"\$").replace("\0", r"\$")
    return bare.replace("$", "").replace("\0", r"\$")


_OPEN, _CLOSE = "([{", ")]}"


def matches(text: str) -> list[int]:
    """For each position of an opening bracket, where its closing one stands; -1 elsewhere. Brackets of any kind
    close each other, because of intervals; `\\{` counts as its brace."""
    found = [-1] * len(text)
    opened: list[int] = []
    for at, char in enumerate(text):
        if char in _OPEN:
            opened.append(at)
        elif char in _CLOSE and opened:
            found[opened.pop()] = at
    return found


def depth(text: str) -> int:
    deepest = now = 0
    for char in text:
        if char in _OPEN:
            now += 1
            deepest = max(deepest, now)
        elif char in _CLOSE:
            now -= 1
    return deepest


def unwrapped(text: str) -> str:
    """Without parentheses, braces and boxes that hold the whole: ((7)) is 7, and ((1,2)) is (1,2)."""
    if not text or text[-1] not in ")}":
        return text
    partner = matches(text)
    start, end, kept = 0, len(text), ""  # kept: the innermost pair of parentheses that is taken off
    while start < end:
        while start < end and text[start] == " ":
            start += 1
        while end > start and text[end - 1] == " ":
            end -= 1
        opening = start
        for command in (r"\boxed{", r"\fbox{", r"\underline{"):
            if text.startswith(command, start):
                opening = start + len(command) - 1
        if opening >= end or partner[opening] != end - 1 or text[opening] == "[" or text[end - 1] == "]":
            break
        if text[opening] + text[end - 1] not in ("()", "{}") or text[end - 2 : end] == r"\}":
            break
        if text[opening] == "(":
            kept = "()"
        start, end = opening + 1, end - 1
    inner = _trimmed(text[start:end])
    if kept and has_comma(inner):
        return f"({inner})"
    return inner


def has_comma(text: str) -> bool:
    """A comma or semicolon outside of all brackets."""
    level = 0
    for char in text:
        if char in _OPEN:
            level += 1
        elif char in _CLOSE:
            level -= 1
        elif char in ",;" and level == 0:
            return True
    return False


_TEXT = re.compile(r"\\text\{([^{}]*)\}")
_LOOSE_SPACE = re.compile(r"(?<![A-Za-z0-9.]) +| +(?![A-Za-z0-9.])")


@lru_cache(maxsize=4096)
def canonical(text: str) -> str:
    """A prepared text in which spaces and text commands no longer matter; equal texts are the same answer."""
    text = _trimmed(_TEXT.sub(r" \1 ", text))
    text = re.sub(r"([_^])\{(\w)\}", r"\1\2", text)
    text = re.sub(r"(\\frac|\\binom)\s*(\d)\s*(?=[\d{])", r"\1{\2}", text)
    text = re.sub(r"(\\frac\{\d\}|\\binom\{\d\})\s*(\d)", r"\1{\2}", text)
    text = re.sub(r"(\\[A-Za-z]+) +(?=\d)", r"\1", text)
    return _LOOSE_SPACE.sub("", re.sub(r" +", " ", text))


_WORDLY = re.compile(r"[^\w\s+\-/]", re.UNICODE)
_NOT_WORDS = re.compile(r"[\\^=<>{}|]|_\d")


def words(text: str) -> str | None:
    """Plain words of a prepared text, or None where it holds mathematics: case, punctuation and a leading article do
    not matter."""
    plain = _TEXT.sub(r" \1 ", text)
    if _NOT_WORDS.search(plain) or not any(char.isalpha() for char in plain):
        return None
    plain = " ".join(_WORDLY.sub(" ", plain.replace(".", "").replace("'", "")).split()).casefold()
    return re.sub(r"^(?:the|an|a) (?=\w{2})", "", plain)
