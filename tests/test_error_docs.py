"""docs/troubleshooting.md has every message and every alarm of the source, and is what the source says now."""

import ast
import re
from pathlib import Path

import pytest

from cipo_fast.alarms import NAMES
from cipo_fast.error_docs import ALARMS, GROUPS, group_of, page
from cipo_fast.error_sites import FOLDERS, LINES, NEWS, SEEN, SOURCE, UNSEEN, WRITTEN, find
from cipo_fast.errors import Ending

FOUND = find()
PAGE = page(FOUND.messages)
FILE = Path(__file__).parents[1] / "docs" / "troubleshooting.md"


def test_it_is_not_stale() -> None:
    assert FILE.read_text(encoding="utf-8") == PAGE, f"python -m cipo_fast.error_docs > {FILE}"


def test_its_links_lead_somewhere() -> None:
    headings = re.findall(r"^#+ (.*)$", PAGE, re.MULTILINE)
    own = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    links = re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", PAGE)
    assert [anchor for file, anchor in links if not file and anchor not in own] == []
    assert [file for file, _ in links if file and not (FILE.parent / file).exists()] == []


def test_every_message_is_read_and_has_its_place() -> None:
    assert FOUND.unread == [], "say in error_sites.WRITTEN what these are, or in UNSEEN why no user sees them"
    assert [message for message in FOUND.messages if group_of(message.file) is None] == []
    assert len(FOUND.messages) > 500
    of_groups = {group_of(message.file) for message in FOUND.messages}
    assert [heading for heading, files, _ in GROUPS if files not in of_groups] == []


def test_no_table_has_a_row_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {*SEEN, *UNSEEN, *WRITTEN} - FOUND.used == set()
    monkeypatch.setattr("cipo_fast.error_sites.NEWS", ())
    said = [message.text for message in find().messages]
    assert [start for start in NEWS if not any(text.startswith(start) for text in said)] == []
    assert [file for file in LINES if not (SOURCE / file).is_file()] == []


def test_every_alarm_says_what_to_do() -> None:
    assert set(ALARMS) == set(NAMES)
    assert all(what and todo for _, what, todo in ALARMS.values())
    source = (SOURCE / "cipo_fast" / "alarms.py").read_text(encoding="utf-8")
    assert [said for said, _, _ in ALARMS.values() if said not in source] == []
    assert [name for name in NAMES if f"### {name}\n" not in PAGE] == []


def test_every_ending_of_a_command_is_seen() -> None:
    """Classes whose line a command prints: Ending's children, wherever they are defined."""
    classes = [
        node
        for folder in FOLDERS
        for path in (SOURCE / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    ]
    endings = {Ending.__name__}
    while more := {c.name for c in classes if endings & set(map(ast.unparse, c.bases))} - endings:
        endings |= more
    assert len(endings) > 8
    assert endings - {"Ending", "RankFailure"} <= {name for name, _ in SEEN}  # RankFailure is made by distributed.py


SITES = """
LONGEST = 4000
class Own(UserError): ...

def hint(near): return f"; did you mean {near!r}?" if near else ""

def check(path, rows, say, error):
    say(f"{path}: {len(rows)} rows" " are left out")
    where = f"{path}:{rows[0].line}"
    what = "is gzip" if path.endswith("gz") else "is a folder"
    if error:
        raise TrainingStopped(f"{where}: {what}" + hint(error))
    for key, fault in ((1, "one is missing"), (2, f"two of {rows} are missing")):
        raise UserError(fault)
    raise VerifierFailure(f"longer than {LONGEST:,} characters: {', '.join(rows[:3])} of {error.strerror}")
"""


def sites(tmp_path: Path, code: str) -> tuple[list[str], list[str]]:
    for folder in FOLDERS:
        (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / "cipo_fast" / "new.py").write_text(code, encoding="utf-8")
    found = find(tmp_path)
    return [message.front + message.text for message in found.messages], found.unread


def test_messages_are_read_as_a_user_sees_them(tmp_path: Path) -> None:
    assert sites(tmp_path, SITES) == (
        [
            "<path>: <n> rows are left out",
            "stopped: <where>: is gzip[; did you mean '<near>'?]",
            "stopped: <where>: is a folder[; did you mean '<near>'?]",
            "error: one is missing",
            "error: two of <rows> are missing",
            "longer than 4,000 characters: <rows> of <error>",
        ],
        [],
    )


@pytest.mark.parametrize(
    "line",
    [
        "raise UserError(told())",  # a function that is nowhere
        "raise UserError(text)",
        'raise UserError(f"{path}: {error}")',  # no word to find it by
        "raise Own('a class of its own')",
        "raise KeyError('nobody has decided who sees it')",
        "raise (UserError if path else KeyError)('which?')",
        "raise make(path)",
        "raise again(path)",
        "raise KeyError",
        "say(text)",
        "error = EngineFailure(str(text))",  # raised later
    ],
)
def test_what_cannot_be_read_is_reported(tmp_path: Path, line: str) -> None:
    code = f"def check(path, text, error, say):\n    {line}\ndef again(path): return KeyError(path)\n"
    messages, unread = sites(tmp_path, code)
    assert messages == []
    assert [one.split(": ", 1)[0] for one in unread] == ["cipo_fast/new.py:2"]
    assert (
        sites(
            tmp_path, "def again(path):\n    try:\n        path()\n    except OSError as error:\n        raise error"
        )[1]
        == []
    )
