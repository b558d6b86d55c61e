"""The process of the program: it becomes `__main__`, with true pipes, and tells its values over a pipe of its own.

What is told here may be forged by the program: it is a value that it claims, which nobody here can compare with the
expected one. Every message carries the execution's nonce.
"""

from __future__ import annotations

import atexit
import builtins
import contextlib
import gc
import io
import linecache
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from types import ModuleType
from typing import Any, NoReturn

from . import lockdown, usual
from .values import NotPlain, decode, encode, json_of, parsed
from .wire import Frames, frame

__builtins__ = {**vars(builtins)}  # type: ignore[assignment]  # of the functions below: what a program makes of the built-ins is its own affair
_exit, _read, _write, _pid = os._exit, os.read, os.write, os.getpid
_TELL, _ASK = 3, 4
_program = [""]  # where it is
_FILES = (io.TextIOWrapper, io.BufferedWriter, io.BufferedRandom)


def main(request: dict[str, Any], theirs: list[int], isolation: str, channel: int, ours: list[int]) -> NoReturn:
    """Never returns. `theirs` become descriptors 0 to 4, everything else is closed."""
    code = 70
    try:
        _descriptors(theirs, channel, ours)
        _confine(request, isolation)
        _streams()
        code = _MODES[request["mode"]](request)
    except SystemExit as leaving:
        code = _code(leaving)
    except BaseException as error:
        code = 1
        _tell_exception(request, error)
    finally:
        _finish(code, wait=request["mode"] == "run")


def _descriptors(theirs: list[int], channel: int, ours: list[int]) -> None:
    high = [os.dup2(descriptor, 100 + place) for place, descriptor in enumerate(theirs)]
    for place, descriptor in enumerate(high):
        os.dup2(descriptor, place, inheritable=place < 3)
    os.closerange(5, 65536)


def _confine(request: dict[str, Any], isolation: str) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.setsid()
    lockdown.die_with_parent()
    os.chdir(request["folder"])
    os.environ |= {"HOME": request["folder"], "TMPDIR": request["folder"]}
    if isolation == "landlock":
        from . import landlock

        landlock.confine(request["folder"])
    lockdown.limit(request["limits"], request["tasks"])
    lockdown.no_new_privileges()
    if isolation != "none":
        lockdown.refuse_calls()
    lockdown.dumpable(True)
    threading.stack_size(16 << 20)  # otherwise the main thread's, which is large, is set aside for each


def _streams() -> None:
    for name, descriptor, mode in (("stdin", 0, "rb"), ("stdout", 1, "wb"), ("stderr", 2, "wb")):
        errors = "surrogateescape" if name == "stdin" else "backslashreplace"
        buffer = os.fdopen(descriptor, mode, closefd=False)  # lives as long as the process
        buffer.raw.name = f"<{name}>"  # type: ignore[attr-defined]
        stream = io.TextIOWrapper(buffer, encoding="utf-8", errors=errors, line_buffering=name == "stderr")
        stream.mode = mode[0]  # type: ignore[misc]  # templates for fast input ask for it
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _code(leaving: SystemExit) -> int:
    """The exit code that Python would give."""
    if leaving.code is None or type(leaving.code) is int:
        return (leaving.code or 0) & 0xFF
    with contextlib.suppress(Exception):
        print(leaving.code, file=sys.stderr)
    return 1


def _finish(code: int, wait: bool) -> NoReturn:
    """A script ends as the interpreter does; a function has returned: no need to wait for threads it started, nor for
    what it left open."""
    try:
        if wait:
            for step in (threading._shutdown, atexit._run_exitfuncs):  # type: ignore[attr-defined]
                with contextlib.suppress(Exception):
                    step()  # joins threads that are no daemons; exit handlers
        code = code if _flushed() else code or 1
        if wait:
            _forget()
    except BaseException:
        code = code or 1
    finally:
        _exit(code)


def _flushed() -> bool:
    """Flush the standard streams as they stand now; whether that worked."""
    worked = True
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None and not getattr(stream, "closed", False):
                stream.flush()
        except Exception:
            worked = False
    return worked


def _forget() -> None:
    """The program's names go, and with them its objects (`__del__`, files that write when they are closed); files that
    something else holds are flushed."""
    sys.modules.pop("__main__", None)
    with contextlib.suppress(MemoryError):
        gc.collect()
        for found in gc.get_objects():
            if type(found) is dict and found.get("__file__") is _program[0]:
                for name in [name for name in found if name != "__builtins__"]:
                    found[name] = None
        gc.collect()
        for kind in _FILES:
            for found in [found for found in gc.get_objects() if issubclass(type(found), kind)]:
                with contextlib.suppress(Exception):
                    found.flush()


# -- messages


def _tell(nonce: str, what: str, text: str, number: int = 0) -> None:
    """One message: {"nonce", what: text, "number"}. `text` is canonical JSON, or a JSON list for an exception; `number`
    that of the call which it answers."""
    left = frame(json_of({"nonce": nonce, what: text, "number": number}).encode())
    while left:
        left = left[_write(_TELL, left) :]


def _tell_exception(request: dict[str, Any], error: BaseException) -> None:
    try:  # noqa: SIM105 (contextlib uses built-ins that the program may have changed)
        traceback.print_exception(error)
    except BaseException:
        pass
    # What ends a program that is to answer calls is no answer to one of them.
    what = "broken" if request["mode"] == "serve" else "raised"
    try:  # noqa: SIM105
        _tell(request["nonce"], what, json_of(described(error)))
    except BaseException:
        pass


def described(error: BaseException) -> list[str]:
    """The name of its nearest built-in class, and its text."""
    kind = next(base for base in type(error).__mro__ if base.__module__ == "builtins")
    try:
        text = str(error)[:500]
    except BaseException:
        text = ""
    name = type(error).__name__
    return [kind.__name__, name, text if isinstance(text, str) else ""]


def _incoming() -> Any:
    """Messages from our side, one after the other."""
    frames = Frames(longest=256 << 20)
    while True:
        data = _read(_ASK, 1 << 16)
        if not data:
            return
        yield from frames.feed(data)


# -- the program


def _execute(request: dict[str, Any], before: Callable[[dict[str, Any]], None] = lambda names: None) -> dict[str, Any]:
    """The program run as `__main__`; its names. inspect can read it, and pickle finds its classes."""
    source, path = request["program"].removeprefix("\ufeff"), f"{request['folder']}/program.py"
    _program[0] = path
    module = ModuleType("__main__")
    module.__dict__.update(__file__=path, __builtins__=builtins)
    sys.modules["__main__"] = module
    sys.argv = [path]
    linecache.cache[path] = (len(source), None, source.splitlines(True), path)
    with contextlib.suppress(OSError, UnicodeError), open(path, "w", encoding="utf-8") as file:
        file.write(source)
    before(module.__dict__)
    exec(compile(source, path, "exec", dont_inherit=True), module.__dict__)
    return module.__dict__


def entry(names: dict[str, Any], wanted: str | None) -> Callable[..., Any]:
    """The function that is asked for: `name`, `Class.method`, `Class().method`; None: the only one there is, or the
    only public method of `Solution`."""
    found = wanted or _only(names)
    owner, _, name = found.replace("()", "").rpartition(".")
    if owner:
        return getattr(names[owner](), name)
    if name not in names and isinstance(names.get("Solution"), type) and hasattr(names["Solution"], name):
        return getattr(names["Solution"](), name)
    if name not in names:
        raise NameError(f"the program defines no {name}")
    return names[name]


def _only(names: dict[str, Any]) -> str:
    if isinstance(names.get("Solution"), type):
        methods = [name for name, item in vars(names["Solution"]).items() if name[0] != "_" and callable(item)]
        return f"Solution.{_single(methods, 'public method of Solution')}"
    functions = [
        name
        for name, item in names.items()
        if name[0] != "_"
        and callable(item)
        and getattr(item, "__module__", "") == "__main__"
        and not isinstance(item, type)
    ]
    return _single(functions, "function")


def _single(names: list[str], what: str) -> str:
    if len(names) != 1:
        raise NameError(f"the program defines {len(names)} of what is called, a {what}: name the one that is meant")
    return names[0]


# -- modes


def _run(request: dict[str, Any]) -> int:
    _execute(request)
    return 0


def _ready(request: dict[str, Any]) -> Callable[..., Any]:
    """The function of the program, and the names that LeetCode gives to its programs."""
    wanted = request["entry_point"]
    names = _execute(request, usual.give)
    return entry(names, wanted)


def _call(request: dict[str, Any]) -> int:
    function = _ready(request)
    arguments, named = decode(request["call"])
    _answer(request["nonce"], function, arguments, named)
    return 0


def _answer(nonce: str, function: Callable[..., Any], arguments: Any, named: Any, number: int = 0) -> None:
    asked = _pid()
    try:
        value = function(*arguments, **named)
    finally:
        if _pid() != asked:
            _exit(0)  # a process that the function forked: one call has one answer
    sys.setrecursionlimit(10_000)
    try:
        text = encode(value)
    except NotPlain as error:
        _tell(nonce, "refused", str(error), number)
        return
    _tell(nonce, "value", text, number)


def _serve(request: dict[str, Any]) -> int:
    """Answer calls until our side hangs up."""
    function = _ready(request)
    for message in _incoming():
        number, call = parsed(message.decode())
        arguments, named = decode(call)
        try:
            _answer(request["nonce"], function, arguments, named, number)
        except Exception as error:
            _tell(request["nonce"], "raised", json_of(described(error)), number)
    return 0


class Uncrossable(BaseException):
    """A value that cannot cross between tests and candidate. No Exception: tests that expect one must not be content
    with it."""


class CandidateError(Exception):
    """The candidate raised an exception of a class of its own."""


def _rebuilt(kind: str, name: str, text: str) -> Exception:
    """The candidate's exception: of its nearest built-in class, if that is an Exception other than Exception itself."""
    known = getattr(builtins, kind, None)
    if isinstance(known, type) and issubclass(known, Exception) and (kind == name or known is not Exception):
        with contextlib.suppress(TypeError):  # UnicodeDecodeError wants five arguments
            return known(text)
    return CandidateError(f"{name}: {text}")


def _tests(request: dict[str, Any]) -> int:
    """Run the tests with a candidate that lives elsewhere: only values cross."""
    nonce, incoming = request["nonce"], _incoming()

    def candidate(*arguments: Any, **named: Any) -> Any:
        try:
            _tell(nonce, "call", encode((arguments, named)))
            answer = parsed(next(incoming).decode())
            if "value" in answer:
                return decode(answer["value"])
        except NotPlain as error:
            raise Uncrossable(f"the tests and the candidate exchange {error}") from None
        if "refused" in answer:
            raise Uncrossable(f"the candidate returned {answer['refused']}")
        raise _rebuilt(*parsed(answer["raised"]))

    candidate.__name__ = request["entry_point"].rpartition(".")[2]
    names = _execute(request, lambda names: names.update({candidate.__name__: candidate}))
    names[candidate.__name__] = candidate
    if not callable(names.get("check")):
        raise NameError("the tests define no function check")
    value = names["check"](candidate)
    try:
        told = encode(value)
    except NotPlain:
        told = "null"
    _tell(nonce, "passed", told)
    return 0


_MODES = {"run": _run, "call": _call, "serve": _serve, "tests": _tests}
