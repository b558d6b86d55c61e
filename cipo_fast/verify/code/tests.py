"""The tests of a row: what they are, whether they can be used, and assert suites as the sandbox runs them."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal

from cipo_fast.verify.code import counting
from cipo_fast.verify.code.program import Function, prompt_preamble

Kind = Literal["calls", "stdin", "suite"]
# A suite that looks up its own functions may run any of them.
LOOKING_UP = {"globals", "locals", "vars", "getattr", "eval", "exec", "inspect"}


def kind_of(row: Mapping[str, Any]) -> Kind:
    """What form a row's tests have. Of a row that `problem_with` has no complaint about."""
    if not row.get("tests"):
        return "suite"
    return "calls" if row["tests"][0].get("stdin") is None else "stdin"


def problem_with(row: Mapping[str, Any]) -> str | None:
    """What is wrong with a row's tests, in one line, or None."""
    if "tests" in row and row["tests"] is not None:
        return _problem_with_tests(row)
    if row.get("test") is not None or row.get("test_list") is not None:
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
    names = {"candidate", row["entry_point"], *facts.parameters[:1]}
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


def suite(row: Mapping[str, Any], stand_in: int | None = None) -> str:
    """A text that defines check(candidate), for the sandbox's process of tests; it returns how many assertions were
    executed. `stand_in`: which of `counting.STAND_INS` answers instead of the candidate.

    The suite's own text runs with the entry point's name bound to the candidate, below the imports and helpers of a
    prompt that is code (a test of find_zero calls the prompt's poly); then its `check`, if it has one and does not call
    it itself. Its globals and line numbers are its own."""
    text, entry_point = suite_text(row), row["entry_point"]
    assert text is not None
    helpers = prompt_preamble(row.get("prompt") or "", entry_point) or ""
    facts = _facts(text)
    check = min(len(facts.parameters), 1) if facts.defines_check and not facts.calls_check else None
    told = f"{entry_point!r}, {helpers!r}, {text!r}, {check}, {stand_in}"
    return f"{_counting()}\n\ndef check(candidate):\n    return run(candidate, {told})\n"


@cache
def _counting() -> str:
    return Path(counting.__file__).read_text(encoding="utf-8")


@dataclass(frozen=True)
class _Facts:
    """What the text of a suite is: `problem` says why it is none. `parameters` are those of its check."""

    problem: str | None = None
    defines_check: bool = False
    calls_check: bool = False
    names: frozenset[str] = frozenset()
    parameters: tuple[str, ...] = ()


@lru_cache(maxsize=64)  # a group of answers asks for the same text, which can have a megabyte
def _facts(text: str) -> _Facts:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
            compile(tree, "<tests>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        return _Facts(f"`test` is no Python: {error}")
    checks = [node for node in tree.body if isinstance(node, Function) and node.name == "check"]
    problem = _asserts_nothing(tree, bool(checks)) or (_no_check(checks[-1]) if checks else None)
    if problem:
        return _Facts(problem)
    names = frozenset(node.id for node in ast.walk(tree) if isinstance(node, ast.Name))
    arguments = checks[-1].args if checks else None
    parameters = [*arguments.posonlyargs, *arguments.args, arguments.vararg] if arguments else []
    return _Facts(None, bool(checks), _calls_check(tree), names, tuple(part.arg for part in parameters if part))


def _asserts_nothing(tree: ast.Module, has_check: bool) -> str | None:
    """Why no program could fail, as far as the text alone shows it."""
    nodes = list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.Assert) and isinstance(node.test, ast.Tuple) and node.test.elts:
            return f"`test` line {node.lineno} asserts a tuple, which is always true"
    if not any(_asserts(node) for node in nodes):
        return "`test` asserts nothing: any program would pass"
    if not any(_asserts(node) for node in _reached(tree, {"check"} if has_check else set())):
        return (
            "`test` never runs its assertions: any program would pass (tests of pytest and unittest, and a main guard, "
            "are not run: write check(candidate))"
        )
    return None


def _asserts(node: ast.AST) -> bool:
    if isinstance(node, ast.Assert):
        return not isinstance(node.test, ast.Constant) or not node.test.value
    return isinstance(node, ast.Raise) or (
        isinstance(node, ast.Call) and counting.called_name(node).lower().startswith("assert")
    )


def _no_check(check: Function) -> str | None:
    if isinstance(check, ast.AsyncFunctionDef):
        return "`check` is an async function: calling it runs nothing"
    own: list[ast.AST] = list(check.body)
    for node in own:
        if isinstance(node, ast.Yield | ast.YieldFrom):
            return "`check` is a generator: calling it runs nothing"
        if not isinstance(node, Function | ast.Lambda | ast.ClassDef):
            own.extend(ast.iter_child_nodes(node))
    return None


def _reached(tree: ast.Module, names: set[str]) -> list[ast.AST]:
    """What may run: not the bodies of functions that nothing else which runs names, nor what is below a main guard.
    `names`: functions that are called from outside."""
    found: list[ast.AST] = []
    waiting: list[Function] = []
    ahead: list[ast.AST] = list(tree.body)
    while ahead:
        node = ahead.pop()
        found.append(node)
        if isinstance(node, Function):
            waiting.append(node)
            ahead += [*node.decorator_list, node.args]
        elif isinstance(node, ast.If) and _main_guard(node.test):
            ahead += node.orelse
        else:
            ahead += ast.iter_child_nodes(node)
            name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
            names = names | {name} if name and name not in names else names
        if not ahead:
            every = bool(names & LOOKING_UP)
            named = [part for part in waiting if every or part.name in names or part.name.startswith("__")]
            waiting = [part for part in waiting if part not in named]
            ahead += [statement for part in named for statement in part.body]
    return found


def _main_guard(test: ast.expr) -> bool:
    """Whether it is `__name__ == "__main__"`, which holds in no suite."""
    return isinstance(test, ast.Compare) and any(
        isinstance(part, ast.Name) and part.id == "__name__" for part in (test.left, *test.comparators)
    )


def _calls_check(tree: ast.Module) -> bool:
    """Whether the text itself, outside of any function, calls check."""
    outside = [node for node in tree.body if not isinstance(node, Function | ast.ClassDef)]
    return any(
        isinstance(node, ast.Call) and counting.called_name(node) == "check"
        for node in _reached(ast.Module(outside, []), set())
    )
