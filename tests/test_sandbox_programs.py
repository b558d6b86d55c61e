"""What programs can do: stdin in every way, `__main__`, sources, entry points, values, suites."""

# ruff: noqa: E501, PT018 (a program is one line; a result is told as a whole)

import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple

import pytest
from test_sandbox_isolation import ROOT, one, printed, working

from cipo_fast.config import SandboxConfig
from cipo_fast.verify import VerifierFailure
from cipo_fast.verify.sandbox import Call, Sandbox, Tier
from cipo_fast.verify.sandbox.inside.values import NotPlain, decode, encode
from cipo_fast.verify.sandbox.tiers import find_bubblewrap


@pytest.fixture(scope="module")
def sandbox():
    tier = working("auto")
    if isinstance(tier, str):
        pytest.skip(tier)
    with Sandbox(SandboxConfig(cpu_s=2.0), tier) as sandbox:
        yield sandbox


# -- scripts


READERS = [
    "import sys\nprint(sys.stdin.read(), end='')",
    "import sys\nsys.stdout.write(sys.stdin.buffer.read().decode())",
    "print(open(0).read(), end='')",
    "import os\nwhile data := os.read(0, 7): os.write(1, data)",
    "print(open('/dev/stdin').read(), end='')",
    "import sys\nfor line in sys.stdin: print(line, end='')",
    "import sys\nfor line in iter(sys.stdin.readline, ''): print(line, end='')",
    "import sys\nprint(''.join(sys.stdin.readlines()), end='')",
    "try:\n  while True: print(input())\nexcept EOFError: pass",
    "import io, os, sys\ninput = io.BytesIO(os.read(0, os.fstat(0).st_size or 1 << 20)).readline\nprint(input().decode() + input().decode(), end='')",
    "import fileinput\nfor line in fileinput.input(): print(line, end='')",
    "def main():\n  print(input())\n  print(input())\nif __name__ == '__main__': main()",
]


@pytest.mark.parametrize("program", READERS)
def test_every_way_to_read_stdin(sandbox, program):
    text = "3 4\nünï\n"
    result = printed(sandbox, program, text)
    assert (result.outcome, result.stdout, result.value) == ("ok", text, 0), result


def test_a_large_stdin_read_or_not(sandbox):
    text = "x" * (3 << 20)
    assert printed(sandbox, "import sys\nprint(len(sys.stdin.read()))", text).stdout == f"{3 << 20}\n"
    assert printed(sandbox, "print(1)", text).stdout == "1\n"
    assert printed(sandbox, "import sys\nsys.stdin.close()\nprint(1)", text).outcome == "ok"


# In the way of the templates that programs for contests begin with.
FAST_IO = """
import os, sys
from io import BytesIO, IOBase
class FastIO(IOBase):
    def __init__(self, file):
        self._fd, self.buffer = file.fileno(), BytesIO()
        self.writable = "x" in file.mode or "r" not in file.mode
        self.write = self.buffer.write if self.writable else None
    def flush(self):
        if self.writable:
            os.write(self._fd, self.buffer.getvalue())
            self.buffer.truncate(0), self.buffer.seek(0)
class IOWrapper(IOBase):
    def __init__(self, file):
        self.buffer = FastIO(file)
        self.flush, self.writable = self.buffer.flush, self.buffer.writable
        self.write = lambda s: self.buffer.write(s.encode("ascii"))
"""


@pytest.mark.parametrize(
    ("program", "stdout"),
    [
        ("import inspect\ndef f(): pass\nprint(inspect.getsource(f))", "def f(): pass\n\n"),
        ("print(open(__file__).read())", "print(open(__file__).read())\n"),
        ("from dataclasses import dataclass\n@dataclass\nclass A:\n  x: int\nprint(A(1))", "A(x=1)\n"),
        ("import pickle\nclass A: x = 1\nprint(pickle.loads(pickle.dumps(A())).x)", "1\n"),
        ("import sys\nsys.setrecursionlimit(10**6)\ndef f(n): return n and 1 + f(n - 1)\nprint(f(200000))", "200000\n"),
        (
            "import sys\nfrom functools import cache\nsys.setrecursionlimit(10**6)\n@cache\ndef f(n): return n and 1 + f(n - 1)\nprint(f(100000))",
            "100000\n",
        ),
        (
            "import sys, threading\nsys.setrecursionlimit(10**6)\nthreading.stack_size(2**27)\ndef main():\n  def f(n): return n and 1 + f(n - 1)\n  print(f(50000))\nt = threading.Thread(target=main)\nt.start()",
            "50000\n",
        ),
        ("import atexit\natexit.register(print, 'end')", "end\n"),
        ("import asyncio\nasync def f(): return 1\nprint(asyncio.run(f()))", "1\n"),
        (
            "from concurrent.futures import ThreadPoolExecutor\nwith ThreadPoolExecutor(3) as p: print(list(p.map(abs, [-1, 2])))",
            "[1, 2]\n",
        ),
        (
            "import sys\nprint(sys.stdin.mode, sys.stdout.mode, sys.stdin.name, sys.stdout.name)",
            "r w <stdin> <stdout>\n",
        ),
        (FAST_IO + "sys.stdout = IOWrapper(sys.stdout)\nprint('fast')", "fast\n"),
        ("out = open(1, 'w')\nout.write('a')", "a"),
        ("import os\nout = os.fdopen(1, 'wb')\nout.write(b'a')", "a"),
        ("import io, os\nout = io.TextIOWrapper(io.BufferedWriter(io.FileIO(1, 'w')))\nout.write('a')", "a"),
        ("out = open('/dev/stdout', 'w')\nout.write('a')", "a"),
        ("import sys\nsys.held = open(1, 'w')\nsys.held.write('a')", "a"),
        ("import io, sys\nsys.stdout = io.StringIO()\nprint('b')\nsys.__stdout__.write('a')", "a"),
        ("class A:\n  def __del__(self): print('a')\nx = A()", "a\n"),
        ("class A:\n  def __del__(self): print(len(word))\nword = 'abc'\nx = A()\nx.x = x", "3\n"),
        ("import atexit, sys\natexit.register(lambda: sys.stdout.write('a'))\nsys.exit(0)", "a"),
        ("import atexit\nout = open(1, 'w')\natexit.register(out.write, 'a')", "a"),
        ("def main():\n  out = open(1, 'w')\n  out.write('a')\n  exit()\nmain()", "a"),
        ("import sys\nprint('a')\nsys.stdout.close()", "a\n"),
        ("import sys\nout = sys.stdout\nsys.stdout = None\nout.write('a')", "a"),
        ("import random\nprint(random.random() != 0)", "True\n"),
        ("print(len(str(10**4000)))\nprint('\\u00fc')", "4001\n\u00fc\n"),
        ("import sys\nprint(len(sys.argv), __name__)", "1 __main__\n"),
        ("import os\nprint(os.system('true') != 0)", "True\n"),
        ("import numpy as np\nprint(np.linalg.inv(np.eye(2) * 2))", "[[0.5 0. ]\n [0.  0.5]]\n"),
        ("", ""),
        ("\ufeffprint(1)", "1\n"),
    ],
)
def test_programs(sandbox, program, stdout):
    result = printed(sandbox, program)
    assert (result.outcome, result.stdout) == ("ok", stdout), result


def test_executions_differ_in_their_random_numbers(sandbox):
    seen = {one(sandbox, "import random\ndef f(): return random.random()").value for _ in range(5)}
    assert len(seen) == 5


@pytest.mark.parametrize(
    ("program", "detail"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def f(:", "SyntaxError: "),
        ("raise ValueError('a\\nb')", "ValueError: a b"),
        ("def f(): f()\nf()", "RecursionError: "),
        ("x = '\\ud800'\nprint(x.encode())", "UnicodeEncodeError: "),
        ("assert False", "AssertionError"),
        ("import sys; sys.exit(2)", "exit code 2"),
        ("import torch", "ModuleNotFoundError: "),
        ("(" * 5000 + ")" * 5000, "SyntaxError: "),
        ("x = 1\0", "null bytes"),
        ("class E(Exception):\n  def __str__(self): raise KeyError\nraise E", "E"),
        ("raise BaseException('x')", "BaseException: x"),
        ("import ctypes\nctypes.string_at(0)", "signal 11"),
        ("-" * 100000 + "1", ""),
    ],
)
def test_errors(sandbox, program, detail):
    result = printed(sandbox, program)
    assert result.outcome in ("error", "memory") and detail in result.detail, result


def test_programs_that_are_too_long_or_no_text(sandbox):
    assert printed(sandbox, "x" * (2 << 20)).outcome == "error"
    assert printed(sandbox, "\ud800 = 1").outcome == "error"
    assert printed(sandbox, "print(input())", "\ud800\udcff\n").outcome in ("ok", "error")


# -- functions


@pytest.mark.parametrize(
    ("program", "entry"),
    [
        ("def f(x): return x + 1", "f"),
        ("def f(x): return x + 1", None),
        ("f = lambda x: x + 1", "f"),
        ("class Solution:\n  def f(self, x): return x + 1", "Solution().f"),
        ("class Solution:\n  def f(self, x): return x + 1", "Solution.f"),
        ("class Solution:\n  def f(self, x): return x + 1", "f"),
        ("class Solution:\n  def f(self, x): return self._g(x)\n  def _g(self, x): return x + 1", None),
        ("class Solution:\n  @staticmethod\n  def f(x): return x + 1", None),
        ("from math import sqrt\ndef f(x): return x + 1", None),
        ("class Solution:\n  def f(self, x: List[int]) -> Optional[int]: return max(accumulate([x, 1]))", None),
        ("def f(x):\n  if __name__ == '__main__': return x + 1", "f"),
        ("def helper(): pass\ndef f(x): return x + 1", "f"),
    ],
)
def test_entry_points(sandbox, program, entry):
    [result] = sandbox.call(program, entry, [Call([1])])
    assert (result.outcome, result.value) == ("ok", 2), result


def test_entry_points_that_are_none(sandbox):
    for program, entry in (("def g(): pass", "f"), ("", None), ("def f(): pass\ndef g(): pass", None), ("f = 5", "f")):
        [result] = sandbox.call(program, entry, [Call([])])
        assert result.outcome == "error", result


def test_calls_do_not_see_each_other(sandbox):
    program = "seen = []\ndef f(x, y=0):\n  seen.append(x)\n  print(x)\n  return len(seen), y"
    results = list(sandbox.call(program, "f", [Call([1]), Call([2], {"y": 3})]))
    assert [result.value for result in results] == [(1, 0), (1, 3)]
    assert [result.stdout for result in results] == ["1\n", "2\n"]


# -- values


PLAIN = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2**63,
    -(2**63),
    10**5000,
    0.0,
    -0.0,
    1.5,
    1e300,
    5e-324,
    math.inf,
    -math.inf,
    "",
    "a",
    "\ud800",
    "\0",
    "ü😀",
    b"",
    b"\0\xff",
    1j,
    complex(math.inf, -0.0),
    [],
    [1, [2]],
    (),
    (1,),
    ((1,), [2]),
    {},
    {1: 2},
    {"a": [1]},
    {(1, 2): {3}},
    {None: None},
    {1.5: 1},
    set(),
    {1, 2},
    {"a", 1, (2,)},
    frozenset({1}),
    {frozenset({1})},
    [True, 1, 1.0],
    {"t": [1]},
    {"d": 1},
    [[]] * 1000,
]


@pytest.mark.parametrize("value", PLAIN, ids=lambda value: type(value).__name__)
def test_values_cross_as_they_are(value):
    """repr tells types, and -0.0 from 0.0."""
    back = decode(encode(value))
    assert type(back) is type(value)
    assert back == value
    if not isinstance(value, set | frozenset) and value != 10**5000:
        assert repr(back) == repr(value)


def test_values_that_cross_as_another_type():
    point = namedtuple("point", "x y")
    assert decode(encode([Counter("a"), defaultdict(int, a=1), OrderedDict(a=1)])) == [{"a": 1}] * 3
    assert {type(x) for x in decode(encode([Counter("a"), OrderedDict(a=1)]))} == {dict}
    assert decode(encode(point(1, [2]))) == (1, [2])
    assert math.isnan(decode(encode(math.nan)))


def test_numpy_crosses_as_lists_and_numbers():
    numpy = pytest.importorskip("numpy")
    value = decode(
        encode([numpy.int64(1), numpy.float32(0.5), numpy.bool_(True), numpy.arange(2), numpy.eye(1), numpy.str_("a")])
    )
    assert repr(value) == "[1, 0.5, True, [0, 1], [[1.0]], 'a']"
    for refused in (numpy.longdouble(1), numpy.array([object()])):
        with pytest.raises(NotPlain):
            encode(refused)


class Liar(int):
    def __eq__(self, other):
        return True

    __hash__ = int.__hash__


class Text(str):
    __slots__ = ()


class Equal:
    def __eq__(self, other):
        return True


def cycle():
    value = []
    value += [value, value]
    return value


def deep(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "value",
    [
        Liar(1),
        Text("a"),
        Equal(),
        object(),
        print,
        deque([1]),
        range(3),
        iter([]),
        (x for x in []),
        bytearray(b""),
        int,
        [Liar(1)],
        {Text("a"): 1},
        (Equal(),),
        cycle(),
        deep(200),
        deep(50000),
        ["x" * 1000000] * 100,
        [0] * 1100000,
        NotImplemented,
        ...,
        type("T", (tuple,), {})([1]),
        type("L", (list,), {})([1]),
        type("D", (dict,), {})(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_everything_else_is_refused(value):
    started = time.monotonic()
    with pytest.raises(NotPlain):
        encode(value)
    assert time.monotonic() - started < 3


@pytest.mark.parametrize(
    "program",
    [
        "class A(int):\n  def __eq__(self, o): return True\ndef f(): return A(1)",
        "class A:\n  def __eq__(self, o): return True\ndef f(): return A()",
        "def f():\n  yield 1",
        "def f():\n  a = []\n  a.append(a)\n  return a",
        "import sys\ndef f():\n  sys.setrecursionlimit(60)\n  return print",
    ],
)
def test_programs_that_return_something_else(sandbox, program):
    result = one(sandbox, program)
    assert result.outcome == "error" and result.detail.startswith("returned a"), result


def test_large_integers_are_fast(sandbox):
    started = time.monotonic()
    result = one(sandbox, "def f(): return 3 ** 1_000_000")
    assert result.value == 3**1_000_000
    assert time.monotonic() - started < 2


# -- suites


def suite(sandbox, program, body, entry="f"):
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    return sandbox.suite(program, entry, f"def check(candidate):\n{lines}\n")


def test_suites_pass_and_fail(sandbox):
    program = "def f(x): return x * 2"
    assert suite(sandbox, program, "assert candidate(2) == 4\nassert candidate('a') == 'aa'").outcome == "ok"
    assert suite(sandbox, program, "assert f(2) == 4\nassert candidate(x=3) == 6").outcome == "ok"
    failed = suite(sandbox, program, "assert candidate(2) == 5, 'not 5'")
    assert (failed.outcome, failed.detail) == ("error", "AssertionError: not 5")
    assert suite(sandbox, program, "for i in range(300): assert candidate(i) == 2 * i").outcome == "ok"


def test_suites_of_a_method(sandbox):
    program = "class Solution:\n  def f(self, x): return x * 2"
    assert suite(sandbox, program, "assert candidate(2) == 4", "Solution().f").outcome == "ok"


def test_exceptions_cross_by_name(sandbox):
    program = """
class Own(ValueError): pass
def f(x):
    if x == 0: raise ValueError("zero")
    if x == 1: raise Own("one")
    if x == 2: raise KeyError(2)
    if x == 3: return [].pop()
    if x == 4: "".encode("ascii").decode("utf-16", "x")
    raise UnicodeDecodeError("u", b"", 0, 1, "r")
"""
    body = """
for x, kind in enumerate([ValueError, ValueError, KeyError, IndexError]):
    try:
        candidate(x)
    except kind as error:
        pass
    else:
        assert False
try:
    candidate(5)
except Exception:
    pass
"""
    assert suite(sandbox, program, body).outcome == "ok"
    assert suite(sandbox, program, "candidate(0)").detail == "ValueError: zero"


@pytest.mark.parametrize(
    "end",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "raise SystemExit(0)",
        "raise KeyboardInterrupt",
        "exit()",
        "import os; os.kill(os.getppid(), 9); os.kill(os.getpid(), 9)",
        "x = bytearray(2 << 30)",
        "class A:\n    def __eq__(s, o): return True\n  return A()",
    ],
)
def test_a_candidate_that_ends_is_no_pass(sandbox, end):
    program = f"def f():\n  {end}"
    assert suite(sandbox, program, "assert candidate() == 1").outcome in ("error", "memory")
    assert suite(
        sandbox, f"{end if 'return' not in end else 'exit()'}\ndef f(): return 1", "assert candidate() == 1"
    ).outcome in ("error", "memory")


def test_a_candidate_that_hangs_is_a_timeout(sandbox):
    assert suite(sandbox, "def f():\n  while True: pass", "assert candidate() == 1").outcome == "timeout"
    assert (
        suite(sandbox, "def f():\n  while True: pass", "try:\n  candidate()\nexcept BaseException:\n  pass").outcome
        == "timeout"
    )


@pytest.mark.parametrize(
    "tests",
    ["", "def check(c): raise SystemExit(0)", "import os\ndef check(c): os._exit(0)", "check = 5", "def check("],
)
def test_tests_that_do_not_end_are_no_pass(sandbox, tests):
    assert sandbox.suite("def f(): return 1", "f", tests).outcome == "error"


def test_the_candidate_cannot_reach_the_tests(sandbox):
    """Its own process knows neither the tests nor what is expected; what it forges is an answer at most."""
    program = """
import json, os, sys
def f(x):
    frame = sys._getframe()
    while "request" not in frame.f_locals:
        frame = frame.f_back
    request = frame.f_locals["request"]
    assert "check" not in json.dumps(request)
    for what in ({"passed": "true"}, {"call": "[]"}, {"value": "1"}, {"raised": "5"}):
        message = json.dumps({"nonce": request["nonce"], **what}).encode()
        os.write(3, len(message).to_bytes(4, "big") + message)
    return 7
"""
    result = suite(sandbox, program, "assert candidate(0) == 8")
    assert result.outcome == "error", result


def test_a_program_that_does_not_load_is_no_exception_of_its_function(sandbox):
    body = "try:\n  candidate(1)\nexcept Exception:\n  pass"
    for program in ("1 / 0", "def f(:", "def g(): pass", "import nothing"):
        assert suite(sandbox, program, body).outcome == "error"
    assert suite(sandbox, "def f(x): 1 / 0", body).outcome == "ok"


def test_what_cannot_cross_is_no_pass(sandbox):
    """Not even for tests that expect an exception."""
    body = "try:\n  candidate({})\nexcept Exception:\n  pass"
    assert suite(sandbox, "def f(x): return 1", body.format("lambda: 1")).outcome == "error"
    assert suite(sandbox, "def f(x): return iter([])", body.format("1")).outcome == "error"
    assert "returned a" in suite(sandbox, "def f(x): return iter([])", "candidate(1)").detail


def test_a_thread_that_stays_does_not_hold_a_value_back(sandbox):
    program = "import threading, time\ndef f():\n  threading.Thread(target=time.sleep, args=(60,)).start()\n  return 1"
    started = time.monotonic()
    assert one(sandbox, program).value == 1
    assert time.monotonic() - started < 2


def test_arguments_are_copies(sandbox):
    assert suite(sandbox, "def f(x): x.append(1)", "a = []\ncandidate(a)\nassert a == []").outcome == "ok"


# -- a lost zygote


def test_a_lost_zygote_is_replaced(sandbox):
    assert one(sandbox, "def f(): return 1").value == 1
    os.kill(sandbox._nest._process.pid, signal.SIGKILL)
    assert one(sandbox, "def f(): return 2").value == 2
    sandbox.close()
    assert one(sandbox, "def f(): return 3").value == 3


def test_a_sandbox_that_cannot_start_is_a_failure():
    with (
        Sandbox(SandboxConfig(), Tier("bubblewrap", "/bin/false")) as broken,
        pytest.raises(VerifierFailure, match="twice"),
    ):
        one(broken, "def f(): return 1")
    with (
        Sandbox(SandboxConfig(), Tier("bubblewrap", "/nonexistent")) as broken,
        pytest.raises(VerifierFailure, match="twice"),
    ):
        one(broken, "def f(): return 1")


# -- tiers


def test_a_tier_that_is_named_and_does_not_work_is_refused():
    """Without new user namespaces and without root's capabilities there is no bubblewrap; nothing takes its place."""
    bwrap = find_bubblewrap()
    if bwrap is None or isinstance(working("bubblewrap"), str):
        pytest.skip("no bubblewrap")
    code = """
from cipo_fast.config import SandboxConfig
from cipo_fast.errors import UserError
from cipo_fast.verify.sandbox import choose
try:
    print("took", choose(SandboxConfig(tier="bubblewrap", unsafe_local=True)).kind)
except UserError as error:
    print("refused", error)
print(choose(SandboxConfig(unsafe_local=True)).kind)
"""
    inside = [bwrap, "--unshare-user", "--disable-userns", "--cap-drop", "ALL", "--dev-bind", "/", "/", sys.executable]
    done = subprocess.run([*inside, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    lines = done.stdout.splitlines()
    assert lines[0].startswith("refused sandbox.tier=bubblewrap: no isolation works here (bubblewrap: "), done
    assert "unsafe_local" in lines[0]
    assert lines[-1] in ("sandlock", "none"), done


def test_a_tier_says_what_holds(sandbox):
    assert sandbox.tier.describe().startswith(f"sandbox: {sandbox.tier.kind} (")
    assert "NONE" in Tier("none").describe()


def test_without_isolation_programs_run_all_the_same():
    with Sandbox(SandboxConfig(cpu_s=0.5, memory_mib=512), Tier("none")) as unsafe:
        assert one(unsafe, "def f(): return (1, 2)").value == (1, 2)
        assert printed(unsafe, "print(input())", "a").stdout == "a\n"
        assert printed(unsafe, "while True: pass").outcome == "timeout"
        assert printed(unsafe, "x = bytearray(2 << 30)").outcome == "memory"
        assert suite(unsafe, "def f(): return 1", "assert candidate() == 1").outcome == "ok"
        scratch = unsafe._nest._scratch
        for _ in range(50):  # whoever has a report finds nothing left behind
            assert one(unsafe, "def f(): return open('a', 'w').write('x' * 100_000)").value == 100_000
            assert os.listdir(scratch) == []
    assert not os.path.exists(scratch)
