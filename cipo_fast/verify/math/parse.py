"""One mathematical expression, from prepared LaTeX or plain text to a tree of tuples.

A node is a tuple whose first item names it: ("num", Fraction), ("sym", name), ("add", a, b), ("mul", a, b),
("div", a, b), ("pow", a, b), ("neg", a), ("fn", name, *arguments), ("call", name, *arguments) of an unknown function,
("pm", sign, a), ("deg", a), ("pct", a), ("fact", a), ("sum" | "prod", variable, from, to, body), ("inf",).
A recursive descent with one token of look-ahead; what it does not know raises Refused, so nothing is ever half read.
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache
from typing import Any

from cipo_fast.verify.math.text import Refused

Node = tuple[Any, ...]

_FUNCTIONS = {
    *("sin cos tan cot sec csc sinh cosh tanh coth arcsin arccos arctan arccot arcsec arccsc exp ln log lg".split()),
    *("sqrt max min gcd lcm det arg Re Im arcsinh arccosh arctanh sgn cis".split()),
}
_SPELLED = {"asin": "arcsin", "acos": "arccos", "atan": "arctan", "Arcsin": "arcsin", "Arctan": "arctan"}
_PLAIN = "|".join(sorted(_FUNCTIONS | set(_SPELLED) | {"binom"}, key=len, reverse=True))
_TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{1,5}(?![\d.A-Za-z]))?)"
    rf"|(?P<text>\\text\{{[^{{}}]*\}})|(?P<command>\\[A-Za-z]+|\\.)"
    rf"|(?P<word>(?:np\.|math\.)?(?:{_PLAIN})(?![A-Za-z])|pi(?![A-Za-z]))|(?P<char>\*\*|.))",
    re.DOTALL | re.ASCII,
)
_GREEK = set(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho varrho sigma tau "
    "upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega ell hbar mho aleph "
    "nabla partial odot oplus star prime".split()
)
_ACCENTS = {"dot", "ddot", "hat", "vec", "overline", "bar", "tilde", "mathbb", "mathcal", "mathscr", "mathfrak"}
_ACCENTS |= {"widehat", "underline", "overrightarrow", "widetilde"}
_SHAPES = {"angle": "∠", "triangle": "△", "measuredangle": "∠", "arc": "⌒"}
_ENDS = {
    "",
    r"\choose",
    r"\over",
    ")",
    "]",
    "}",
    r"\}",
    ",",
    ";",
    "+",
    "-",
    "=",
    "<",
    ">",
    r"\pm",
    r"\mp",
    r"\rfloor",
    r"\rceil",
    "|",
    r"\|",
}
_CALLED = set("fgFG")
_LONGEST_TREE = 2_500  # tokens


class _Reader:
    """The tokens of a text and a position among them."""

    def __init__(self, text: str) -> None:
        self.tokens: list[tuple[str, str]] = []
        for match in _TOKEN.finditer(text.strip()):
            kind = str(match.lastgroup)
            self.tokens.append((kind, match[kind]))
        if len(self.tokens) > _LONGEST_TREE:
            raise Refused("too many symbols")
        self.at = 0
        self.bars = 0  # open |: a bar then closes
        self.inside = 0

    # tokens

    @property
    def next(self) -> str:
        return self.tokens[self.at][1] if self.at < len(self.tokens) else ""

    @property
    def kind(self) -> str:
        return self.tokens[self.at][0] if self.at < len(self.tokens) else ""

    def peek(self, ahead: int = 1) -> str:
        return self.tokens[self.at + ahead][1] if self.at + ahead < len(self.tokens) else ""

    def take(self) -> str:
        word = self.next
        self.at += 1
        return word

    def accept(self, *words: str) -> bool:
        if self.next in words and self.next:
            self.at += 1
            return True
        return False

    def expect(self, word: str) -> None:
        if not self.accept(word):
            raise Refused(f"{word!r} is missing")

    # grammar

    def whole(self) -> Node:
        node = self._inside()
        if self.next:
            raise Refused(f"{self.next!r} is not understood here")
        return node

    def _inside(self) -> Node:
        """What a group of braces or the whole text holds: a sum, or {a \\over b}, {n \\choose k}."""
        node = self.sum()
        if self.accept(r"\choose"):
            return ("fn", "binom", node, self.sum())
        if self.accept(r"\over"):
            return ("div", node, self.sum())
        return node

    def sum(self) -> Node:
        self.inside += 1
        if self.inside > 100:
            raise Refused("nested too deep")
        node: Node | None = None
        while True:
            word = self.next
            if word in (r"\pm", r"\mp"):
                self.take()
                part: Node = ("pm", 1 if word == r"\pm" else -1, self.product())
                node = part if node is None else ("add", node, part)
            elif word in ("+", "-"):
                minus = self.take() == "-"
                while self.next in ("+", "-"):  # a - -b
                    minus ^= self.take() == "-"
                part = self.product()
                part = ("neg", part) if minus else part
                node = part if node is None else ("add", node, part)
            elif node is None:
                node = self.product()
            else:
                self.inside -= 1
                return node

    def product(self) -> Node:
        node = self._signed_power()
        while True:
            word = self.next
            if word in ("*", r"\cdot", r"\times", r"\ast", r"\bullet"):
                self.take()
                right = self._signed_power()
                cross = word == r"\times" and (_is_vector(node) or _is_vector(right))
                node = ("call", "cross", node, right) if cross else ("mul", node, right)
            elif word in ("/", r"\div"):
                self.take()
                node = ("div", node, self._signed_power())
            elif self._ends_product():
                return node
            elif self.kind == "number" and self.tokens[self.at - 1][0] == "number":
                raise Refused("two numbers side by side")
            else:
                node = ("mul", node, self.power())

    def _ends_product(self) -> bool:
        return self.next in _ENDS and not (self.next == "|" and not self.bars)

    def _signed_power(self) -> Node:
        if self.accept("-"):
            return ("neg", self._signed_power())
        if self.accept("+"):
            return self._signed_power()
        return self.power()

    def power(self) -> Node:
        return self._postfixed(self.primary())

    def _postfixed(self, node: Node) -> Node:
        while True:
            word = self.next
            if word in ("^", "**"):
                self.take()
                if self.accept(r"\circ") or (self.next == "{" and self.peek() == r"\circ" and self._circle()):
                    node = ("deg", node)
                else:
                    node = ("pow", node, self._script())
            elif word == "!":
                self.take()
                if self.next == "!":
                    raise Refused("double factorials are not known")
                node = ("fact", node)
            elif word in (r"\%", "%"):
                self.take()
                node = ("pct", node)
            elif word == "_":
                raise Refused("a subscript of what is no symbol")
            else:
                return node

    def _circle(self) -> bool:
        self.at += 3
        return True

    def _script(self) -> Node:
        """What stands after ^: a group, or one token with its sign."""
        if self.accept("{"):
            node = self._inside()
            self.expect("}")
            return node
        if self.accept("-"):
            return ("neg", self._script())
        if self.accept("+"):
            return self._script()
        if self.next == "(":
            return self.primary()
        if self.kind == "number":
            return ("num", _literal(self.take()))  # 2^10 in plain text means what it says
        return self.primary()

    def _argument(self) -> Node:
        """An argument of \\frac, \\sqrt: a group, or one token; \\frac12 is a half."""
        if self.accept("{"):
            node = self._inside()
            self.expect("}")
            return node
        if self.kind == "number":
            digits = self.take()
            if len(digits) > 1:
                self.at -= 1
                self.tokens[self.at] = ("number", digits[1:])
            return ("num", _literal(digits[0]))
        return self.primary()

    def primary(self) -> Node:
        kind, word = self.kind, self.take()
        if kind == "number":
            return self._number(word)
        if kind == "text":
            return self._symbol("'" + " ".join(word[6:-1].split()) + "'") if word[6:-1].strip() else self.primary()
        if kind == "command":
            return self._command(word[1:])
        if kind == "word":
            name = word.removeprefix("np.").removeprefix("math.")
            return ("sym", "pi") if name == "pi" else self._function(_SPELLED.get(name, name))
        if word == "(":
            return self._group(")")
        if word == "[":
            return self._group("]")
        if word == "{":
            return self._braces()
        if word == "|":
            return self._bars("|")
        if word.isalpha():
            return self._symbol(word)
        raise Refused(f"{word!r} is not understood" if word else "something is missing at the end")

    def _number(self, digits: str) -> Node:
        node: Node = ("num", _literal(digits))
        if not digits.isdigit():
            return self._repeating(digits) or node
        if self.next == r"\frac":
            mark, tokens = self.at, list(self.tokens)
            fraction = self.primary()
            if fraction[0] == "div" and fraction[1][0] == fraction[2][0] == "num" and self.next not in ("^", "!"):
                above, below = fraction[1][1], fraction[2][1]
                if 0 < above < below and above.denominator == below.denominator == 1:
                    return ("num", node[1] + above / below)  # 2\frac34
            self.at, self.tokens = mark, tokens
        elif self.kind == "number" and self.peek() == "/" and self.next.isdigit() and self.peek(2).isdigit():
            above, below = int(self.take()), int((self.take(), self.take())[1])
            if not 0 < above < below:
                raise Refused("two numbers side by side")
            return ("num", node[1] + Fraction(above, below))  # 3 1/2
        return node

    def _repeating(self, digits: str) -> Node | None:
        """0.1\\overline{6}"""
        if "." not in digits or "e" in digits.lower() or self.next not in (r"\overline", r"\bar", r"\dot"):
            return None
        if self.peek() != "{" or self.peek(3) != "}" or not self.peek(2).isdigit():
            return None
        again = self.peek(2)
        self.at += 4
        places = len(digits.split(".")[1])
        return ("num", Fraction(digits.rstrip(".")) + Fraction(int(again), 10**places * (10 ** len(again) - 1)))

    def _group(self, closing: str) -> Node:
        bars, self.bars = self.bars, 0
        node = self.sum()
        self.bars = bars
        self.expect(closing)
        return node

    def _braces(self) -> Node:
        bars, self.bars = self.bars, 0
        node = self._inside()
        self.bars = bars
        self.expect("}")
        return node

    def _bars(self, closing: str) -> Node:
        self.bars += 1
        node = self.sum()
        self.bars -= 1
        self.expect(closing)
        return ("fn", "abs", node)

    def _command(self, name: str) -> Node:
        if name in ("frac", "cfrac"):
            return self._fraction()
        if name == "sqrt":
            return self._root()
        if name == "binom":
            return ("fn", "binom", self._argument(), self._argument())
        if name in ("lfloor", "lceil"):
            node = self._group("\\r" + name[1:])
            return ("fn", "floor" if name == "lfloor" else "ceil", node)
        if name == "pi":
            return ("sym", "pi")
        if name == "infty":
            return ("inf",)
        if name in ("sum", "prod"):
            return self._series(name)
        if name in _FUNCTIONS:
            return self._function(name)
        if name in _GREEK:
            return self._symbol("\\" + name)
        if name in _ACCENTS:
            return self._symbol(f"\\{name}:{self._raw()}")
        if name in _SHAPES:
            return self._symbol(_SHAPES[name] + self._letters())
        if name in ("{",):
            return self._group(r"\}")
        if name == "|":
            return self._bars(r"\|")
        if name in ("imath", "mathrm"):
            return ("sym", "i") if name == "imath" else self.primary()
        if name == "$":
            return ("mul", ("sym", "'$'"), self.power())
        raise Refused(f"\\{name} is not known")

    def _fraction(self) -> Node:
        derivative = self._derivative()
        if derivative:
            return derivative
        return ("div", self._argument(), self._argument())

    def _derivative(self) -> Node | None:
        """\\frac{dy}{dx}, \\frac{d^2 v}{d t^2}, \\frac{\\partial f}{\\partial x}: one symbol."""
        mark = self.at
        if self.next != "{" or self.peek() not in ("d", r"\partial") or self.peek(2) == "}":
            return None
        above, below = self._raw(), self._raw() if self.next == "{" else ""
        start = r"\partial" if above.startswith(r"\partial") else "d"
        if below.startswith(start) and len(below) > len(start) and below[len(start) :].lstrip("^23").isalpha():
            return ("sym", f"{above}/{below}")
        if below.startswith(start) and re.fullmatch(r"[A-Za-z](\^\{?[2-4]\}?)?", below[len(start) :]):
            return ("sym", f"{above}/{below}")
        self.at = mark
        return None

    def _root(self) -> Node:
        degree: Node = ("num", Fraction(2))
        if self.accept("["):
            degree = self._group("]")
        return ("fn", "root", self._argument(), degree)

    def _series(self, name: str) -> Node:
        self.expect("_")
        self.expect("{")
        variable = self.primary()
        if variable[0] != "sym":
            raise Refused("the sum has no variable")
        self.expect("=")
        first = self.sum()
        self.expect("}")
        self.expect("^")
        last = self._script()
        return ("sum" if name == "sum" else "prod", variable[1], first, last, self.product())

    def _function(self, name: str) -> Node:
        exponent: Node | None = None
        base: Node | None = None
        while self.next in ("^", "_"):
            if self.take() == "^":
                exponent = self._script()
            elif name == "log":
                base = self._argument()
            else:
                raise Refused(f"{name} with a subscript")
        arguments = self._arguments(name)
        if exponent == ("neg", ("num", Fraction(1))) and name in ("sin", "cos", "tan", "cot", "sec", "csc"):
            name, exponent = "arc" + name, None
        if base is not None:
            arguments.append(base)
        if name == "sqrt":
            name = "root"
            arguments.append(("num", Fraction(2)))
        node: Node = ("fn", name, *arguments)
        return node if exponent is None else ("pow", node, exponent)

    def _arguments(self, name: str) -> list[Node]:
        """What a function is applied to: (a, b), {a}, or the product that follows."""
        if self.accept("("):
            return self._list(")")
        if self.accept("{"):
            return self._list("}")
        if self.accept("["):
            return self._list("]")
        node = self._signed_power()
        while not self._ends_product() and self.next not in ("*", "/", r"\cdot", r"\times", r"\div", "(", "["):
            if self.kind == "word" or (self.kind == "command" and self.next[1:] in _FUNCTIONS):
                break
            if self.kind == "number":
                raise Refused("two numbers side by side")
            node = ("mul", node, self.power())
        return [node]

    def _list(self, closing: str) -> list[Node]:
        bars, self.bars = self.bars, 0
        nodes = [self.sum()]
        while self.accept(","):
            nodes.append(self.sum())
        self.bars = bars
        self.expect(closing)
        return nodes

    def _symbol(self, name: str) -> Node:
        while True:
            if self.next == "_":
                self.take()
                name += "_" + self._raw()
            elif self.next == "'":
                self.take()
                name += "'"
            elif self.next == "^" and self._primes():
                name += "'"
            else:
                break
        if self.next == "(" and self._is_call(name):
            self.take()
            return ("call", name, *self._list(")"))
        if self.next == "^" and self.peek() in ("*", r"\ast", r"\star"):
            self.at += 2
            name += "*"
        return ("sym", name)

    def _primes(self) -> bool:
        if self.peek() == r"\prime":
            self.at += 2
            return True
        if self.peek() == "{" and self.peek(2) == r"\prime" and self.peek(3) == "}":
            self.at += 4
            return True
        return False

    def _is_call(self, name: str) -> bool:
        """Whether `name(...)` is a function's value and not a product: f and g always are; any letter is, before one
        number, one symbol or a comma: nobody writes the product x(t)."""
        if name in ("e", "i"):
            return False
        if name[0] in _CALLED:
            return True
        at, level = self.at, 0
        inside: list[str] = []
        while at < len(self.tokens):
            word = self.tokens[at][1]
            level += (word in "([{") - (word in ")]}")
            if level == 0:
                break
            if level == 1 and word == ",":
                return True
            inside.append(word)
            at += 1
        plain = inside[1:]
        if not plain or len(plain) > 5:
            return False
        if len(plain) == 1:
            return True
        return plain[1] == "_" or (plain[0] == "-" and len(plain) == 2 and plain[1].isdigit())

    def _raw(self) -> str:
        """A group as it is written, without spaces and text commands: a subscript or what stands under an accent."""
        kind, word = self.kind, self.take()
        if kind == "text":
            return "".join(word[6:-1].split())
        if word != "{":
            if not word or word in (")", "]", "}"):
                raise Refused("a subscript is missing")
            return word
        level = 1
        parts: list[str] = []
        while True:
            kind, word = self.kind, self.take()
            if not word:
                raise Refused("a brace is missing")
            level += (word == "{") - (word == "}")
            if level == 0:
                return "".join(parts)
            parts.append("".join(word[6:-1].split()) if kind == "text" else word)

    def _letters(self) -> str:
        """The capitals after \\angle and the like."""
        name = ""
        while self.kind == "char" and self.next.isalpha():
            name += self.take()
            if self.next == "_":
                self.take()
                name += "_" + self._raw()
        return name


def _is_vector(node: Node) -> bool:
    return node[0] == "sym" and node[1].startswith((r"\vec:", r"\overrightarrow:", r"\nabla"))


def _literal(digits: str) -> Fraction:
    if len(digits) > 3_000:
        raise Refused("a number of more than 3,000 digits")
    mantissa, _, exponent = digits.lower().partition("e")
    if exponent and abs(int(exponent)) > 2_000:
        raise Refused("an exponent of ten beyond 2,000")
    return Fraction(mantissa.rstrip(".") or "0") * Fraction(10) ** int(exponent or 0)


@lru_cache(maxsize=4096)
def parsed(text: str) -> Node:
    """The tree of a prepared text. Raises Refused for what is not one expression."""
    if not text.strip():
        raise Refused("empty")
    try:
        return _Reader(text).whole()
    except RecursionError:
        raise Refused("nested too deep") from None
