"""A user's own verifier, `path/to/file.py:function`: loaded in a worker, never in the trainer.

    def verify(response: str, row: dict) -> bool                         ours
    def reward(prompts, completions, **columns) -> list[float]           TRL's, known by its parameter `completions`

TRL's gets lists of one (https://huggingface.co/docs/trl/grpo_trainer): completions are texts, or lists of one message
where the row's prompt is a list of messages; each field of the row is a column. It may be `async`.
Rewards are 0 or 1 in CIPO: any other value is an error, not a reward.
"""

from __future__ import annotations

import ast
import asyncio
import functools
import hashlib
import importlib.util
import inspect
import reprlib
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cipo_fast.errors import UserError
from cipo_fast.verify.statements import top_level
from cipo_fast.verify.verdict import Judgement, VerifierFailure

Row = dict[str, Any]
SIGNATURES = "(response, row) or TRL's (prompts, completions, **columns)"
NOT_GIVEN = ("completion_ids", "completions_ids", "trainer_state", "environments")  # what only TRL's trainer has
_HIDDEN = ("prompt", "completion", "prompts", "completions")  # columns that TRL passes under other names, or not at all


@functools.cache
def check_verifier(verifier: str) -> None:
    """UserError unless the file is there and defines the function with a signature that we call. Runs none of it."""
    fault = _fault(verifier)
    if fault is not None:
        raise UserError(fault)


def check_row(row: Row) -> str | None:
    """What is wrong, or None: the file, the function, its signature, a column that it asks for."""
    return _fault(row["verifier"]) or _missing(_written_signature(row["verifier"]), row)


def judge(row: Row, response: str) -> Judgement:
    """What the function says. VerifierFailure where it raises or returns anything but true or false, 1 or 0."""
    verifier = row["verifier"]
    function = load(verifier)
    fault = _missing(inspect.signature(function), row)
    if fault is not None:
        raise VerifierFailure(fault)
    try:
        said = _call(function, row, response)
    except MemoryError:
        raise  # the worker's limit
    except BaseException as error:
        raise VerifierFailure(f"{verifier} raised {_described(error, _split(verifier)[0])}") from error
    return Judgement("right" if _truth(said, verifier, function) else "wrong")


@functools.cache
def load(verifier: str) -> Callable[..., Any]:
    """The function. Its file is imported once a process, its folder first on sys.path. Raises VerifierFailure."""
    path, name = _split(verifier)
    fault = _fault(verifier)
    if fault is not None:
        raise VerifierFailure(fault)
    function = getattr(_module(path), name, None)
    if not callable(function):
        raise VerifierFailure(f"{verifier}: {path} has no function {name}")
    fault = _unfit(verifier, inspect.signature(function))
    if fault is not None:
        raise VerifierFailure(fault)
    return function


@functools.cache
def _module(path: Path) -> Any:
    module_name = f"_cipo_fast_verifier_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise VerifierFailure(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    folder = str(path.parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[module_name]
        raise VerifierFailure(f"{path} cannot be imported: {_described(error, path)}") from error
    return module


def _call(function: Callable[..., Any], row: Row, response: str) -> Any:
    signature = inspect.signature(function)
    said = function(**_columns(signature, row, response)) if _is_trl(signature) else function(response, row)
    return asyncio.run(said) if inspect.iscoroutine(said) else said


def _columns(signature: inspect.Signature, row: Row, response: str) -> Row:
    """Keyword arguments as TRL passes them, each a list of one."""
    prompt = row.get("prompt", row.get("messages"))
    conversational = isinstance(prompt, list)
    columns: Row = {name: [value] for name, value in row.items() if name not in _HIDDEN}
    columns["prompts"] = [prompt]
    columns["completions"] = [[{"role": "assistant", "content": response}] if conversational else response]
    columns["log_extra"] = columns["log_metric"] = _ignore
    if any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()):
        return columns
    return {name: value for name, value in columns.items() if name in signature.parameters}


def _ignore(*_: Any) -> None:
    """Stands for TRL's logging callbacks."""


def _truth(said: Any, verifier: str, function: Callable[..., Any]) -> bool:
    value = said.tolist() if callable(getattr(said, "tolist", None)) else said  # numpy's and torch's
    if _is_trl(inspect.signature(function)):
        if not isinstance(value, list | tuple) or len(value) != 1:
            raise VerifierFailure(f"{verifier} returned {_shown(said)} for one completion: return a list of one float")
        value = value[0].tolist() if callable(getattr(value[0], "tolist", None)) else value[0]
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    raise VerifierFailure(f"{verifier} returned {_shown(said)}: rewards are 0 or 1, return True or False")


def _shown(value: Any) -> str:
    try:
        return f"{reprlib.repr(value)} ({type(value).__name__})"
    except Exception:
        return f"an object of type {type(value).__name__}"


def _described(error: BaseException, path: Path) -> str:
    """The exception and the last line of the user's file that it passed."""
    lines = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    place = f" at {path.name}:{lines[-1].lineno}" if lines else ""
    if isinstance(error, SyntaxError) and error.lineno is not None:
        place = f" at {Path(error.filename or path).name}:{error.lineno}"
    try:
        text = " ".join(str(error).split())
    except Exception:
        text = ""
    if isinstance(error, MemoryError) or "failed to map" in text or "Cannot allocate memory" in text:
        text += " (verify.memory_mib limits a worker's address space)"
    return f"{type(error).__name__}{place}" + (f": {text:.300}" if text else "")


def _split(verifier: str) -> tuple[Path, str]:
    path, _, name = verifier.rpartition(":")
    return Path(path).expanduser().absolute(), name


def _fault(verifier: str) -> str | None:
    path, name = _split(verifier)
    if not verifier.rpartition(":")[0] or not name.isidentifier():
        return f"verifier {verifier!r:.200} is not path/to/file.py:function"
    if not path.is_file():
        return f"verifier {verifier}: there is no file {path}"
    if path.suffix != ".py":
        return f"verifier {verifier}: {path.name} is no Python file (.py)"
    try:
        signature = _written_signature(verifier)
    except SyntaxError as error:
        return f"verifier {verifier}: {path.name}:{error.lineno} is no Python: {error.msg}"
    except (OSError, ValueError, RecursionError) as error:
        return f"verifier {verifier}: {path} cannot be read ({error})"
    except LookupError:
        return f"verifier {verifier}: {path} defines no function {name}"
    return _unfit(verifier, signature)


@functools.cache
def _written_signature(verifier: str) -> inspect.Signature | None:
    """Of the function as its file has it; None where the name is imported or assigned, LookupError where nowhere."""
    path, name = _split(verifier)
    tree = ast.parse(path.read_bytes(), str(path))
    bound: list[ast.AST] = []
    for node in top_level(tree.body):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            bound += [node] if node.name == name else []
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.asname or alias.name.split(".")[0] for alias in node.names]
            bound += [node] if name in names or "*" in names else []
        else:
            bound += [n for n in ast.walk(node) if isinstance(n, ast.Name) and n.id == name]
    if not bound:
        raise LookupError(name)
    last = bound[-1]
    plain = isinstance(last, ast.FunctionDef | ast.AsyncFunctionDef) and not last.decorator_list
    return _signature(last.args) if plain else None  # type: ignore[attr-defined]


def _signature(arguments: ast.arguments) -> inspect.Signature:
    kinds = inspect.Parameter
    positional = [*arguments.posonlyargs, *arguments.args]
    without = len(positional) - len(arguments.defaults)
    parameters = []
    for i, argument in enumerate(positional):
        kind = kinds.POSITIONAL_ONLY if i < len(arguments.posonlyargs) else kinds.POSITIONAL_OR_KEYWORD
        parameters.append(kinds(argument.arg, kind, default=kinds.empty if i < without else None))
    if arguments.vararg:
        parameters.append(kinds(arguments.vararg.arg, kinds.VAR_POSITIONAL))
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        parameters.append(kinds(argument.arg, kinds.KEYWORD_ONLY, default=kinds.empty if default is None else None))
    if arguments.kwarg:
        parameters.append(kinds(arguments.kwarg.arg, kinds.VAR_KEYWORD))
    return inspect.Signature(parameters)


def _is_trl(signature: inspect.Signature) -> bool:
    return "completions" in signature.parameters


def _required(signature: inspect.Signature) -> list[str]:
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in signature.parameters.values() if p.default is p.empty and p.kind not in variable]


def _unfit(verifier: str, signature: inspect.Signature | None) -> str | None:
    """Why a function with this signature cannot be called, or None."""
    if signature is None:
        return None
    if _is_trl(signature):
        asked = [name for name in _required(signature) if name in NOT_GIVEN]
        return f"verifier {verifier} asks for {asked[0]}, which a verifier does not get" if asked else None
    try:
        signature.bind("", {})
    except TypeError:
        return f"verifier {verifier} takes {signature}: it must take {SIGNATURES}"
    return None


def _missing(signature: inspect.Signature | None, row: Row) -> str | None:
    """The first column that a function with TRL's signature requires and the row has not."""
    if signature is None or not _is_trl(signature):
        return None
    given = {*row, "prompts", "completions", "log_extra", "log_metric"} - {"prompt", "completion"}
    asked = [name for name in _required(signature) if name not in given]
    return f"{row['verifier']} asks for the column {asked[0]}, which the row has not" if asked else None
