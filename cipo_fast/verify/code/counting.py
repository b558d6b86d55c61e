"""What the sandbox's process of tests runs around a suite: it counts the assertions that are really executed.

The text of this file is sent there, in front of one line that calls `run`: it stands alone, on the standard library.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

COUNTED = "__counted__"  # a function's name in the suite


class Alike:
    """Equals everything and is false: `assert candidate(1) != 5` notices it."""

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False

    def __bool__(self) -> bool:
        return False

    def __hash__(self) -> int:
        return 0


# What a candidate gives that is none. A suite that takes all of them tests nothing.
STAND_INS: list[Any] = [object(), None, Alike()]


class Counting(ast.NodeTransformer):
    """Every assertion tells that it was executed: `assert`, `if ...: raise`, a call of another's assert_...(), and
    `try: ... raise` that ended in one of its handlers."""

    def __init__(self, own: set[str]) -> None:
        self.own = own  # helpers named assert... count by the assertions inside of them

    def visit_Assert(self, node: ast.Assert) -> ast.Assert:
        self.generic_visit(node)
        if any(isinstance(part, ast.Name) for part in ast.walk(node.test)):  # not `assert True`
            node.test = told(node.test)
        return node

    def visit_If(self, node: ast.If) -> ast.If:
        self.generic_visit(node)
        if any(isinstance(part, ast.Raise) for part in node.body):
            node.test = told(node.test)
        return node

    def visit_Try(self, node: ast.Try) -> ast.Try:
        raises = any(isinstance(p, ast.Raise | ast.Assert) for top in node.body + node.orelse for p in ast.walk(top))
        self.generic_visit(node)
        if raises:
            for handler in node.handlers:
                mark = ast.copy_location(ast.Expr(told(ast.copy_location(ast.Constant(None), handler))), handler)
                handler.body.insert(0, mark)
        return node

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        name = called_name(node)
        return told(node) if name.lower().startswith("assert") and name not in self.own else node

    def _as_it_is(self, node: ast.expr) -> ast.expr:
        """Data, which may be long."""
        return node

    visit_List = visit_Tuple = visit_Set = visit_Dict = visit_Constant = _as_it_is


def called_name(node: ast.Call) -> str:
    found = node.func
    return found.id if isinstance(found, ast.Name) else found.attr if isinstance(found, ast.Attribute) else ""


def told(value: ast.expr) -> ast.Call:
    name = ast.copy_location(ast.Name(COUNTED, ast.Load()), value)
    return ast.copy_location(ast.Call(name, [value], []), value)


def functions(tree: ast.AST) -> set[str]:
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def run(
    candidate: Callable[..., Any], entry_point: str, helpers: str, text: str, check: int | None, stand_in: int | None
) -> int:
    """Run a suite; how many assertions were executed after the candidate had been called. `check`: with how many
    arguments its check is called, None: not at all. `stand_in`: which of STAND_INS answers instead of the candidate."""
    asserted, called = 0, False

    def counted(value: Any) -> Any:
        nonlocal asserted
        asserted += called
        return value

    def asked(*args: Any, **kwargs: Any) -> Any:
        nonlocal called
        called = True
        return candidate(*args, **kwargs) if stand_in is None else STAND_INS[stand_in]

    asked.__name__ = asked.__qualname__ = entry_point
    names: dict[str, Any] = {"__name__": "tests"}
    exec(compile(helpers, "<prompt>", "exec", dont_inherit=True), names)
    names |= {entry_point: asked, "candidate": asked, COUNTED: counted}
    tree = ast.parse(text)
    tree = Counting(functions(tree)).visit(tree)
    exec(compile(tree, "<tests>", "exec", dont_inherit=True), names)
    if check is not None:
        names["check"](*[asked] * check)
    return asserted
