"""The tests of a row: what they are, whether they can be used, and assert suites as the sandbox runs them."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from cipo_fast.verify.code.program import prompt_preamble

Kind = Literal["calls", "stdin", "suite"]


def kind_of(row: Mapping[str, Any]) -> Kind:
    """What form a row's tests have. Of a row that `problem_with` has no complaint about."""
    if not row.get("tests"):
        return "suite"
    return "calls" if row["tests"][0].get("stdin") is None else "stdin"


def problem_with(row: Mapping[str, Any]) -> str | None:
    """What is wrong with a row's tests, in one line, or None."""
    if "tests" in row and row["tests"] is not None:
        return _problem_with_tests(row)
    if "test" in row or "test_list" in row:
        return _problem_with_suite(row)
    return "no field `tests` (calls or stdin) nor `test` (a suite): nothing can be verified"


def _problem_with_tests(row: Mapping[str, Any]) -> str | None:
    tests = row["tests"]
    if not isinstance(tests, list):
        return "`tests` is not a list"
    if not tests:
        return "`tests` is empty: any program would pass"
    kinds = set()
    for number, test in enumerate(tests, 1):
        if not isinstance(test, dict):
            return f"test {number} is not an object"
        if test.get("stdin") is not None or test.get("stdout") is not None:
            kinds.add("stdin")
            wrong = [name for name in ("stdin", "stdout") if not isinstance(test.get(name), str)]
        else:
            kinds.add("calls")
            wrong = [] if isinstance(test.get("args"), list) else ["args"]
            wrong += [] if isinstance(test.get("kwargs", {}), dict) else ["kwargs"]
            wrong += [] if "expected" in test else ["expected"]
        if wrong:
            return f"test {number}: `{wrong[0]}` is missing or of the wrong type"
    if len(kinds) > 1:
        return "`tests` mixes calls and stdin"
    if row.get("entry_point") is not None and not _is_name(row["entry_point"]):
        return f"entry_point {row['entry_point']!r} is not a name"
    return None


def _problem_with_suite(row: Mapping[str, Any]) -> str | None:
    if not _is_name(row.get("entry_point")):
        return "a suite needs `entry_point`, the name of the function that it tests"
    if not isinstance(row.get("prompt", ""), str):
        return "`prompt` is not text"
    text = suite_text(row)
    if text is None:
        return "`test` (or `test_list`) is neither text nor a list of texts"
    facts = _facts(text)
    if facts.problem:
        return facts.problem
    names = {"candidate", row["entry_point"]} if facts.defines_check else {row["entry_point"]}
    return None if names & facts.names else f"`test` never uses {row['entry_point']}"


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and name.isidentifier()


def suite_text(row: Mapping[str, Any]) -> str | None:
    """The text of a suite as it stands in the row: `test`, else `test_list` after its imports and set-up."""
    if row.get("test") is not None:
        parts = row["test"]
    else:
        parts = [*_listed(row.get("test_imports")), *_listed(row.get("test_setup_code")), *_listed(row["test_list"])]
    parts = _listed(parts)
    return "\n".join(parts) if parts and all(isinstance(part, str) for part in parts) else None


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]


def suite(row: Mapping[str, Any]) -> str:
    """A text that defines check(candidate), for the sandbox's process of tests.

    The suite's own text runs with the entry point's name bound to the candidate, below the imports and helpers of a
    prompt that is code (a test of find_zero calls the prompt's poly); then its `check`, if it has one and does not call
    it itself. The text stays a text, so that `from __future__`, globals and its line numbers are its own."""
    text, entry_point = suite_text(row), row["entry_point"]
    assert text is not None
    helpers = prompt_preamble(row.get("prompt") or "", entry_point) or ""
    facts = _facts(text)
    lines = [
        "def check(candidate):",
        "    names = {'__name__': 'tests'}",
        f"    exec(compile({helpers!r}, '<prompt>', 'exec'), names)",
        f"    names[{entry_point!r}] = candidate",
        "    names['candidate'] = candidate",
        f"    exec(compile({text!r}, '<tests>', 'exec'), names)",
    ]
    if facts.defines_check and not facts.calls_check:
        lines.append("    names['check'](candidate)")
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class _Facts:
    """What the text of a suite is: `problem` says why it is none."""

    problem: str | None = None
    defines_check: bool = False
    calls_check: bool = False
    names: frozenset[str] = frozenset()


@lru_cache(maxsize=64)  # a group of answers asks for the same text, which can have a megabyte
def _facts(text: str) -> _Facts:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        return _Facts(f"`test` is no Python: {error}")
    nodes = list(ast.walk(tree))
    if not any(isinstance(node, ast.Assert | ast.Raise | ast.Call) for node in nodes):
        return _Facts("`test` asserts nothing: any program would pass")
    defines = any(isinstance(node, ast.FunctionDef) and node.name == "check" for node in tree.body)
    names = frozenset(node.id for node in nodes if isinstance(node, ast.Name))
    return _Facts(None, defines, _calls_check(tree), names)


def _calls_check(tree: ast.Module) -> bool:
    """Whether the text itself, outside of any function, calls check."""
    outside = [node for node in tree.body if not isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return any(
        isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "check"
        for top in outside
        for node in ast.walk(top)
    )
