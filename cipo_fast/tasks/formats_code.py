"""Public sets of programming problems, as their hubs have them -> Draft, its tests in the code verifier's form."""

from __future__ import annotations

import ast
import json
import re
from typing import Any

from cipo_fast.config import DataConfig
from cipo_fast.errors import UserError
from cipo_fast.tasks.fields import Draft, Record, Unusable, as_text, identity, list_field, plain, text_field, user_turn
from cipo_fast.tasks.packed import unpacked


def read_humaneval(record: Record, where: str, data: DataConfig) -> Draft:
    """HumanEval and HumanEval+: a function's beginning to complete, `check(candidate)`; `test` of the latter has both
    sets of tests."""
    fields = {name: text_field(record, where, name) for name in ("prompt", "entry_point", "test")}
    if record.get("canonical_solution") is not None:
        fields["canonical_solution"] = as_text(record["canonical_solution"], where, "canonical_solution")
    asked = (
        f"Complete this function. Repeat its beginning in your program.\n\n```python\n{fields['prompt'].rstrip()}\n```"
    )
    return Draft(user_turn(asked), "code", fields=fields, id=identity(record, where, "task_id", "id"))


def read_mbpp(record: Record, where: str, data: DataConfig) -> Draft:
    """MBPP and MBPP+. `test` of the latter is its suite, `test_list` the base tests alone; the first of them is shown,
    for it says what the function is called and takes."""
    question = text_field(record, where, "prompt", "text")
    shown = [as_text(test, where, "test_list") for test in list_field(record, where, "test_list")]
    set_up = record.get("test_imports") or record.get("test_setup_code") or []
    before = [as_text(line, where, "test_imports") for line in (set_up if isinstance(set_up, list) else [set_up])]
    if record.get("test") is not None:
        test = as_text(record["test"], where, "test")
    else:
        test = "\n".join(shown)
    if before and not all(line in test for line in before):
        test = "\n".join([*before, test])
    code = text_field(record, where, "code")
    name = _tested_function(code, shown[0]) or _tested_function(code, test)
    if name is None:
        raise UserError(f"{where}: field 'code' defines no function that 'test_list' calls")
    fields = {"entry_point": name, "test": test, "solution": code}
    asked = f"{question}\n\nYour program must define `{name}`, for which this holds:\n\n```python\n{shown[0]}\n```"
    return Draft(user_turn(asked), "code", fields=fields, id=_task_id(record, where))


def read_livecodebench(record: Record, where: str, data: DataConfig) -> Draft:
    """Public and private tests together. `starter_code` is shown; its function, or a program on stdin, is called."""
    question = text_field(record, where, "question_content")
    tests = _lcb_tests(record, where)
    kinds = {test.get("testtype") for test in tests}
    fields: dict[str, Any] = {}
    if kinds == {"functional"}:
        fields = {"tests": [_call(test, where) for test in tests], "entry_point": _function_name(record, where)}
        starter = text_field(record, where, "starter_code")
        asked = f"{question}\n\nBegin with this:\n\n```python\n{starter.rstrip()}\n```"
    elif kinds == {"stdin"}:
        fields = {"tests": [{"stdin": _of(t, "input", where), "stdout": _of(t, "output", where)} for t in tests]}
        asked = f"{question}\n\nThe program reads standard input and writes standard output."
    else:
        raise UserError(
            f"{where}: field 'testtype' of its tests is {sorted(map(str, kinds))}: expected functional or stdin"
        )
    return Draft(user_turn(asked), "code", fields=fields, id=identity(record, where, "question_id"))


def read_debugbench(record: Record, where: str, data: DataConfig) -> Draft:
    """A program with a bug to correct. Its official scoring is LeetCode's own judge: only the statement's `examples`
    can be run here, of the Python programs, where they are values that a call takes."""
    question, buggy = text_field(record, where, "question"), text_field(record, where, "buggy_code")
    language = text_field(record, where, "language")
    if language.lower() not in ("python", "python3", "py"):
        raise Unusable(f"a program in {language}: only Python can be run")
    solution = text_field(record, where, "solution")
    if re.search(r"\b(ListNode|TreeNode|Node)\b", solution):
        raise Unusable("it works on lists of nodes or trees, which its examples only draw")
    examples = [as_text(example, where, "examples") for example in list_field(record, where, "examples")]
    tests = [test for test in map(_example, examples) if test is not None]
    if len(tests) < len(examples):
        raise Unusable("its examples are no calls with values")
    limits = record.get("constraints")
    limits = f"\n\nConstraints:\n{limits}" if isinstance(limits, str) and limits.strip() else ""
    stated = "\n\n".join(examples)
    asked = f"{question}\n\n{stated}{limits}\n\nThis program is wrong. Correct it:\n\n```python\n{buggy.strip()}\n```"
    fields = {"tests": tests, "solution": solution}
    return Draft(user_turn(asked), "code", fields=fields, id=_debug_id(record, where))


# ---------------------------------------------------------------------------------------------------------------- MBPP


def _task_id(record: Record, where: str) -> str | None:
    name = identity(record, where, "task_id")
    return f"mbpp/{name}" if name else None


def _tested_function(code: str, test: str) -> str | None:
    """The function of `code` that `test` calls first."""
    try:
        defined = {node.name for node in ast.parse(code).body if isinstance(node, ast.FunctionDef)}
        calls = [node for node in ast.walk(ast.parse(test)) if isinstance(node, ast.Call)]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    named = [
        (n.lineno, n.col_offset, n.func.id) for n in calls if isinstance(n.func, ast.Name) and n.func.id in defined
    ]
    return min(named)[2] if named else None


# ------------------------------------------------------------------------------------------------------- LiveCodeBench


def _lcb_tests(record: Record, where: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for name in ("public_test_cases", "private_test_cases"):
        if record.get(name) is None:
            raise UserError(f"{where}: field {name!r} is missing")
        tests = record[name]
        if isinstance(tests, str):
            tests = unpacked(tests, where, name) if tests.strip() else []
        tests = plain(tests, where, name)
        if not isinstance(tests, list) or not all(isinstance(test, dict) for test in tests):
            raise UserError(f"{where}: field {name!r} is not a list of tests")
        found += tests
    if not found:
        raise UserError(f"{where}: fields 'public_test_cases' and 'private_test_cases' hold no test")
    return found


def _of(test: dict[str, Any], name: str, where: str) -> str:
    if not isinstance(test.get(name), str):
        raise UserError(f"{where}: a test's {name!r} is missing or no text")
    return str(test[name])


def _call(test: dict[str, Any], where: str) -> dict[str, Any]:
    """An argument a line, each JSON."""
    try:
        args = [json.loads(line) for line in _of(test, "input", where).split("\n") if line.strip()]
        return {"args": args, "expected": json.loads(_of(test, "output", where))}
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: a test's input or output is not JSON, one value a line ({error})") from None


def _function_name(record: Record, where: str) -> str:
    metadata = record.get("metadata")
    if isinstance(metadata, str):
        try:
            metadata = json.loads(metadata)
        except ValueError:
            metadata = None
    name = metadata.get("func_name") if isinstance(metadata, dict) else None
    if not isinstance(name, str) or not name.isidentifier():
        raise UserError(f"{where}: field 'metadata.func_name' is missing: functional tests need it")
    return name


# ---------------------------------------------------------------------------------------------------------- DebugBench


def _debug_id(record: Record, where: str) -> str | None:
    parts = [record.get(name) for name in ("slug", "category", "subtype")]
    return "/".join(str(part) for part in parts if part) or None


def _example(text: str) -> dict[str, Any] | None:
    """`Input: nums = [1,2], k = 3  Output: 4 ...` as a call with its values in order, or None."""
    match = re.search(r"Input:?\s*(.*?)\s*Output:?\s*(.*?)\s*(?:Explanation:?.*)?\Z", text, re.S)
    if match is None:
        return None
    try:
        call = ast.parse(f"f({match[1]})", mode="eval").body
        assert isinstance(call, ast.Call)
        if call.args or not call.keywords:
            return None
        args = [_value(keyword.value) for keyword in call.keywords]
        return {"args": args, "expected": _value(ast.parse(match[2].strip(), mode="eval").body)}
    except (SyntaxError, ValueError, RecursionError, MemoryError, AssertionError):
        return None


def _value(node: ast.expr) -> Any:
    """A literal, with JSON's names for what Python calls otherwise. Raises ValueError."""
    names = {"true": True, "false": False, "null": None}
    if isinstance(node, ast.Name) and node.id in names:
        return names[node.id]
    if isinstance(node, ast.List):
        return [_value(item) for item in node.elts]
    value = ast.literal_eval(node)
    if not isinstance(value, str | int | float | bool | None):
        raise ValueError("no JSON value")
    return value
