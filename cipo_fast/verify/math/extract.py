"""The final answer of a response: its last closed box after the last `</think>`.

Linear in the length of the response, for any text at all. Braces are counted from the box on, so that prose around it
may hold any braces; `\\{` and `\\}` are not braces. What stands after the last box is not read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# More braces and backslashes than this are no answer: only the end of such a text is read.
MOST_MARKS, TAIL = 200_000, 100_000

_MARK = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_OPENER = re.compile(r"\\(?:boxed|fbox)\s*\{")
# What may stand between two boxes of one list, and what says that an answer is one of several.
_LISTING = re.compile(
    r"(?:\s|[,;.!?&*|/]|\\[,;!:\[\]()]|\\\\|\\quad|\\qquad|~|\$|\band\b|\\text\s*\{\s*(?:and|or|,)?\s*\}"
    r"|\n[ \t]*[-+•]|\\item\b|\b[A-Za-z](?:_\{?\w\}?)?\s*=)*"
)
_HEDGE = re.compile(
    r"\b(?:or|maybe|perhaps|possibly|alternatively|either|might|could|otherwise|both|also|another)\b", re.IGNORECASE
)
# What stands before a box of an enumeration: Guess 1:, (b), Second answer: x =
_COUNTER = re.compile(
    r"\d+|\b[A-Za-z]\b|\b(?:first|second|third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|next|last|final)\b",
    re.IGNORECASE,
)
_PROSE = re.compile(r"[\w\s.,:;()#*>'$\[\]-]{1,80}")
_NAMED = re.compile(r"[A-Za-z](?:_\{?\w\}?)?\s*=\s*$")
MOST_DIFFERENT = 5  # boxes: more are a list of guesses
_LINE = re.compile(r"(?im)^[ \t*#>_]*(?:final[ \t]+)?answer[ \t*_]*:[ \t*_]*(.*)$")


@dataclass(frozen=True)
class Final:
    """A final answer, or why there is none. `several` says that it is a list of boxes, joined by commas."""

    text: str | None
    why: str = ""
    several: bool = False


def final_answer(response: str, answer_line: bool = False) -> Final:
    """The last closed box after the last `</think>`. Boxes are one answer of several items if they stand as a list
    (`\\boxed{1}, \\boxed{2}`), with "or" and its like between them on the line of one of them, as an enumeration
    (`Guess 1: \\boxed{1}`, `Guess 2: \\boxed{2}`), or if there are more than MOST_DIFFERENT with different contents.
    `answer_line`: without any box, the last line that reads `Answer: ...` counts."""
    said = response[response.rfind("</think>") + len("</think>") :] if "</think>" in response else response
    if "<think>" in said:
        return Final(None, "the thinking never ends")
    boxes = _closed_boxes(said)
    if not boxes:
        opened = _OPENER.search(said[-TAIL:])
        if opened is None and answer_line:
            return _answer_line(said)
        return Final(None, "the box is never closed" if opened else "no \\boxed{} in the response")
    run = [boxes[-1]]
    leads = [
        _lead(said[end : box.start]) for end, box in zip([0, *(box.end + 1 for box in boxes)], boxes, strict=False)
    ]
    for at in range(len(boxes) - 2, -1, -1):
        between = said[boxes[at].end + 1 : boxes[at + 1].start]
        if not _one_list(between) and not _enumerated(leads[at], leads[at + 1]):
            break
        run.insert(0, boxes[at])
    if len({box.text.strip() for box in boxes}) > MOST_DIFFERENT:
        run = boxes
    texts = list(dict.fromkeys(box.text.strip() for box in run))
    return Final(", ".join(texts), several=len(texts) > 1)


@dataclass(frozen=True)
class _Box:
    start: int  # of the backslash
    end: int  # of the closing brace
    text: str


def _closed_boxes(said: str) -> list[_Box]:
    """Closed boxes that lie in no other closed box, in order."""
    first = _OPENER.search(said)
    if first is None:
        return []
    begin = first.start()
    if said.count("{", begin) + said.count("}", begin) + said.count("\\", begin) > MOST_MARKS:
        begin = max(begin, len(said) - TAIL)
    opened: list[tuple[int, int]] = []  # start of the box or -1 for a plain brace, and where its inside begins
    found: list[tuple[int, int, int]] = []
    for mark in _MARK.finditer(said, begin):
        word = mark[0]
        if word == "{":
            opened.append((-1, mark.end()))
        elif word == "}":
            start, inside = opened.pop() if opened else (-1, 0)
            if start >= 0:
                while found and found[-1][0] > start:
                    found.pop()
                found.append((start, inside, mark.start()))
        elif len(word) > 2:
            opened.append((mark.start(), mark.end()))
    # Boxes before the last few cannot matter, and their texts may be long.
    return [_Box(start, end, said[inside:end]) for start, inside, end in found[-20:]]


def _one_list(between: str) -> bool:
    if len(between) > 200:
        return False
    if _LISTING.fullmatch(between):
        return True
    lines = [between.partition("\n")[0], between.rstrip().rpartition("\n")[2]]
    return any(_HEDGE.search(line) for line in lines)


def _lead(before: str) -> str:
    """What stands before a box on its line, without what it is called (x =)."""
    line = before[-200:].rstrip(" $").rpartition("\n")[2]
    return _NAMED.sub("", line).strip(" .,;$")


def _enumerated(one: str, other: str) -> bool:
    """Whether two boxes' leads are the same but for a counter."""
    if one == other or not _PROSE.fullmatch(one) or not _PROSE.fullmatch(other):
        return False
    return _COUNTER.sub("#", one) == _COUNTER.sub("#", other)


def _answer_line(said: str) -> Final:
    lines = _LINE.findall(said[-TAIL:])
    text = lines[-1].strip().strip("*").strip() if lines else ""
    return Final(text) if text else Final(None, "neither a \\boxed{} nor a line `Answer:` in the response")
