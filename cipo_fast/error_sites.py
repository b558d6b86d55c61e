"""Every message that a user can see, read out of the source: what docs/troubleshooting.md lists (error_docs.py).

A message is the argument of an exception of `SEEN`, or of a function of `SAYS`. A field of an f-string becomes
`<name>`; a name that stands for words (`hint`, `where`, a parameter, what a function returns) is replaced by them, each
choice a message of its own. What cannot be read that way is looked up in `WRITTEN`; what is in neither is
`Found.unread`, and a test fails.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from math import prod
from pathlib import Path

SOURCE = Path(__file__).parents[1]
FOLDERS = ("cipo_fast", "kernels")
MOST = 12  # choices of one message that are written out
DEEPEST = 6  # names that stand for names

# (class, where it is raised) -> what a terminal prints in front of its message, of all that reach a user. The row with
# the longest path counts.
SEEN: dict[tuple[str, str], str] = {
    ("UserError", ""): "error: ",  # errors.command prints an Ending
    ("NoRows", ""): "error: ",
    ("NotJudged", ""): "error: ",
    ("Rewarded", ""): "failed: ",
    ("TrainingStopped", ""): "stopped: ",
    ("PolicyBroken", ""): "stopped: ",
    ("CheckpointFailed", ""): "stopped: ",
    ("Preempted", ""): "stopped by ",
    ("RuntimeError", ""): "RuntimeError: ",  # behind "stopped: " where distributed.together makes it a RankFailure
    ("ValueError", "kernels/"): "ValueError: ",  # the kernels know no UserError
    # No line of their own: another line quotes them.
    ("EngineFailure", ""): "",  # "engine lost", and an Ending when it is lost for good
    ("VerifierFailure", ""): "",  # "could not be judged"
    ("Lost", ""): "",  # the sandbox, in a VerifierFailure or in "no isolation works here"
    ("SystemExit", "cipo_fast/verify/sandbox/inside/zygote.py"): "",  # the same
    ("Unusable", ""): "",  # "rows dropped"
    ("Refused", ""): "",  # why an answer cannot be read, or a gold does not verify
    ("TooMuch", ""): "",  # the same
    ("Unparsable", ""): "",  # why an answer cannot be read
    ("Judgement", ""): "",  # why an answer is not right
    ("PydanticCustomError", ""): "",  # behind "key=value: "
    ("ValueError", "cipo_fast/verify/math/"): "",  # in the error of the row
    ("ValueError", "cipo_fast/evaluation/records.py"): "",  # in the error of the line
    ("ValueError", "cipo_fast/tasks/"): "",  # in the error of the row
}
# The same for what no user sees, and why.
UNSEEN: dict[tuple[str, str], str] = {
    ("", "cipo_fast/verify/sandbox/inside/"): "inside the sandbox: an outcome of the program, told in a verdict",
    ("Undefined", "cipo_fast/verify/math/"): "no value at a point: the comparator goes on",
    ("_OutOfTime", "cipo_fast/verify/code/"): "becomes a verdict",
    ("_Repeated", "cipo_fast/tasks/jsonl.py"): "becomes a UserError",
    ("_GatheringFailed", "cipo_fast/rollout/supervised.py"): "carries another exception, which is raised again",
    ("OSError", "cipo_fast/checkpoint.py"): "becomes a CheckpointFailed, or a TrainingStopped of train.written",
    ("LookupError", "cipo_fast/verify/user.py"): "becomes a line of _fault",
    ("EOFError", "cipo_fast/verify/workers/"): "a worker that is gone: it is replaced",
    ("ValueError", "cipo_fast/verify/workers/"): "a worker that talks nonsense: it is replaced",
    ("ValueError", "cipo_fast/dry_run.py"): "becomes a UserError",
    ("TypeError", "cipo_fast/report/rollouts.py"): "a record that the report leaves out",
    ("ValueError", "cipo_fast/evaluation/estimators.py"): "commands check n and k before",
    ("ValueError", "cipo_fast/policy.py"): "the loader sets what it asks for",
    ("NotImplementedError", "cipo_fast/rollout/"): "such an engine raises no EngineFailure, so nobody restarts it",
    ("AssertionError", "cipo_fast/rollout/connection.py"): "is never reached",
    ("KeyboardInterrupt", ""): "Ctrl-C: exit code 130",
    ("SystemExit", ""): "an exit code",
}
SAYS = ("say", "_say", "note", "_note", "warn")
# Functions that return or collect lines which others say.
LINES = {
    "cipo_fast/checkpoint.py": ("_damage", "_manifest"),
    "cipo_fast/config/loading.py": ("cautions", "_rho_that_stays"),
    "cipo_fast/dry_run.py": ("describe",),
    "cipo_fast/liger.py": ("use_liger",),
    "cipo_fast/run_dir.py": ("decide",),
    "cipo_fast/verify/code/__init__.py": ("_calls", "_stdin", "_suite", "_failed"),
    "cipo_fast/verify/code/program.py": ("_blocks", "_tree"),
    "cipo_fast/verify/code/tests.py": ("_facts", "_asserts_nothing", "_no_check"),
    "cipo_fast/verify/math/__init__.py": ("check_row", "check_gold"),
    "cipo_fast/verify/math/compare.py": ("check", "_check"),
    "cipo_fast/verify/sandbox/choosing.py": ("_try",),
    "cipo_fast/verify/sandbox/tiers.py": ("describe",),
    "cipo_fast/verify/workers/worker.py": ("_answer",),
}
# Beginnings of what is said and no trouble.
NEWS = (
    *("<most> of <n> answers, spread", "<n> answers to <problems> problems", "<answers> answers judged"),
    *("<what>: <done> golds checked", "<what>: <n> golds checked", "<source>: <rows> rows read", "sandbox: <kind>"),
    *("an answer ends with", "starting <engine>", "<num_parameters> parameters", "attention on", "resumed after"),
    *("<step> steps in", "to look at", "warm start", "going on after"),
    *("liger-kernel: ", "passed"),
)
# (file, expression) -> what it says, where the source does not tell, or tells only a part of it ("...").
WRITTEN: dict[tuple[str, str], tuple[str, ...]] = {
    ("cipo_fast/answers.py", "wrong"): ("...",),  # the rest is said by verify/
    ("cipo_fast/audit/__main__.py", "f\"  {t.answer.where}: {'; '.join(parts)}\""): (),  # a finding
    ("cipo_fast/checkpoint.py", "f'{self.folder / name} is passed over: {wrong}'"): ("...",),
    ("cipo_fast/config/loading.py", "_explain(error, places)"): (
        "unknown key '<key>'[: did you mean '<near>'?]",
        "<key>=<value>: input should be <what it may be>[ (and <n> more)]",
    ),
    ("cipo_fast/config/loading.py", "_explain(error, places, schema, f'{path}: ')"): (
        "<file>: no '<key>', which has no default",
    ),
    ("cipo_fast/config/settings.py", "f\"{self._at(node)}: {key}: {' '.join(str(error).split())}\""): (
        "<where>: <key>: <what YAML says of the value>",
    ),
    ("cipo_fast/distributed.py", "kind(text)"): ("stopped: rank <n>: <type>: <message>",),  # RankFailure; others: again
    ("cipo_fast/embedded/__main__.py", "line"): (),  # those of prepare
    ("cipo_fast/errors.py", "error.line"): (),  # these here
    ("cipo_fast/errors.py", "interrupted"): ("interrupted: the same command goes on from <where it was>",),
    ("cipo_fast/experiment/runner.py", "received[0].name"): ("<signal>; the same command goes on",),
    ("cipo_fast/judge.py", "told"): (),  # those of verify/
    ("cipo_fast/judge.py", "r['why']"): (),
    ("cipo_fast/judge_view.py", "text"): (),
    ("cipo_fast/preemption.py", "signal.Signals(int(received)).name"): ("<signal>; the same command goes on",),
    ("cipo_fast/rollout/connection.py", "f'{self.url}/{path}: {_reason(error)}'"): ("...",),
    ("cipo_fast/rollout/vllm_server.py", "str(taken)"): (),  # that of server_process.refuse_taken
    ("cipo_fast/sampling.py", "errors[0] + (f\" (and {more} more row{'s' * (more > 1)})\" if more else '')"): (
        "<error of the first row>[ (and <n> more rows)]",
    ),
    ("cipo_fast/train.py", "line"): (),  # cautions, alarms
    ("cipo_fast/train.py", "f'{stop}; {failure}'"): ("<message>; <checkpoint> cannot be saved (<error>)",),
    ("cipo_fast/train.py", "type(stop)(f'{stop}; saved as {where}')"): ("stopped: <message>; saved as <checkpoint>",),
    ("cipo_fast/verify/code/__init__.py", "problem"): ("...",),
    ("cipo_fast/verify/code/__init__.py", "_line(why)"): (),  # those of its functions
    ("cipo_fast/verify/judging.py", "fault"): (),  # of math.check_gold
    ("cipo_fast/verify/math/__init__.py", "final.why"): ("...",),
    ("cipo_fast/verify/math/__init__.py", "str(error)"): (),  # a Refused
    ("cipo_fast/verify/math/__init__.py", "f'{_short(answer)}: {refused}'"): (),
    ("cipo_fast/verify/math/__init__.py", "judged.why"): (),
    ("cipo_fast/verify/math/compare.py", "str(told)"): (),  # a TooMuch
    ("cipo_fast/verify/sandbox/execution.py", "self._nest.close()"): (),  # the zygote's own last line
    ("cipo_fast/verify/sandbox/nest.py", "self.close()"): (),
    ("cipo_fast/verify/workers/dispatcher.py", "reason"): ("...",),
    ("cipo_fast/verify/workers/dispatcher.py", "message['why']"): (),  # again
    ("cipo_fast/verify/workers/pool.py", "_described(error)"): (),  # any exception's
    ("cipo_fast/verify/workers/pool.py", "str(failure)"): (),
    ("cipo_fast/verify/workers/pool.py", "tier.describe()"): (),
}
WRITTEN |= {  # what a run shows anyway
    ("cipo_fast/view.py", "self.title"): (),
    ("cipo_fast/view.py", "f'{line} ({seconds:.1f}s)'"): (),
    ("cipo_fast/view.py", "step_line(metrics, int(self.progress.tasks[0].total or 0))"): (),
    ("cipo_fast/train.py", "''"): (),
}
WRITTEN |= {  # `reason` is of _blocks
    ("cipo_fast/verify/code/program.py", f"reason or {words!r}"): ("...",)
    for words in ("no program: values, names or comments alone", "no program defines a function")
}
# Methods of a text, whose name is that of the text.
OF_TEXT = ("strip", "split", "rstrip", "splitlines", "replace", "removeprefix", "lower", "partition", "get", "decode")
# Names for what the source calls otherwise: a variable, an attribute, a function.
NAMES = {
    **{"_at": "where", "_kind": "kind", "_described": "error", "_reason": "error", "one_line": "error", "len": "n"},
    **{"sum": "n", "strerror": "error", "msg": "error", "problem": "error", "__name__": "type"},
    **{"b": "folder", "final": "checkpoint", "idle": "settings"},
}


@dataclass(frozen=True)
class Message:
    """`file` is relative to the repository; `front` is what a terminal prints before `text`."""

    file: str
    front: str
    text: str


@dataclass
class Found:
    messages: list[Message] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)  # "file:line: source" of what neither reading nor a table explains
    used: set[tuple[str, str]] = field(default_factory=set)  # keys of SEEN, UNSEEN and WRITTEN that were of use


def find(root: Path = SOURCE) -> Found:
    """All messages of the source tree `root`, in order of file and line, each text once a file."""
    found = Found()
    trees = {
        str(path.relative_to(root)): ast.parse(path.read_text(encoding="utf-8"))
        for folder in FOLDERS
        for path in sorted((root / folder).rglob("*.py"))
    }

    @cache
    def file(name: str, partly: bool = False) -> _File:
        return _File(name, trees, partly, file)

    for name in trees:
        file(name).read(found)
    return found


class _File:
    """A source file; `file` gives the others. `partly`: where a text is one of several, some may be unread."""

    def __init__(self, name: str, trees: dict[str, ast.Module], partly: bool, file: Callable[..., _File]):
        self.name, self.trees, self.partly, self.file = name, trees, partly, file
        self.nodes = list(ast.walk(trees[name]))
        self.parents = {child: node for node in self.nodes for child in ast.iter_child_nodes(node)}
        self.calls: dict[str, list[ast.Call]] = {}  # function or method -> its calls here
        for node in self.nodes:
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
                called = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
                self.calls.setdefault(called, []).append(node)
        self.functions = {node.name: node for node in self.nodes if isinstance(node, ast.FunctionDef)}
        self.imported = {
            alias.asname or alias.name: (str(node.module).replace(".", "/"), alias.name)
            for node in self.nodes
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }

    def read(self, found: Found) -> None:
        messages: list[Message] = []
        nodes = [node for node in self.nodes if isinstance(node, ast.Call | ast.Raise)]
        for node in sorted(nodes, key=lambda node: (node.lineno, node.col_offset)):
            front, said = self._said(node, found)
            if said is None:
                continue
            texts = self._written(said, found)
            if texts is None and (read := self.texts(said)) and all(map(_tells, read)):
                texts = read
            if texts is None:
                found.unread.append(f"{self.name}:{node.lineno}: {ast.unparse(node)}")
            else:
                messages += [Message(self.name, front, text) for text in texts]
        for function in LINES.get(self.name, ()):
            lines = [text for line in _lines(self.functions[function]) for text in self.texts(line) or []]
            messages += [Message(self.name, "", text) for text in lines if " " in text and _tells(text)]
        first: dict[str, Message] = {}
        for message in messages:
            if message.front or not message.text.startswith(NEWS):
                first.setdefault(message.text, message)
        found.messages += first.values()

    def _said(self, node: ast.Call | ast.Raise, found: Found) -> tuple[str, ast.expr | None]:
        """(what stands in front of what is said here, what is said), None where nothing new is."""
        if isinstance(node, ast.Raise):
            raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            name = "" if raised is None else ast.unparse(raised)
            again = raised is node.exc and name.islower()  # what was made before, by a call
            return "", None if again or self._row(name, found) or self._makes(name, found) else node.exc
        key = self._row(ast.unparse(node.func), found)
        if key in SEEN:
            place = 1 if key[0] in ("PydanticCustomError", "Judgement") else 0
            return SEEN[key], node.args[place] if len(node.args) > place else None
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)
        return "", node.args[0] if name in SAYS and node.args else None

    def _row(self, name: str, found: Found) -> tuple[str, str] | None:
        """The key of SEEN or UNSEEN that an exception class falls under."""
        keys = [key for key in (*SEEN, *UNSEEN) if key[0] in ("", name) and self.name.startswith(key[1])]
        if not keys:
            return None
        key = max(keys, key=lambda key: len(key[1]))
        found.used.add(key)
        return key

    def _makes(self, name: str, found: Found) -> bool:
        """Whether a function of this file makes an exception of the tables, for its caller to raise."""
        calls = [n for n in ast.walk(self.functions[name]) if isinstance(n, ast.Call)] if name in self.functions else []
        return any(self._row(ast.unparse(call.func), found) for call in calls)

    def _written(self, said: ast.expr, found: Found) -> list[str] | None:
        key = next((key for key in WRITTEN if key[0] == self.name and _same(key[1], said)), None)
        if key is None:
            return None
        found.used.add(key)
        read = self.file(self.name, True).texts(said) if "..." in WRITTEN[key] else []
        return [*(text for text in WRITTEN[key] if text != "..."), *(read or [])]

    # ------------------------------------------------------------------------------------------------ what it says

    def texts(self, node: ast.expr, depth: int = 0) -> list[str] | None:
        """What an expression may say; None where that cannot be read."""
        match node:
            case ast.Constant(value=str(text)):
                return [text]
            case ast.JoinedStr(values=parts):
                return _joined([self._part(part, depth) for part in parts])
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                both = [texts for part in (left, right) if (texts := self.texts(part, depth))]
                return _joined(both) if len(both) == 2 else None
            case ast.IfExp(body=body, orelse=other):
                return self._any((body, other), depth)
            case ast.BoolOp(op=ast.Or(), values=values):
                return self._any(values, depth)
            case ast.Name() if depth < DEEPEST:
                return self._any(list(self._values(node)), depth + 1)
            case ast.Call(func=ast.Name(id=name)) if depth < DEEPEST and name != "_kind":
                return self._returned(name, depth + 1)
        return None

    def _any(self, nodes: Sequence[ast.expr], depth: int) -> list[str] | None:
        """What several say, None left out."""
        said = [self.texts(n, depth) for n in nodes if not (isinstance(n, ast.Constant) and n.value is None)]
        found = [text for texts in said if texts for text in texts]
        return list(dict.fromkeys(found)) if found and (self.partly or all(said)) else None

    def _returned(self, name: str, depth: int) -> list[str] | None:
        """What a function says that this file defines or imports."""
        home, name = self._home(name)
        if home is None or name not in home.functions:
            return None
        returns = [n.value for n in ast.walk(home.functions[name]) if isinstance(n, ast.Return) and n.value is not None]
        return home._any(returns, depth)

    def _home(self, name: str) -> tuple[_File | None, str]:
        """The file that defines a name, and what it is called there."""
        if name not in self.imported:
            return self, name
        module, name = self.imported[name]
        module = module.replace("cipo_kernels", "kernels")
        file = next((file for file in (f"{module}.py", f"{module}/__init__.py") if file in self.trees), None)
        return self.file(file, self.partly)._home(name) if file else (None, name)

    def _values(self, name: ast.Name) -> Iterator[ast.expr]:
        """What a name is set to in the function around it: assigned, by a loop over rows, or by a call in this file."""
        scope: ast.AST = name
        while not isinstance(scope, ast.FunctionDef | ast.Module):
            scope = self.parents[scope]
            if any(name.id in map(ast.unparse, ast.walk(part.target)) for part in getattr(scope, "generators", ())):
                return  # a comprehension's own
        for node in ast.walk(scope):
            if isinstance(node, ast.Assign):
                yield from (value for target, value in _pairs(node.targets[0], node.value) if target == name.id)
            elif isinstance(node, ast.NamedExpr) and node.target.id == name.id:
                yield node.value
            elif isinstance(node, ast.For):
                rows = (pair for row in self._rows(node.iter) for pair in _pairs(node.target, row))
                yield from (value for target, value in rows if target == name.id)
        if isinstance(scope, ast.FunctionDef):
            yield from self._given(scope, name.id)

    def _rows(self, node: ast.expr) -> list[ast.expr]:
        """What a loop goes over: a tuple as it stands there, or the items of this module's dict."""
        match node:
            case ast.Tuple(elts=rows):
                return rows
            case ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr="items")):
                for target, value in self._assigned():
                    if target == name and isinstance(value, ast.Dict):
                        pairs = zip(value.keys, value.values, strict=True)
                        return [ast.Tuple([key or value, value]) for key, value in pairs]
        return []

    def _assigned(self) -> Iterator[tuple[str, ast.expr]]:
        """(name, value) of the module's own assignments."""
        for node in self.trees[self.name].body:
            if isinstance(node, ast.Assign):
                yield from _pairs(node.targets[0], node.value)

    def _given(self, function: ast.FunctionDef, parameter: str) -> Iterator[ast.expr]:
        """What calls in this file give a parameter."""
        names = [argument.arg for argument in function.args.args if argument.arg != "self"]
        if parameter not in names:
            return
        place = names.index(parameter)
        for call in self.calls.get(function.name, []):
            yield from call.args[place : place + 1]
            yield from (keyword.value for keyword in call.keywords if keyword.arg == parameter)

    def _part(self, part: ast.expr, depth: int) -> list[str]:
        """A piece of an f-string: its text, a constant's value, the words that a field stands for, or its <name>."""
        if not isinstance(part, ast.FormattedValue):
            return self.texts(part, depth) or [""]
        value = self._constant(part.value)
        if value is not None:
            return [format(value, "".join(self.texts(part.format_spec) or "") if part.format_spec else "")]
        words = self.texts(part.value, depth + 1)
        if words and len(words) <= MOST and any(" " in text.strip() or not text for text in words):
            return words
        return [f"'<{_name(part.value)}>'" if part.conversion == ord("r") else f"<{_name(part.value)}>"]

    def _constant(self, node: ast.expr) -> str | int | float | None:
        """The value of a name in capitals; of several texts joined, all."""
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Constant(value=str(between)), attr="join"), args=[ast.Name(id)]):
                values = self._module_level(id)
                return between.join(map(str, values)) if isinstance(values, tuple | list) else None
            case ast.Name(id):
                value = self._module_level(id)
                return value if isinstance(value, str | int | float) else None
        return None

    def _module_level(self, name: str) -> object:
        home, name = self._home(name)
        if home is None or not name.isupper():
            return None
        for target, value in home._assigned():
            if target == name:
                with suppress(ValueError):  # no literal
                    return ast.literal_eval(value)
        return None


def _same(source: str, node: ast.expr) -> bool:
    """Whether a node is that expression, however this Python would write it."""
    return ast.dump(ast.parse(source, mode="eval").body) == ast.dump(node)


def _tells(text: str) -> bool:
    """Whether it has words of its own to be found by."""
    return re.search("[A-Za-z]{2}", re.sub("<.*?>", "", text)) is not None


def _pairs(target: ast.expr, value: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    """(name, what it is set to) of an assignment, also of several at once."""
    if isinstance(target, ast.Name):
        yield target.id, value
    elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
        for one, its in zip(target.elts, value.elts, strict=True):
            yield from _pairs(one, its)


def _lines(function: ast.FunctionDef) -> Iterator[ast.expr]:
    """The texts that a function returns, alone or in something else, or appends to a list."""
    for node in ast.walk(function):
        if isinstance(node, ast.Return) and node.value is not None:
            yield from _outermost(node.value)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "append":
            yield from node.args


def _outermost(node: ast.expr | ast.keyword) -> Iterator[ast.expr]:
    if isinstance(node, ast.Constant | ast.JoinedStr | ast.IfExp | ast.BinOp | ast.Name):
        yield node
    else:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr | ast.keyword):
                yield from _outermost(child)


def _joined(parts: Sequence[list[str]]) -> list[str]:
    """All ways to choose of each part. What may be left out is in brackets, and choices too many stand side by side."""
    parts = [["[" + " | ".join(filter(None, part)) + "]"] if "" in part[:-1] + part[1:] else part for part in parts]
    if prod(map(len, parts)) > MOST:
        parts = [part if len(part) == 1 else ["(" + " | ".join(part) + ")"] for part in parts]
    texts = ("".join(choice) for choice in product(*parts))
    return [re.sub(r"(<\w+>)\1", r"\1", text) for text in texts]


def _name(node: ast.AST) -> str:
    """A field as a word: {config.run_dir} is run_dir, {len(rows)} n, {', '.join(names[:3])} names."""
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return NAMES.get(name) or name.strip("_").lower()
        case ast.Subscript(slice=ast.Constant(value=str(name))):
            return NAMES.get(name) or name.lower()
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)) if name in NAMES:
            return NAMES[name]
        case ast.Call(func=ast.Attribute(value=value, attr=name)) if name in OF_TEXT and not isinstance(
            value, ast.Constant
        ):
            return _name(value)
        case ast.Call(func=ast.Attribute(attr=name)) if name not in (*OF_TEXT, "join", "dumps", "repr"):
            return name.strip("_").lower()
        case ast.Call(func=ast.Name(id=name), args=[]):
            return name.lower()
        case ast.Call(args=[first, *_]):
            return _name(node.args[-1] if isinstance(node.func, ast.Name) else first)
        case ast.GeneratorExp(generators=[first, *_]) | ast.ListComp(generators=[first, *_]):
            return _name(first.iter)
        case ast.Subscript(value=inner) | ast.Starred(value=inner) | ast.FormattedValue(value=inner):
            return _name(inner)
        case ast.BinOp(left=inner) | ast.IfExp(body=inner) | ast.BoolOp(values=[inner, *_]) | ast.List([inner, *_]):
            return _name(inner)
    return "value"
