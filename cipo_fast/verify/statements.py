"""What stands at the top level of a Python module."""

from __future__ import annotations

import ast
from collections.abc import Iterator


def top_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a module, those inside its `if`, `try` and `with` too."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try | ast.With):
            for part in ("body", "orelse", "finalbody"):
                yield from top_level(getattr(node, part, []))
            for handler in getattr(node, "handlers", []):
                yield from top_level(handler.body)
