"""YAML files and `key.path=value` as values for a schema of pydantic models to check.

What a text means is decided by the field it is for, never by YAML's guess: a text setting is the text typed (`007`,
`yes`, `1e3`, `2026-01-01`, on a command line `#` and quotes too), a number is read by pydantic from its text, `null` is
None where the field may be None, and a path has its `~` and environment variables replaced and is absolute. Only
values without a type of their own (inside a dict setting) are YAML 1.2's guess: null, true, false, numbers, text. On a
command line they are YAML where they begin with { [ " or '.
"""

from __future__ import annotations

import math
import os
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, Field, PlainSerializer

from cipo_fast.errors import UserError

MAX_VALUES = 10_000  # in one file: more come from aliases of aliases
MAX_DEPTH = 50
MAX_SHOWN = 200  # characters of a value in an error
NULL, TEXT, MERGE = (f"tag:yaml.org,2002:{kind}" for kind in ("null", "str", "merge"))
VARIABLE = re.compile(r"\$(?:(\$)|(\w+)|\{([^}]*)\})", re.ASCII)

Place = dict[str, str]  # dotted key -> where it was given
Members = dict[Any, tuple[Any, ...]]  # type -> its metadata, of a union or of one type


def as_setting(path: Path | str) -> str:
    """A path as a setting says it: `$`, which begins a variable, is written `$$`."""
    return str(path).replace("$", "$$")


_HUB = object()
FilePath = Annotated[Path, PlainSerializer(as_setting, when_used="json")]
"""A file or folder."""
NameOrPath = Annotated[str, PlainSerializer(as_setting, when_used="json"), _HUB]
"""A hub name, or a folder: what begins with /, ./, ../, ~ or a variable, or is a folder here."""
_DATA = object()
HUB_DATA = "hub:"
HubData = Annotated[str, _DATA]
"""Beside a path in a union: what begins with `hub:` is a data set's name, and no path."""


def _as_settings(value: list[Path | str] | Path | str | None) -> list[str] | str | None:
    if isinstance(value, list):
        return [as_setting(one) for one in value]
    return None if value is None else as_setting(value)


Sources = Annotated[
    Path | HubData | Annotated[list[Path | HubData], Field(min_length=1)] | None,
    PlainSerializer(_as_settings, when_used="json"),  # of a union's member it would be given every value
]
"""Files and hub data sets: one, or several."""
_FUNCTION = object()
FUNCTION = re.compile(r"(?P<file>.+\.py):(?P<name>[^\W\d]\w*)\Z", re.DOTALL)
NameOrFunction = Annotated[str, PlainSerializer(as_setting, when_used="json"), _FUNCTION]
"""A name, or `path/to/file.py:function`, whose path becomes absolute."""


class _Loader(yaml.SafeLoader):
    """YAML with the scalars of its core schema: no `yes`, no dates, no octal or sexagesimal numbers."""


class _Dumper(yaml.SafeDumper):
    """Quotes what either YAML 1.1 or `_Loader` would take for something else than text."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9]*)(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", r"<<", ["<"]),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), _first)


def _quoted(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Only double quotes keep every line break and every character that is not seen."""
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _quoted)


def to_yaml(values: dict[str, Any]) -> str:
    """What `from_file` reads back as the same values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)


def from_file(path: Path, schema: type[BaseModel]) -> tuple[dict[str, Any], Place]:
    """(nested values, where each key stands) of a YAML file; raises UserError with file and line."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
        node = yaml.compose(text, _Loader)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; save it as UTF-8") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not valid YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if node is None or _is_null(node):
        return {}, {}
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{path}: expected keys and values at the top level, got {_kind(node)}")
    reader = _Reader(str(path), in_file=True)
    return reader.section(node, schema, "", 0), reader.places


def from_argument(argument: str, schema: type[BaseModel]) -> dict[str, Any]:
    """The nested value of one `key.path=value`; raises UserError."""
    key, _, text = argument.partition("=")
    if not text:
        raise UserError(f"argument {argument!r}: no value after the =")
    annotation, parts = _field_at(key, schema)
    reader = _Reader(f"argument {cut(repr(argument))}", in_file=False)
    value: Any = text if annotation is None else reader.from_text(text, annotation, key)
    for part in reversed(parts):
        value = {part: value}
    return value


def cut(text: str) -> str:
    """What an error shows of a value: the beginning of a long one."""
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN // 2]}... ({len(text):,} characters)"


def expand(text: str, where: str) -> str:
    """`text` with environment variables, `$$` (a dollar) and a leading `~` or `~user` replaced; raises UserError."""

    def value(match: re.Match[str]) -> str:
        dollar, *names = match.groups()
        name = names[0] or names[1]
        if dollar:
            return "$"
        if not name or not os.environ.get(name):
            raise UserError(f"{where}: the environment variable {name!r} is not set (a $ of the name itself: $$)")
        return os.environ[name]

    found = os.path.expanduser(VARIABLE.sub(value, text))
    if found.startswith("~"):
        raise UserError(f"{where}: no user {found.split('/')[0][1:]!r} (a file of that name: ./{found})")
    return found


def from_system(argument: str, where: str) -> str:
    """A command-line argument as the text typed, whatever the locale made of it; raises UserError."""
    try:
        return os.fsencode(argument).decode("utf-8")
    except UnicodeError:
        raise UserError(f"{where}: not UTF-8 text") from None


def for_system(text: str, where: str) -> str:
    """A file name that the operating system's calls take in this locale; raises UserError. (Python could go round it,
    the libraries that read and write tokenizers cannot.)"""
    try:
        os.fsencode(text)
    except UnicodeError:
        raise UserError(f"{where}: this locale cannot name {text}: set PYTHONUTF8=1, or LC_ALL=C.UTF-8") from None
    return text


# ------------------------------------------------------------------------------------------------- by the field's type


class _Reader:
    """Walks one source's YAML nodes along the schema."""

    def __init__(self, source: str, in_file: bool):
        self.source = source
        self.in_file = in_file
        self.places: Place = {}
        self.count = 0

    def section(self, node: yaml.MappingNode, schema: type[BaseModel], prefix: str, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, child in self._items(node, prefix.rstrip(".")):
            key = prefix + name
            self.places[key] = self._at(child)
            if "." in name:
                raise UserError(f"{self._at(child)}: key {key!r}: write one level a key, {_nested(name)}")
            field = schema.model_fields.get(name)
            # A key that is not known goes on as it is: the schema refuses it.
            found[name] = None if field is None else self.value(child, _annotation(field), key, depth + 1)
        return found

    def value(self, node: yaml.Node, annotation: Any, key: str, depth: int) -> Any:
        self._bound(node, depth)
        members = dict(_members(annotation))
        if isinstance(node, yaml.ScalarNode):
            return self._one(node, members, key, depth)
        if Any in members:
            return self._guess(node, key, depth)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, members, key, depth)
        return self._sequence(node, members, key, depth)

    def _one(self, node: yaml.ScalarNode, members: Members, key: str, depth: int) -> Any:
        containers = [t for t in members if _is_container(t)]
        if _is_null(node) and (type(None) in members or containers):
            # Null where null may be; else a section of which every line is a comment.
            return None if type(None) in members or Any in members else {}
        if containers and len(containers) == len(members):
            if _is_section(containers[0]):
                raise UserError(f"{self._at(node)}: {key}={cut(node.value)}: expected a section, not a value")
            return self._guess(node, key, depth)
        return self._scalar(node.value, members, key, self._at(node))

    def _mapping(self, node: yaml.MappingNode, members: Members, key: str, depth: int) -> dict[str, Any]:
        for t in members:
            if _is_section(t):
                return self.section(node, t, f"{key}.", depth)
            if _origin(t) is dict:
                of = (get_args(t) or (Any, Any))[1]
                return {k: self.value(v, of, f"{key}.{k}", depth + 1) for k, v in self._items(node, key)}
        raise UserError(f"{self._at(node)}: {key}: expected one value, got {_kind(node)}")

    def _sequence(self, node: yaml.Node, members: Members, key: str, depth: int) -> list[Any]:
        for t in members:
            if _origin(t) in (list, tuple):
                of = (get_args(t) or (Any,))[0]
                return [self.value(v, of, key, depth + 1) for v in node.value]
        raise UserError(f"{self._at(node)}: {key}: expected one value, got {_kind(node)}")

    def from_text(self, text: str, annotation: Any, key: str) -> Any:
        """The value of a command-line text."""
        members = dict(_members(annotation))
        if text == "null" and type(None) in members:
            return None
        containers = [t for t in members if _is_container(t)]
        # A text that is one value or several, such as `a` and `[a, b]`, is YAML by its bracket alone.
        typed = len(containers) < len(members) - (type(None) in members)
        if not containers or (typed and text.lstrip()[:1] not in ("[", "{")):
            return self._scalar(text, members, key, self.source)
        if text.lstrip()[:1] not in ("[", "{", '"', "'"):
            tag = _Loader("").resolve(yaml.ScalarNode, text, (True, False))
            return self.value(yaml.ScalarNode(TEXT if tag == MERGE else tag, text), annotation, key, 0)
        try:
            node = yaml.compose(text, _Loader)
        except (yaml.YAMLError, RecursionError):
            raise UserError(f"{self.source}: the value is not valid YAML; quote it") from None
        assert node is not None  # there is more than a comment
        return self.value(node, annotation, key, 0)

    def _scalar(self, text: str, members: Members, key: str, where: str) -> Any:
        """The text itself, or what a Literal or a path makes of it; numbers and truth values are pydantic's to read."""
        text = _whole(text, key, where)
        for t in members:
            if get_origin(t) is Literal:
                for value in get_args(t):
                    if str(value) == text:
                        return value
        if text.startswith(HUB_DATA) and any(extra is _DATA for extra in members.get(str, ())):
            return text.replace("$$", "$")
        if Path in members:
            return Path(self._absolute(text, key, where))
        if any(extra is _FUNCTION for extra in members.get(str, ())):
            function = FUNCTION.fullmatch(text)
            return f"{self._absolute(function['file'], key, where)}:{function['name']}" if function else text
        if any(extra is _HUB for extra in members.get(str, ())):
            return self._name_or_path(text, key, where)
        if type(None) in members and str not in members and text.lower() in ("none", "null", "~"):
            raise UserError(f"{where}: {key}={text}: write null for none")
        return text

    def _absolute(self, text: str, key: str, where: str) -> str:
        if not text or "\0" in text:
            raise UserError(f"{where}: {key}: expected a path")
        place = f"{where}: {key}"
        return for_system(os.path.join(os.getcwd(), expand(text, place)), place)

    def _name_or_path(self, text: str, key: str, where: str) -> str:
        name = for_system(expand(text, f"{where}: {key}"), f"{where}: {key}")
        is_path = name.startswith(("/", "./", "../")) or name in (".", "..")
        if is_path or (name != "embedded" and "\0" not in name and os.path.isdir(name)):
            return str(Path(self._absolute(text, key, where)))
        return name

    def _guess(self, node: yaml.Node, key: str, depth: int) -> Any:
        """The value of a node that no field gives a type."""
        self._bound(node, depth)
        if isinstance(node, yaml.MappingNode):
            return {name: self._guess(child, f"{key}.{name}", depth + 1) for name, child in self._items(node, key)}
        if isinstance(node, yaml.SequenceNode):
            return [self._guess(child, key, depth + 1) for child in node.value]
        try:
            value = _Loader("").construct_object(node, deep=True)
        except (yaml.YAMLError, ValueError) as error:
            raise UserError(f"{self._at(node)}: {key}: {' '.join(str(error).split())}") from None
        if not isinstance(value, str | int | float | None):
            raise UserError(f"{self._at(node)}: {key}: a {type(value).__name__} is no setting; quote it")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{self._at(node)}: {key}={cut(node.value)}: not a finite number")
        return _whole(value, key, self._at(node)) if isinstance(value, str) else value

    def _items(self, node: yaml.MappingNode, key: str) -> Iterator[tuple[str, yaml.Node]]:
        """(key, value) of a mapping, its `<<` merged; a key given twice is refused."""
        first: dict[str, int] = {}
        for name, _ in node.value:
            if not isinstance(name, yaml.ScalarNode):
                raise UserError(f"{self._at(name)}: a key is a word, got {_kind(name)}")
            if name.value in first:
                raise UserError(
                    f"{self._at(name)}: key {name.value!r} is given twice, first in line {first[name.value]}"
                )
            first[name.value] = name.start_mark.line + 1
        try:
            _Loader("").flatten_mapping(node)
        except (yaml.YAMLError, RecursionError):
            raise UserError(
                f"{self._at(node)}: {f'{key}.<<' if key else '<<'}: expected keys and values to merge"
            ) from None
        merged: dict[str, yaml.Node] = {}  # its own come last and win
        for name, child in node.value:
            merged[_whole(name.value, key, self._at(name))] = child
        yield from merged.items()

    def _bound(self, node: yaml.Node, depth: int) -> None:
        self.count += 1
        if self.count > MAX_VALUES or depth > MAX_DEPTH:
            raise UserError(f"{self._at(node)}: over {MAX_VALUES:,} values, or over {MAX_DEPTH} levels of them")

    def _at(self, node: yaml.Node) -> str:
        return f"{self.source}:{node.start_mark.line + 1}" if self.in_file else self.source


def _field_at(key: str, schema: type[BaseModel]) -> tuple[Any, list[str]]:
    """(type of the setting with that dotted key or None where there is none, the key's parts)."""
    annotation: Any = schema
    parts = key.split(".")
    for i, part in enumerate(parts):
        containers = [t for t, _ in _members(annotation) if _is_container(t)]
        if not containers:
            raise UserError(f"unknown key {key!r}: {'.'.join(parts[:i])} is one value, it has no parts")
        inside = containers[0]
        if _is_section(inside):
            field = inside.model_fields.get(part)
            if field is None:
                return None, parts
            annotation = _annotation(field)
        else:
            annotation = (get_args(inside) or (Any, Any))[-1]
    return annotation, parts


def _annotation(field: Any) -> Any:
    """A field's type with its metadata, which pydantic keeps apart."""
    return Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation


def _members(annotation: Any, extras: tuple[Any, ...] = ()) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """(type, its metadata) of each member of a union, or of the one type."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _members(annotation.__origin__, (*extras, *annotation.__metadata__))
    elif origin in (Union, types.UnionType):
        for member in get_args(annotation):
            yield from _members(member, extras)
    else:
        yield annotation, extras


def _is_container(t: Any) -> bool:
    return t is Any or _origin(t) in (dict, list, tuple) or _is_section(t)


def _is_section(t: Any) -> bool:
    return isinstance(t, type) and issubclass(t, BaseModel)


def _origin(t: Any) -> Any:
    return get_origin(t) or t


def _is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag == NULL


def _whole(text: str, key: str, where: str) -> str:
    """`text` with the two halves of a character, which JSON escapes one by one, as that character."""
    try:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
    except UnicodeError:
        raise UserError(f"{where}: {key}: half a surrogate pair is no text") from None


def _kind(node: yaml.Node) -> str:
    if isinstance(node, yaml.MappingNode):
        return "keys and values"
    return "a list" if isinstance(node, yaml.SequenceNode) else "one value"


def _nested(name: str) -> str:
    *outer, last = name.split(".")
    return ": {".join([*outer, f"{last}: ..."]) + "}" * len(outer)
