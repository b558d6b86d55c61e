"""What class of answer a text is: a scalar, a list, a set, a tuple, a matrix, a region of the reals, an equation, ...

`read` is used for golds and answers alike; compare.py compares shapes by the gold's class.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import lru_cache

from cipo_fast.verify.math import region as regions
from cipo_fast.verify.math.exact import choice, number
from cipo_fast.verify.math.parse import Node, parsed
from cipo_fast.verify.math.points import kinds, symbols
from cipo_fast.verify.math.region import Region
from cipo_fast.verify.math.relation import chain, inequality
from cipo_fast.verify.math.shape import Shape, as_region, opaque
from cipo_fast.verify.math.text import Refused, canonical, matches, unwrapped, words
from cipo_fast.verify.math.units import peel

_BASE = re.compile(r"\(?([0-9A-Fa-f]+)\)?\s*_\s*\{?\s*(?:\\text\{\s*)?(?:base)?\s*([0-9]{1,2}|[a-z]+)\s*\}?\s*\}?")
_BASE_WORDS = {
    word: n for n, word in enumerate("two three four five six seven eight nine ten eleven twelve".split(), start=2)
}
_CLOCK = re.compile(r"(\d{1,2})\s*:\s*(\d{2})\s*(?:\\text\{)?\s*([aApP])?\.?\s*([mM])?\.?\s*\}?")
_RATIO = re.compile(r"\d+(?:\.\d+)?(?:\s*:\s*\d+(?:\.\d+)?)+")
_MATRIX = re.compile(
    r"\\begin\{(?P<env>[pbvVB]?(?:small)?matrix|array)\}(?:\{[lcr| ]*\})?(?P<rows>.*)\\end\{(?P=env)\}", re.DOTALL
)
_MATRIX_BRACKETS = re.compile(r"[(\[]\s*(\\begin\{(matrix|array|smallmatrix)\}.*\\end\{\2\})\s*[)\]]", re.DOTALL)
_SEPARATOR = re.compile(
    r",|;|\\text\{\s*,?\s*(?:and|or)\s*,?\s*\}|\\(?:lor|vee|land|wedge)(?![A-Za-z])|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])"
)
_RELATION = re.compile(
    r"\\(?:le|ge|ne|approx|equiv|sim|simeq|cong|propto|to|rightarrow|Rightarrow|implies|iff|mapsto|subset|subseteq"
    r"|notin|perp|parallel|ll|gg|pmod|mid)(?![A-Za-z])|:=|<=|>=|!=|=|<|>"
)
_KNOWN_RELATIONS = {"=": "=", ":=": "=", r"\approx": "~", "<": "<", ">": ">", r"\le": "<=", r"\ge": ">="}
_KNOWN_RELATIONS |= {"<=": "<=", ">=": ">=", r"\ne": "!=", "!=": "!="}
_IN = re.compile(r"\\in(?![A-Za-z])")
_SET_OPERATION = re.compile(r"\\(?:cup|cap|setminus|backslash)(?![A-Za-z])")
_SUCH_THAT = re.compile(r"\\mid(?![A-Za-z])|\||:")
_REALS = re.compile(r"\\mathbb\s*\{?\s*R\s*\}?|\\text\{\s*(?:all real numbers|all reals|reals|R)\s*\}|all real numbers")
_EMPTY = re.compile(r"\\emptyset|\\\{\s*\\\}|\\text\{\s*(?:empty set|the empty set)\s*\}")
_WORD_ONLY = re.compile(r"[A-Za-z][A-Za-z0-9 .,'\-]*")
_FUNCTION_WORDS = re.compile(r"(?:np\.|math\.)?(?:sqrt|sinh|cosh|tanh|arc|atan|asin|acos|binom)")
_LISTED_WORDS = re.compile(r"\\text\{([^{}]*,[^{}]*)\}")  # \text{(B), (D)}
_LABEL = re.compile(
    r"\\(?:min|max|det|lim|inf|sup|deg|dim|gcd)(?![A-Za-z]).*|\|[^|]*\\(?:cup|cap|setminus)(?![A-Za-z])[^|]*\|"
    r"|[A-Za-z]\s*\([^()]*(?:\\(?:cup|cap|setminus|mid)(?![A-Za-z])|\|)[^()]*\)"
)
_SUBSCRIPT = re.compile(r"_\s*(?:\{[^{}]*\}|\w)")
_LOGIC = {"land", "wedge", "lor", "vee"}
_MOST_ITEMS = 200


@lru_cache(maxsize=2048)
def read(text: str, wanted: str | None = None) -> Shape:
    """The shape of a prepared text. `wanted`: the gold's unit."""
    try:
        return _read(text.strip(), wanted)
    except Refused:
        raise
    except RecursionError:
        raise Refused("nested too deep") from None


def _read(text: str, wanted: str | None) -> Shape:
    for reader in (_literal, _spoken, _matrix, _several, _bracketed, _labelled, _set_operation, _element, _related):
        shape = reader(text, wanted)
        if shape is not None:
            return shape
    return scalar(text, wanted) or opaque(text)


def _literal(text: str, wanted: str | None) -> Shape | None:
    """Choice letters, base-n numbers, numbers, clocks and ratios."""
    letter = choice(text)
    if letter is not None:
        return Shape("choice", letter, node=("sym", letter))
    found = number(text)
    if found is not None:
        return Shape("scalar", text, node=("num", found.value), number=found, percent=found.percent)
    based = _BASE.fullmatch(text)
    if based:
        base = int(based[2]) if based[2].isdigit() else _BASE_WORDS.get(based[2], 0)
        if 2 <= base <= 36 and all(int(digit, 36) < base for digit in based[1]):
            return Shape("base", based[1].lower().lstrip("0") or "0", parts=(base,))
        if based[1][0].isdigit():
            return opaque(text)
    clock = _CLOCK.fullmatch(text)
    if clock and int(clock[1]) <= 24 and int(clock[2]) < 60:
        return Shape("clock", text, parts=(str(int(clock[1])), clock[2], (clock[3] or "").lower()))
    if _RATIO.fullmatch(text):
        return Shape("ratio", text, items=tuple(_item(part) for part in text.split(":")))
    core, unit = peel(text, wanted)
    found = number(core) if unit else None
    if found is not None:  # before commas part a list: $2,125
        return Shape("scalar", text, node=("num", found.value), number=found, percent=found.percent, unit=unit)
    if _REALS.fullmatch(text):
        return Shape("region", text, region=regions.EVERYTHING)
    if _EMPTY.fullmatch(text):
        return Shape("set", text, region=())
    return None


def _spoken(text: str, wanted: str | None) -> Shape | None:
    """Words: in \\text, or more letters than a product of variables has."""
    plain = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text).strip()
    if not _WORD_ONLY.fullmatch(plain):
        return None
    if _SEPARATOR.search(plain) and len(plain.split()) > 2:
        return Shape("words", str(words(text)))
    if _FUNCTION_WORDS.match(plain) or ("," in plain and "\\text" not in text):
        return None
    longest = max(len(word) for word in re.findall(r"[A-Za-z]+", plain))
    if ("\\text" in text and longest > 1) or longest > 3 or plain.lower() in ("yes", "no"):
        return Shape("words", str(words(text)))
    return None


def _matrix(text: str, wanted: str | None) -> Shape | None:
    bracketed = _MATRIX_BRACKETS.fullmatch(text)
    match = _MATRIX.fullmatch(bracketed[1] if bracketed else text)
    if match is None or "\\begin" in match["rows"]:
        return None
    rows = re.split(r"\\\\(?:\[[^\]]*\])?|\\cr(?![A-Za-z])", match["rows"].replace("\\hline", ""))
    read_rows = tuple(
        Shape("row", row, items=tuple(_item(cell) for cell in row.split("&"))) for row in rows if row.strip()
    )
    kind = "|" if match["env"][0] in "vV" else "("
    return Shape("matrix", text, items=read_rows, brackets=kind)


def _item(text: str, wanted: str | None = None) -> Shape:
    return read(unwrapped(text.strip().rstrip(".")), wanted)


def split(text: str, pattern: re.Pattern[str]) -> list[str]:
    """Pieces and separators of a text in turn, split outside of all brackets."""
    inside, level = [0] * (len(text) + 1), 0
    for at, char in enumerate(text):
        if char in ")]}":
            level -= 1
        inside[at] = level
        if char in "([{":
            level += 1
    pieces, begin = [], 0
    for match in pattern.finditer(text):
        # \text{ or } holds a brace of its own; its backslash stands outside
        if inside[match.start()] == 0:
            pieces += [text[begin : match.start()], match[0]]
            begin = match.end()
    return [*pieces, text[begin:]]


def _several(text: str, wanted: str | None) -> Shape | None:
    """a, b and c: a list, or one region where all are inequalities."""
    worded = _LISTED_WORDS.fullmatch(text)
    pieces = split(worded[1] if worded else text, _SEPARATOR)
    if len(pieces) == 1:
        return None
    texts = [piece.strip() for piece in pieces[::2]]
    separators = [re.sub(r"\\text|[{},\s\\]", "", piece) for piece in pieces[1::2]]
    either = any(word in ("or", "lor", "vee") for word in separators)
    if len(texts) > _MOST_ITEMS:
        raise Refused(f"more than {_MOST_ITEMS} items")
    if any(not piece for piece in texts[:1] + texts[-1:]):
        return opaque(text)
    items = tuple(_item(piece, wanted) for piece in texts if piece)
    if any(item.kind in ("opaque", "words") for item in items) and not all(item.kind == "words" for item in items):
        return opaque(text)
    both = any(word in ("and", "land", "wedge") for word in separators)
    if all(item.kind == "region" and item.brackets == "<" for item in items):
        return _combined(text, items, either, both)
    if any(
        word in _LOGIC and item.node and item.name is None and symbols(item.node)
        for word in separators
        for item in items
    ):
        return opaque(text)  # p \land q: no list
    if either and all(as_region(item) is not None for item in items) and any(item.kind != "scalar" for item in items):
        return Shape("region", text, region=regions.union(*(as_region(item) or () for item in items)))
    flat = tuple(part for item in items for part in (item.items if item.kind == "list" else (item,)))
    return Shape("list", text, items=flat)


def _combined(text: str, items: tuple[Shape, ...], either: bool, both: bool) -> Shape:
    """Inequalities: `or` joins, `and` holds together, and so does a comma, unless that leaves nothing."""
    if len({item.name for item in items}) > 1:
        return Shape("list", text, items=items)
    found: Region = regions.EVERYTHING
    for item in items:
        found = regions.intersection(found, item.region or ())
    if either or not (found or both):
        found = regions.union(*(item.region or () for item in items))
    return Shape("region", text, region=found, name=items[0].name, brackets="<")


def _bracketed(text: str, wanted: str | None) -> Shape | None:
    """(a, b), [a, b), {a, b}, {x | x > 2}."""
    text = text.replace(r"\langle", "(").replace(r"\rangle", ")").strip()
    if text.startswith(r"\{") and text.endswith(r"\}") and matches(text)[1] == len(text) - 1:
        return _set(text)
    if text[:1] not in ("(", "[") or text[-1:] not in (")", "]") or matches(text)[0] != len(text) - 1:
        return None
    pieces = split(text[1:-1], re.compile(r",|;"))
    if len(pieces) == 1:
        return None
    texts = pieces[::2]
    if len(texts) > _MOST_ITEMS or any(not piece.strip() for piece in texts):
        return opaque(text)
    items = tuple(_item(piece) for piece in texts)
    if any(item.kind in ("opaque", "list") for item in items):
        return opaque(text)
    shape = Shape("tuple", text, items=items, brackets=text[0] + text[-1])
    if shape.brackets in ("[)", "(]"):
        region = as_region(shape)
        return shape if region is None else replace(shape, kind="region", region=region)
    return shape


def _set(text: str) -> Shape:
    inner = text[2:-2].strip()
    parted = split(inner, _SUCH_THAT)
    if len(parted) >= 3:
        condition = read("".join(parted[2:]).strip())
        variable = _IN.split(parted[0])
        if condition.kind == "region" and (len(variable) == 1 or _REALS.fullmatch(variable[1].strip())):
            named = read(variable[0].strip())
            if condition.name is None or condition.name == named.node:
                return replace(condition, text=text, name=None)
        return opaque(text)
    pieces = split(inner, re.compile(r",|;"))[::2]
    if len(pieces) > _MOST_ITEMS or any(not piece.strip() for piece in pieces):
        return opaque(text)
    items = tuple(_item(piece) for piece in pieces)
    if any(item.kind == "opaque" for item in items):
        return opaque(text)
    flat = tuple(part for item in items for part in (item.items if item.kind == "list" else (item,)))
    return Shape("set", text, items=flat)


def _labelled(text: str, wanted: str | None) -> Shape | None:
    """\\max f = 3, |A \\cup B| = 3: what a value is called where it has a name of more than a symbol. A number in the
    label makes it a claim and no name."""
    label, *signs = split(text, _RELATION)
    if len(signs) < 2 or signs[0].strip() != "=" or not _LABEL.fullmatch(label.strip()):
        return None
    if any(char.isdigit() for char in _SUBSCRIPT.sub("", label)):
        return None
    return replace(read("".join(signs[1:]).strip(), wanted), name=("sym", canonical(label.strip())))


def _set_operation(text: str, wanted: str | None) -> Shape | None:
    pieces = split(text, _SET_OPERATION)
    if len(pieces) == 1:
        return None
    items = [_item(piece) for piece in pieces[::2]]
    found = as_region(items[0])
    for operation, item in zip(pieces[1::2], items[1:], strict=True):
        region = as_region(item)
        if found is None or region is None:
            found = None
            break
        if operation == r"\cup":
            found = regions.union(found, region)
        elif operation == r"\cap":
            found = regions.intersection(found, region)
        else:
            found = regions.intersection(found, regions.complement(region))
    if found is not None:
        return Shape("region", text, region=found)
    if all(operation == r"\cup" for operation in pieces[1::2]) and all(item.kind == "tuple" for item in items):
        return Shape("union", text, items=tuple(items))
    return opaque(text)


def _element(text: str, wanted: str | None) -> Shape | None:
    """x \\in S is S, of the name x."""
    pieces = split(text, _IN)
    if len(pieces) == 1:
        return None
    if len(pieces) > 3:
        return opaque(text)
    name = scalar(pieces[0].strip())
    inner = read(pieces[2].strip())
    if name is None or name.node is None or name.node[0] != "sym" or inner.kind == "scalar":
        return opaque(text)
    return replace(inner, text=text, name=name.node)


def scalar(text: str, wanted: str | None = None) -> Shape | None:
    """A number or an expression, with or without a unit; with ±, the list of both. None where it is neither."""
    core, unit = peel(text, wanted)
    try:
        node = parsed(core)
    except Refused:
        return None
    if node[0] == "deg":
        return None
    if "pm" in kinds(node):
        both = tuple(Shape("scalar", text, node=_signed(node, sign), unit=unit) for sign in (1, -1))
        return Shape("list", text, items=both)
    return Shape("scalar", text, node=node, unit=unit, percent=node[0] == "pct")


def _signed(node: Node, sign: int) -> Node:
    """A tree with each ± decided: all upper signs, or all lower ones."""
    if node[0] == "pm":
        inner = _signed(node[2], sign)
        return inner if node[1] * sign > 0 else ("neg", inner)
    return tuple(_signed(part, sign) if isinstance(part, tuple) else part for part in node)


def _related(text: str, wanted: str | None) -> Shape | None:
    """Equations, chains of them, and inequalities."""
    pieces = split(text, _RELATION)
    if len(pieces) == 1:
        return None
    signs = [_KNOWN_RELATIONS.get(sign.strip()) for sign in pieces[1::2]]
    texts = [piece.strip() for piece in pieces[::2]]
    if None in signs or len(texts) > 8 or not all(texts[1:]):
        return opaque(text)
    if not texts[0]:  # `\approx 3` and `= 7`
        return read(texts[1], wanted) if len(texts) == 2 and signs[0] in ("~", "=") else opaque(text)
    parts = [_item(piece, wanted) for piece in texts]
    if all(sign in ("=", "~") for sign in signs):
        return chain(text, parts, [str(sign) for sign in signs])
    if any(part.node is None for part in parts):
        return opaque(text)
    return inequality(text, [part.node for part in parts if part.node], [str(sign) for sign in signs])
