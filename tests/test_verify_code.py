"""Code through the sandbox: calls, stdin, suites; what decides, what it is called, and what a row must have."""

from collections.abc import Iterator
from typing import Any

import pytest

from cipo_fast.config import SandboxConfig
from cipo_fast.verify import VerifierFailure, code
from cipo_fast.verify.code.program import fenced
from cipo_fast.verify.sandbox import Result, Sandbox


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(SandboxConfig(cpu_s=2, memory_mib=512)) as sandbox:
        yield sandbox


def calls(*pairs: tuple[list[Any], Any], **fields: Any) -> dict[str, Any]:
    return {"verifier": "code", "tests": [{"args": args, "expected": expected} for args, expected in pairs], **fields}


def stdin(*pairs: tuple[str, str]) -> dict[str, Any]:
    return {"verifier": "code", "tests": [{"stdin": given, "stdout": wanted} for given, wanted in pairs]}


ADD = calls(([1, 2], 3), ([-5, 5], 0), ([10, 4], 14), entry_point="add")
SUM = stdin(("3\n1 2 3\n", "6\n"), ("1\n-4", "-4\n"))
CHECK = {
    "verifier": "code",
    "prompt": "from typing import List\n\ndef shift(s: str):\n    return s[1:] + s[:1]\n\ndef back(s: List[str]):\n"
    '    """Undo shift."""\n',
    "entry_point": "back",
    "test": "METADATA = {'author': 'x'}\n\n\ndef check(candidate):\n    from random import choice\n"
    "    for word in ('abc', 'b', '', choice(['xyz', 'uv'])):\n        assert candidate(shift(word)) == word\n",
    "canonical_solution": "    return s[-1:] + s[:-1]\n",
}
PLUS = {
    "verifier": "code",
    "prompt": "Write a function to find shared elements.",
    "entry_point": "shared",
    "test": "import numpy as np\n\ndef is_floats(x) -> bool:\n    return isinstance(x, (float, np.ndarray))\n\n"
    "def assertion(out, exp, atol):\n    if atol == 0 and is_floats(exp):\n        atol = 1e-6\n"
    "    exact_match = out == exp\n"
    "    if out != exp and atol != 0:\n        assert np.allclose(out, exp, rtol=1e-07, atol=atol)\n    else:\n"
    "        assert out == exp, f'out: {out}, exp: {exp}'\n\n"
    "inputs = [[(3, 4, 5), (4, 5, 7)], [(1, 2), (3,)]]\nresults = [(4, 5), ()]\n"
    "for i, (inp, exp) in enumerate(zip(inputs, results)):\n    assertion(shared(*inp), exp, 0)\n",
    "solution": "def shared(a, b):\n    return tuple(sorted(set(a) & set(b)))\n",
}
MBPP = {
    "verifier": "code",
    "entry_point": "area",
    "test_imports": ["import math"],
    "test_list": ["assert math.isclose(area(2), math.pi * 4)", "assert area(0) == 0"],
    "solution": "import math\ndef area(r):\n    return math.pi * r * r",
}
SELF_CALLING = {**CHECK, "test": f"{CHECK['test']}\ncheck(back)\n"}

RIGHT = {
    "a call": (ADD, "def add(a, b):\n    return a + b\n"),
    "state between calls does not matter": (ADD, "n = 0\ndef add(a, b):\n    return a + b\n"),
    "prints as well": (ADD, "def add(a, b):\n    print('adding')\n    return a + b\n"),
    "exits under its main guard": (ADD, "def add(a, b):\n    return a + b\nif __name__ == '__main__':\n    exit(0)\n"),
    "a method": (ADD, "class Solution:\n    def add(self, a: int, b: int) -> Optional[int]:\n        return a + b\n"),
    "no name": (calls(([2], 4)), "def twice(n):\n    return 2 * n\n"),
    "a method without a name": (
        calls(([[1, 2]], 3)),
        "class Solution:\n    def f(self, xs: List[int]):\n        return sum(xs)",
    ),
    "keywords": (
        {"verifier": "code", "entry_point": "f", "tests": [{"args": [1], "kwargs": {"b": 2}, "expected": [1, 2]}]},
        "def f(a, *, b):\n    return a, b\n",
    ),
    "int keys": (
        calls((["aab"], {"1": "b", "2": "a"}), entry_point="f"),
        "def f(s):\n    return {s.count(c): c for c in s}",
    ),
    "numpy": (
        calls(([[1, 2, 3]], 6), entry_point="f"),
        "import numpy as np\ndef f(xs):\n    return np.sum(np.array(xs))",
    ),
    "a defaultdict": (
        calls((["aa"], {"a": 2}), entry_point="f"),
        "from collections import defaultdict\n"
        "def f(s):\n    d = defaultdict(int)\n    for c in s: d[c] += 1\n    return d",
    ),
    "stdin": (SUM, "input()\nprint(sum(map(int, input().split())))\n"),
    "fast stdin": (
        SUM,
        "import sys\nd = sys.stdin.buffer.read().split()\nsys.stdout.write(str(sum(map(int, d[1:]))))\n",
    ),
    "stdin by descriptor": (SUM, "import os\nprint(sum(map(int, os.read(0, 999).split()[1:])))\n"),
    "stdin by open(0)": (SUM, "print(sum(map(int, open(0).read().split()[1:])))\n"),
    "exits with 0": (SUM, "import sys\ninput()\nprint(sum(map(int, input().split())))\nsys.exit(0)\n"),
    "a main function": (
        SUM,
        "def main():\n    input()\n    print(sum(map(int, input().split())))\nif __name__ == '__main__':\n    main()\n",
    ),
    "recursion of 5,000": (
        calls(([5000], 5000), entry_point="f"),
        "import sys\nsys.setrecursionlimit(10**6)\ndef f(n):\n    return 1 + f(n - 1) if n else 0\n",
    ),
    "a suite": (CHECK, "def back(s):\n    return s[-1:] + s[:-1]\n"),
    "a suite that calls its check": (SELF_CALLING, "def back(s):\n    return s[-1:] + s[:-1]\n"),
    "a suite with numpy": (PLUS, PLUS["solution"]),
    "a list of asserts": (MBPP, MBPP["solution"]),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right(name: str, sandbox: Sandbox) -> None:
    row, program = RIGHT[name]
    assert code.check_row(row) is None
    judgement = code.judge(row, fenced(program), sandbox)
    assert judgement.verdict == "right", judgement


WRONG = {
    "third test": (ADD, "def add(a, b):\n    return min(a + b, 9)\n", "test 3: got 9"),
    "first test": (ADD, "def add(a, b):\n    return None\n", "test 1: got None"),
    "raises": (ADD, "def add(a, b):\n    return 1 / 0\n", "test 1: error: ZeroDivisionError"),
    "another name": (ADD, "def plus(a, b):\n    return a + b\n", None),
    "raises at import": (ADD, "def add(a, b):\n    return a + b\nraise ValueError('x')\n", "ValueError"),
    "exits in the call": (ADD, "def add(a, b):\n    raise SystemExit(0)\n", "test 1: error"),
    "a huge integer": (ADD, "def add(a, b):\n    return 10 ** 100000\n", "got an integer of"),
    "a long text": (ADD, "def add(a, b):\n    return 'x\\n\\x1b' * 5000\n", "test 1: got 'x"),
    "memory": (ADD, "x = [bytearray(1 << 30) for _ in range(9)]\ndef add(a, b): pass\n", "memory"),
    "right, then crashes": (SUM, "input()\nprint(sum(map(int, input().split())))\n1/0\n", "ZeroDivisionError"),
    "right, then exit 2": (SUM, "input()\nprint(sum(map(int, input().split())))\nexit(2)\n", "exit code 2"),
    "right, then killed": (
        SUM,
        "input()\nprint(sum(map(int, input().split())), flush=True)\nimport os\nos.kill(os.getpid(), 9)",
        "signal 9",
    ),
    "second test": (SUM, "print(6)\n", "test 2: line 1 is '6'"),
    "too much output": (SUM, "while True: print('6' * 999)\n", "output"),
    "lines missing": (stdin(("", "1\n2\n3\n")), "print(1)\nprint(2)\n", "2 lines for 3"),
    "a suite": (CHECK, "def back(s):\n    return s\n", "suite: error: AssertionError"),
    "a suite with numpy": (PLUS, "def shared(a, b):\n    return [4, 5]\n", "AssertionError"),
    "a suite that calls its check": (SELF_CALLING, "def back(s):\n    return s\n", "AssertionError"),
    "a list of asserts": (MBPP, "def area(r):\n    return r * r\n", "AssertionError"),
    "a list of asserts, second": (MBPP, "import math\ndef area(r):\n    return math.pi * 4\n", "AssertionError"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong(name: str, sandbox: Sandbox) -> None:
    row, program, why = WRONG[name]
    judgement = code.judge(row, fenced(program), sandbox)
    assert judgement.verdict == ("wrong" if why else "unparsable"), judgement
    assert why is None or why in judgement.why
    assert len(judgement.why) <= 200
    assert judgement.why.isprintable()


@pytest.mark.parametrize("row", [ADD, SUM, CHECK], ids=["calls", "stdin", "suite"])
def test_a_time_out_is_a_verdict(row: dict[str, Any], sandbox: Sandbox) -> None:
    program = "def add(a, b):\n    while True: pass\nback = add\n" if row is not SUM else "while True: pass\n"
    if row is CHECK:
        program = "def back(s):\n    while True: pass\n"
    assert code.judge(row, fenced(program), sandbox).verdict == "timeout"


GARBAGE = [
    "",
    "\x00\x01\xff" * 1000,
    "\ud800\udfff",
    "```python\n\ud800\n```",
    "```python\ndef add(a, b): return '\\ud800'\n```",
    "```python\ndef add(a, b):\n    return a +\n```",
    "`" * 100_000,
    "```\n" * 20_000,
    "```python\n" * 5_000 + "def add(a, b): return a + b\n" + "```\n" * 5_000,
    "def add(a, b): " * 10_000,
    "<think>" * 50_000,
    "```python\n" + "def add(a, b):\n    return " + "(" * 150 + "a" + ")" * 150 + "\n```",
    "```python\ndef add(a, b):\n    return " + "-" * 50_000 + "a\n```",
    "```python\ndef add(a, b):\n    return add(a, b)\n```",
    "```python\nimport itertools\ndef add(a, b):\n    return itertools.count()\n```",
    "```python\ndef add(a, b):\n    yield a + b\n```",
    "```python\nasync def add(a, b):\n    return a + b\n```",
    "```python\nadd = 3\n```",
    "```python\nfrom math import nonsense as add\n```",
    "z" * 10_000_000,
]


@pytest.mark.parametrize("row", [ADD, SUM, CHECK, MBPP], ids=["calls", "stdin", "suite", "asserts"])
def test_garbage_is_judged_and_earns_nothing(row: dict[str, Any], sandbox: Sandbox) -> None:
    for response in GARBAGE:
        judgement = code.judge(row, response, sandbox)
        assert judgement.verdict in ("wrong", "unparsable"), (response[:60], judgement)
        assert judgement.why
        assert len(judgement.why) <= 200
    assert code.judge(ADD, "def add(a, b): return a + b", sandbox).verdict == "right"


BAD_ROWS = {
    "no field": {},
    "empty": {"tests": []},
    "not a list": {"tests": {"args": [1]}},
    "is not an object": {"tests": [3]},
    "`args`": {"tests": [{"expected": 1}]},
    "test 2: `expected`": {"tests": [{"args": [1], "expected": 1}, {"args": [1]}]},
    "`stdout`": {"tests": [{"stdin": "1"}]},
    "`stdin`": {"tests": [{"stdin": 1, "stdout": "1"}]},
    "mixes": {"tests": [{"stdin": "1", "stdout": "1"}, {"args": [1], "expected": 1}]},
    "is not a name": {"tests": [{"args": [1], "expected": 1}], "entry_point": "a b"},
    "needs `entry_point`": {"test": "assert f(1) == 1"},
    "asserts nothing": {"test": "def check(candidate):\n    pass\n", "entry_point": "f"},
    "never uses": {"test": "def check(candidate):\n    assert g(1)\n", "entry_point": "f"},
    "no Python": {"test": "assert f(1) = 1", "entry_point": "f"},
    "neither text": {"test": 5, "entry_point": "f"},
    "neither": {"test_list": [], "entry_point": "f"},
}


@pytest.mark.parametrize("said", BAD_ROWS)
def test_a_row_that_cannot_be_judged_is_refused(said: str, sandbox: Sandbox) -> None:
    row = {"verifier": "code", **BAD_ROWS[said]}
    assert said in (code.check_row(row) or "")
    with pytest.raises(VerifierFailure, match=said.replace("`", ".")):
        code.judge(row, "def f(n): return n", sandbox)


def test_golds_are_right(sandbox: Sandbox) -> None:
    for row in (CHECK, PLUS, MBPP):
        assert code.judge(row, code.gold_response(row) or "", sandbox).verdict == "right"
    assert code.gold_response(ADD) is None


def suite(test: Any, name: str = "test") -> dict[str, Any]:
    return {"verifier": "code", "entry_point": "f", name: test}


NEVER_RUN = {
    "pytest": "def test_a():\n    assert f() == 1\n",
    "pytest class": "class TestF:\n    def test_a(self):\n        assert f() == 1\n",
    "unittest": "import unittest\nclass T(unittest.TestCase):\n    def test_a(self):\n"
    "        self.assertEqual(f(), 1)\n",
    "a main function": "def main():\n    assert f() == 1\n",
    "a main guard": "if __name__ == '__main__':\n    assert f() == 1\n",
    "functions that call each other": "def a():\n    assert f() == 1\ndef b():\n    a()\n",
    "an inner function": "def check(candidate):\n    def inner():\n        assert candidate() == 1\n",
    "a generator": "def check(candidate):\n    assert candidate() == 1\n    yield\n",
    "yields from": "def check(candidate):\n    assert candidate() == 1\n    yield from ()\n",
    "async": "async def check(candidate):\n    assert candidate() == 1\n",
    "no assertion": "def check(candidate):\n    candidate()\n",
    "a bool": "def check(candidate):\n    return candidate() == 1\n",
    "a print": "print(f() == 1)\n",
    "a tuple": "assert (f() == 1, 'm')\n",
    "true": "f()\nassert True\n",
}


@pytest.mark.parametrize("name", NEVER_RUN)
def test_a_suite_that_never_asserts_is_refused_by_its_text(name: str, sandbox: Sandbox) -> None:
    problem = code.check_row(suite(NEVER_RUN[name]))
    assert problem
    assert "\n" not in problem
    with pytest.raises(VerifierFailure):
        code.judge(suite(NEVER_RUN[name]), "def f(x=0): return 2", sandbox)


def test_a_list_of_tests_that_never_asserts_is_refused() -> None:
    for test in ("f(1) == 1", "def test():\n    assert f(1) == 1"):
        assert "`test`" in (code.check_row(suite([test], "test_list")) or "")
    assert "no field" in (code.check_row(suite(None)) or "")
    assert "no field" in (code.check_row(suite(None, "test_list")) or "")


NOTHING_SAID = {
    "no pairs": "for x, y in zip([1, 2], []):\n    assert f(x) == y\n",
    "swallowed": "try:\n    assert f() == 1\nexcept Exception:\n    pass\n",
    "of something else": "x = f()\ny = 1\nassert y == 1\n",
    "before any call": "n = 1\nassert n == 1\nf()\n",
    "not called": "assert callable(f)\n",
    "a dead branch": "x = f()\nif x == 'no':\n    assert x == 1\n",
    "an object": "assert isinstance(f(), object)\n",
    "a thread": "import threading\ndef g():\n    assert f() == 1\n"
    "t = threading.Thread(target=g)\nt.start()\nt.join()\n",
    "unittest's own runner": "import unittest\nclass T(unittest.TestCase):\n    def test_a(self):\n"
    "        assert f() == 1\nunittest.TextTestRunner().run(T('test_a')) if T.test_a else 0\n",
}


@pytest.mark.parametrize("name", NOTHING_SAID)
def test_a_suite_that_could_not_fail_says_nothing(name: str, sandbox: Sandbox) -> None:
    row = suite(NOTHING_SAID[name])
    assert code.check_row(row) is None
    with pytest.raises(VerifierFailure, match="nothing can be said"):
        code.judge(row, "def f(x=0): return 2", sandbox)


ASSERTS = {
    "any parameter": "def check(fn):\n    assert fn() == 2\n",
    "no parameter": "def check():\n    assert f() == 2\n",
    "called in a guard": "def check(c):\n    assert c() == 2\nif __name__ == '__main__':\n    check(f)\n",
    "a called test": "def test_a():\n    assert f() == 2\ntest_a()\n",
    "looked up": "def test_a():\n    assert f() == 2\nfor n in [*globals()]:\n    n == 'test_a' and globals()[n]()\n",
    "a helper": "def assertion(a, b):\n    assert a == b\ndef check(candidate):\n    assertion(candidate(), 2)\n",
    "a raise": "if f() != 2:\n    raise ValueError\n",
    "numpy": "import numpy as np\nnp.testing.assert_allclose(f(), 2)\n",
    "an exception": "try:\n    f(1, 2)\nexcept TypeError:\n    pass\nelse:\n    assert False\n",
    "unequal": "assert f() != 5\n",
    "true": "assert f()\n",
    "not none": "assert f() is not None\n",
    "a message": "assert f() == 2, f'not {f()}'\n",
    "a future": "from __future__ import annotations\nassert f() == 2\n",
}


@pytest.mark.parametrize("name", ASSERTS)
def test_every_way_to_assert_counts(name: str, sandbox: Sandbox) -> None:
    assert code.judge(suite(ASSERTS[name]), "def f(x=0): return 2", sandbox).verdict == "right"
    stub = "def f(*a): return 5" if name == "unequal" else "def f(*a): return None"
    assert code.judge(suite(ASSERTS[name]), stub, sandbox).verdict == "wrong"


def test_one_call_has_one_answer(sandbox: Sandbox) -> None:
    row = suite("assert f(1) == 2\nassert f(2) == 3\nassert f(3) == 4\n")
    assert code.judge(row, "import os\ndef f(x):\n    os.fork()\n    return x + 1\n", sandbox).verdict == "right"
    twice = (
        "import sys\ndef f(x):\n    frame = sys._getframe(1)\n    g, l = frame.f_globals, frame.f_back.f_locals\n"
        "    for n in (2, 3, 4): g['_tell'](l['request']['nonce'], 'value', str(n), 1)\n    return x + 1\n"
    )
    judgement = code.judge(row, twice, sandbox)
    assert judgement.verdict == "wrong"
    assert "more than once" in judgement.why


@pytest.mark.parametrize("value", ["iter([])", "{len: 1}", "object()", "(x for x in [])", "f"])
def test_a_suite_says_what_was_returned(value: str, sandbox: Sandbox) -> None:
    judgement = code.judge(suite("assert f(1) == 2"), f"def f(x): return {value}", sandbox)
    assert judgement.verdict == "wrong"
    assert "not a plain value" in judgement.why


def test_patched_modules_do_not_make_a_suite_wait(sandbox: Sandbox) -> None:
    patched = (
        "import builtins, json, json.encoder, os\nforged = lambda *a, **k: '{}'\n"
        "json.dumps = json.loads = json.JSONEncoder.encode = json.encoder.c_make_encoder = forged\n"
        "json.JSONDecoder.decode = forged\nbuiltins.len = lambda x: 1\nbuiltins.type = lambda *a: int\n"
        "builtins.str = builtins.repr = builtins.format = forged\nos.write = os.read = lambda *a: 0\n"
    )
    row = suite("assert f(1) == 2")
    assert code.judge(row, f"{patched}def f(x): return 7\n", sandbox).why == "suite: error: AssertionError"
    assert code.judge(row, f"{patched}def f(x): return 2\n", sandbox).verdict == "right"


class Fewer(Sandbox):
    """A sandbox that loses results: no test may pass by being skipped."""

    def call(self, *_: Any) -> Iterator[Result]:
        yield Result("ok", 3)

    def run(self, *_: Any) -> Iterator[Result]:
        yield from ()


@pytest.mark.parametrize(("row", "program"), [(ADD, "def add(a, b): return 3"), (SUM, "print(6)")])
def test_a_missing_result_is_no_pass(row: dict[str, Any], program: str) -> None:
    with pytest.raises(VerifierFailure, match="results for"):
        code.judge(row, program, Fewer(SandboxConfig()))


def test_nothing_runs_after_the_first_failure(sandbox: Sandbox) -> None:
    """Ninety tests that would take 5 s each are not waited for."""
    row = calls(*[([n], n) for n in range(90)], entry_point="f")
    program = "import time\ndef f(n):\n    if n: time.sleep(2)\n    return 5\n"
    judgement = code.judge(row, fenced(program), sandbox)
    assert judgement.why == "test 1: got 5"
    assert judgement.seconds < 5


def test_all_tests_of_an_answer_have_a_limit_together() -> None:
    row = calls(*[([n], n) for n in range(90)], entry_point="f")
    with Sandbox(SandboxConfig(answer_s=0.5)) as hasty:
        judgement = code.judge(row, fenced("import time\ndef f(n):\n    time.sleep(0.2)\n    return n\n"), hasty)
    assert judgement.verdict == "timeout"
    assert "of 90 tests" in judgement.why
    assert judgement.seconds < 5
