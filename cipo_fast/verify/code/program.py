"""The program of a response: which text of an answer is run, and under which name.

Policy. Only what follows the last `</think>` counts; an unclosed `<think>` is no answer. Of the closed fenced blocks
that are tagged python (py, python3) or not at all, and that parse, the last that defines the entry point is the
program. Without an entry point it is the last that is no usage example: a block of bare values, or one that uses what
only an earlier block defines. Blocks are never joined. Without a fence the whole text is the program if it parses.
Where the prompt is code (HumanEval), a function body completes it, and a whole program stands below the prompt's
imports and helpers.
"""

from __future__ import annotations

import ast
import re
import textwrap
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cipo_fast.verify.statements import top_level

MAX_RESPONSE = 1_000_000  # characters
MAX_PROGRAM = 200_000  # characters: parsing takes about 1 s and 200 MB at worst
MAX_BLOCKS = 100  # the last ones
MAX_LONGER = 8  # closing fences that are tried as text of a block which does not parse, in all of a response
MAX_BASES = 8  # a class's bases, and theirs, that are looked into
BOM = "\ufeff"
PYTHON = {"", "python", "py", "python3", "py3"}
FENCE = re.compile(r"^([ \t]*)(`{3,}|~{3,})[ \t]*([^\n`]*)$")
# A function is called, so its program is no script: what stands under `if __name__ == "__main__"` is not run.
NO_SCRIPT = '__name__ = "program"; __import__("sys").modules["program"] = __import__("sys").modules["__main__"]'
Function = ast.FunctionDef | ast.AsyncFunctionDef


class Unparsable(Exception):
    """There is no program in the response; the message says why."""


@dataclass(frozen=True)
class Program:
    """`text` is run; `entry_point` is the name to call, None where a program reads stdin."""

    text: str
    entry_point: str | None = None


@dataclass(frozen=True)
class _Block:
    text: str
    tree: ast.Module


def stdin_program(response: str) -> Program:
    """The program of a response that reads stdin. Raises Unparsable."""
    blocks, reason = _blocks(answer_text(response))
    blocks = [block for n, block in enumerate(blocks) if _acts(block.tree) and not _uses_earlier(blocks, n)]
    if not blocks:
        raise Unparsable(reason or "no program: values, names or comments alone")
    return Program(blocks[-1].text)


def function_program(response: str, entry_point: str | None, prompt: str = "") -> Program:
    """The program of a response that defines `entry_point`, by itself or as a method of `class Solution`, or that
    completes the code in `prompt`. Without a name: the one function of the program that no other of it uses. Raises
    Unparsable."""
    text = answer_text(response)
    blocks, reason = _blocks(text)
    if entry_point is None:
        return _nameless([block for block in blocks if _functions(block.tree)], reason)
    defining = [block for block in blocks if _home(block.tree, entry_point)]
    preamble = prompt_preamble(prompt, entry_point)
    if defining:
        block = defining[-1]
        return Program(_below(f"{NO_SCRIPT}\n{preamble or ''}", block.text), entry_point)
    if preamble is not None:
        completed = _completed(text, prompt, entry_point)
        if completed is not None:
            return Program(_below(NO_SCRIPT, completed), entry_point)
    acting = [block for block in blocks if _acts(block.tree)]
    if not acting:
        raise Unparsable(reason or "no program: values, names or comments alone")
    raise Unparsable(f"no program defines {entry_point}")


def prompt_preamble(prompt: str, entry_point: str) -> str | None:
    """What stands before the entry point in a prompt that is code: imports and helpers. None where it is not code."""
    if f"def {entry_point}" not in prompt:
        return None
    tree = _tree(prompt + "\n    pass\n")[0]
    if tree is None or not tree.body or getattr(tree.body[-1], "name", None) != entry_point:
        return None
    last = tree.body[-1]
    first = min([last.lineno, *(d.lineno for d in getattr(last, "decorator_list", []))])
    return "".join(prompt.splitlines(keepends=True)[: first - 1])


def answer_text(response: str) -> str:
    """What follows the thinking. Raises Unparsable where it has no end, or for what cannot be a program at all."""
    if len(response) > MAX_RESPONSE:
        raise Unparsable(f"{len(response)} characters: at most {MAX_RESPONSE} are read")
    text = response.removeprefix(BOM).rpartition("</think>")[2].removeprefix(BOM)
    if "<think>" in text:
        raise Unparsable("the answer ends inside <think>")
    if not text.strip():
        raise Unparsable("empty answer")
    return text.replace("\r\n", "\n")


def fenced(text: str) -> str:
    """A closed block around a program, its fence longer than any inside."""
    longest = max((len(run) for run in re.findall(r"`{3,}", text)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}python\n{text.rstrip()}\n{fence}"


def _blocks(text: str) -> tuple[list[_Block], str]:
    """The blocks that parse, and why the last one that does not, does not."""
    texts = _fenced_blocks(text) if _has_fence(text) else [text]
    if not texts:
        return [], "no closed block of Python"
    blocks, reason = [], ""
    for content in texts[-MAX_BLOCKS:]:
        tree, why = _tree(content)
        if tree is None and content[:1].isspace():  # all of it may be indented
            content = textwrap.dedent(content)
            tree, why = _tree(content)
        if tree is None:
            reason = why
        else:
            blocks.append(_Block(content, tree))
    return blocks, reason


def _has_fence(text: str) -> bool:
    return any(FENCE.match(line) for line in text.split("\n"))


def _fenced_blocks(text: str) -> list[str]:
    """Contents of the closed blocks that may be Python, in order. A block inside a list item loses its indentation. A
    fence within a text of the program, such as a docstring with an example, does not close it."""
    found: list[str] = []
    lines, n, budget = text.split("\n"), 0, MAX_LONGER
    while n < len(lines):
        opened = FENCE.match(lines[n])
        n += 1
        if opened is None:
            continue
        ends = _closing(lines, n, opened[2])
        end = next(ends, None)
        if end is None:
            break
        if _tag(opened[3]) in PYTHON:
            content = _content(lines[n:end], opened[1])
            longer = content
            while budget and ('"""' in longer or "'''" in longer) and not _parses(longer):
                budget -= 1
                later = next(ends, None)
                if later is None:
                    break
                longer = _content(lines[n:later], opened[1])
                if _parses(longer):
                    content, end = longer, later
            found.append(content)
        n = end + 1
    return found


def _closing(lines: list[str], start: int, fence: str) -> Iterator[int]:
    """Where the lines from `start` on close a block."""
    for n in range(start, len(lines)):
        match = FENCE.match(lines[n])
        if match and match[2].startswith(fence) and not match[3].strip():
            yield n


def _content(lines: list[str], indentation: str) -> str:
    return "\n".join(line.removeprefix(indentation) for line in lines).removeprefix(BOM) + "\n"


def _parses(content: str) -> bool:
    return _tree(content)[0] is not None or _tree(textwrap.dedent(content))[0] is not None


def _tag(info: str) -> str:
    words = info.strip().strip("{}.").split()
    return words[0].lower() if words else ""


def _tree(text: str) -> tuple[ast.Module | None, str]:
    """The syntax tree of a program, or None and why there is none."""
    if len(text) > MAX_PROGRAM:
        return None, f"a program of {len(text)} characters: at most {MAX_PROGRAM} are read"
    if "\0" in text:
        return None, "a NUL byte in the program"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
            compile(tree, "<program>", "exec", dont_inherit=True)  # finds a `return` outside of a function
    except SyntaxError as error:
        return None, f"line {error.lineno}: {error.msg}"
    except UnicodeError:
        return None, "the program is no valid Unicode"
    except (ValueError, MemoryError, RecursionError):
        return None, "the program is nested too deeply"
    if not tree.body:
        return None, "only comments"
    return tree, ""


def _acts(tree: ast.Module) -> bool:
    """Whether a program does or defines anything: prose such as `yes`, or an output such as `[1, 2]`, does not."""
    idle = (ast.Constant, ast.Name, ast.Tuple, ast.List, ast.Set, ast.Dict, ast.UnaryOp, ast.BinOp, ast.Compare)
    return any(
        not isinstance(node, ast.Pass) and not (isinstance(node, ast.Expr) and isinstance(node.value, idle))
        for node in tree.body
    )


def _uses_earlier(blocks: list[_Block], n: int) -> bool:
    """Whether block n uses a function or class that an earlier block defines and it does not."""
    own = _stored(blocks[n].tree)
    earlier = {name for block in blocks[:n] for name in _named(block.tree)} - own
    return any(
        isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in earlier
        for node in ast.walk(blocks[n].tree)
    )


def _named(tree: ast.Module) -> set[str]:
    return {node.name for node in tree.body if isinstance(node, Function | ast.ClassDef)}


def _stored(tree: ast.Module) -> set[str]:
    """Every name that is bound anywhere in a program."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, Function | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.alias):
            names.add((node.asname or node.name).split(".")[0])
    return names


def _home(tree: ast.Module, name: str) -> str:
    """Where a program has a name: `module`, `Solution`, or "" for nowhere."""
    home = ""
    for node in top_level(tree.body):
        if isinstance(node, ast.ClassDef) and node.name == "Solution" and name in _methods(node, tree):
            home = home or "Solution"
        elif name in _bound(node):
            home = "module"
    return home


def _bound(node: ast.stmt) -> set[str]:
    if isinstance(node, Function | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return {part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)}
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {alias.asname or alias.name for alias in node.names}
    return set()


def _methods(node: ast.ClassDef, tree: ast.Module, depth: int = 0) -> dict[str, ast.AST]:
    """The methods of a class, its functions and lambdas, and those of bases that the program defines."""
    found: dict[str, ast.AST] = {}
    bases = {base.id for base in node.bases if isinstance(base, ast.Name)} if depth < MAX_BASES else set()
    for other in tree.body:
        if isinstance(other, ast.ClassDef) and other.name in bases and other is not node:
            found |= _methods(other, tree, depth + 1)
    for part in node.body:
        if isinstance(part, Function):
            found[part.name] = part
        elif isinstance(part, ast.Assign | ast.AnnAssign) and isinstance(part.value, ast.Lambda):
            found |= dict.fromkeys(_bound(part), part.value)
    return found


def _functions(tree: ast.Module) -> dict[str, ast.AST]:
    """The functions that a test could mean: of the module, or public methods of `class Solution`."""
    solutions = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Solution"]
    found = _methods(solutions[-1], tree) if solutions else {n.name: n for n in tree.body if isinstance(n, Function)}
    return {name: node for name, node in found.items() if not name.startswith("_")}


def _nameless(blocks: list[_Block], reason: str) -> Program:
    """The last block that defines functions, by the one that no other uses."""
    if not blocks:
        raise Unparsable(reason or "no program defines a function")
    block = blocks[-1]
    functions = _functions(block.tree)
    used = {
        node.id if isinstance(node, ast.Name) else node.attr
        for name, function in functions.items()
        for node in ast.walk(function)
        if isinstance(node, ast.Name | ast.Attribute) and name != (node.id if isinstance(node, ast.Name) else node.attr)
    }
    left = [name for name in functions if name not in used]
    if len(left) != 1:
        raise Unparsable(f"{len(functions)} functions in the program, and the row names no entry_point")
    return Program(_below(NO_SCRIPT, block.text), left[0])


def _below(preamble: str, text: str) -> str:
    """A program with lines before it, its `from __future__` lines still first."""
    tree = _tree(text)[0]
    future = [n for n in tree.body if isinstance(n, ast.ImportFrom) and n.module == "__future__"] if tree else []
    if not future:
        return f"{preamble}\n{text}"
    lines = text.split("\n")
    end = future[-1].end_lineno or 0
    return "\n".join([*lines[:end], preamble, *lines[end:]])


def _completed(text: str, prompt: str, entry_point: str) -> str | None:
    """The prompt with a function body from the answer: as it stands, with its first line indented, or all of it. What
    follows the body and does not parse is cut off, as the usual stop words would have done."""
    bodies = _fenced_blocks(text)[-MAX_BLOCKS:] if _has_fence(text) else [text]
    forms: list[Callable[[str], str]] = [
        lambda body: body,
        lambda body: "    " + body.lstrip(" \t"),
        lambda body: textwrap.indent(body, "    "),
    ]
    for body in reversed(bodies):
        for part in (body, _body_alone(body)):
            for form in forms:
                whole = f"{prompt.rstrip()}\n{form(part.strip(chr(10)))}\n"
                if _adds_a_body(whole, prompt, entry_point):
                    return whole
    return None


def _body_alone(text: str) -> str:
    """The lines up to the first that is neither empty nor indented, the first line aside."""
    lines = text.strip("\n").split("\n")
    for n, line in enumerate(lines):
        if n and line.strip() and not line[0].isspace():
            return "\n".join(lines[:n])
    return text


def _adds_a_body(whole: str, prompt: str, entry_point: str) -> bool:
    """Whether the function goes on after the prompt's last line with a statement that does something."""
    tree = _tree(whole)[0]
    if tree is None:
        return False
    last_line = prompt.rstrip().count("\n") + 1
    for node in tree.body:
        if isinstance(node, Function) and node.name == entry_point:
            added = [part for part in node.body if part.lineno > last_line]
            return _acts(ast.Module(added, []))
    return False
