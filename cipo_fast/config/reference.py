"""Every setting, as docs/configuration.md: `python -m cipo_fast.config.reference > docs/configuration.md`."""

from __future__ import annotations

import json
import re
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from cipo_fast.config.config import Config
from cipo_fast.config.section import Section

HEAD = """\
# Configuration

Every setting: its default, what it may be, what it does. Written by `python -m cipo_fast.config.reference`, from
`cipo_fast/config/`; a test fails when it is stale. On the command line `section.key=value`; in a file, YAML sections.
Files come first, in order, then settings; the last one counts. `--help` prints how, and where files are looked for.

Sources: [paper], what is known of CIPO's (arXiv 2605.14539) from its abstract and summaries; [f2f], forms and values of
the third-party project Fail2Fix-RL; [ours], what we chose; other papers by name. [algorithm.md](algorithm.md) has the
formulas, [running.md](running.md#settings) how settings are given, and the recipes."""


def reference() -> str:
    sections: dict[str, list[str]] = {"": []}
    for path, field in _fields(Config):
        section, _, _ = path.rpartition(".")
        sections.setdefault(section, []).append(_row(path, field))
    return "\n".join((HEAD, *_parts(sections))) + "\n"


def _parts(sections: dict[str, list[str]]) -> Iterator[str]:
    for name, rows in sections.items():
        about = _about(name)
        yield f"\n## {name or 'The run as a whole'}\n" + (f"\n{about}\n" if about else "")
        yield "\n".join(("| setting | default | may be | |", "|---|---|---|---|", *rows))


def _about(path: str) -> str:
    """The docstring of the section's class, where it has one of its own."""
    section: type[Section] = Config
    for name in path.split(".") if path else []:
        section = _section(section.model_fields[name]) or section
    own = vars(section).get("__doc__") if path else None
    return " ".join(own.split()) if own else ""


def _fields(section: type[Section], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Settings before sections within each: a heading is followed by what is its own."""
    for name, field in section.model_fields.items():
        if _section(field) is None:
            yield prefix + name, field
    for name, field in section.model_fields.items():
        if (inner := _section(field)) is not None:
            yield from _fields(inner, f"{prefix}{name}.")


def _section(field: FieldInfo) -> type[Section] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def _row(path: str, field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True, validated_data={})
    shown = json.dumps(default, default=str, ensure_ascii=False)
    kind = _kind(field.annotation, field.metadata)
    text = " ".join((field.description or "").split())
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in (f"`{path}`", f"`{shown}`", kind, text)) + " |"


def _kind(annotation: Any, metadata: list[Any]) -> str:
    """What a value may be, in words: "integer, >= 1", "text or `null`"..."""
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *more = get_args(annotation)
        return _kind(inner, [*metadata, *more])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    if origin in (Union, types.UnionType):
        return " or ".join(_kind(part, metadata if part is not type(None) else []) for part in get_args(annotation))
    if origin in (list, dict, tuple):
        inside = [_kind(part, []) for part in get_args(annotation) if part is not ...]
        return f"{'mapping' if origin is dict else 'list'} of {' to '.join(inside)}"
    names = {"int": "integer", "float": "number", "bool": "`true`, `false`", "str": "text", "NoneType": "`null`"}
    name = getattr(annotation, "__name__", str(annotation))
    return ", ".join((names.get(name, name.lower()), *_limits(metadata)))


def _limits(metadata: list[Any]) -> Iterator[str]:
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<", "min_length": "length >=", "max_length": "length <="}
    for limit in (part for one in metadata for part in (getattr(one, "metadata", None) or [one])):
        for name, sign in signs.items():
            if (value := getattr(limit, name, None)) is not None:
                yield f"{sign} {value:g}" if isinstance(value, int | float) else f"{sign} {value}"
        if pattern := getattr(limit, "pattern", None):
            yield f"matches `{re.sub(r'[`]', '', str(pattern))}`"


if __name__ == "__main__":
    print(reference(), end="")
