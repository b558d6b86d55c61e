"""Programs that want too much, or that try to outlive, end or deceive the sandbox: on every tier that works here."""

# ruff: noqa: E501, PT018 (a program is one line; a result is told as a whole)

import contextlib
import os
import time

import pytest
from test_sandbox_isolation import nested, one, printed, working

from cipo_fast.config import SandboxConfig
from cipo_fast.verify.sandbox import Call, Sandbox

CALL = ["call", "entry_point", "folder", "limits", "mode", "nonce", "program", "tasks"]  # what a program gets
LIMITS = {"cpu_s": 2.0, "wall_s": 5.0, "memory_mib": 256}


@pytest.fixture(scope="module", params=["bubblewrap", "sandlock"])
def sandbox(request):
    tier = working(request.param)
    if isinstance(tier, str):
        pytest.skip(tier)
    with Sandbox(SandboxConfig(**LIMITS), tier) as sandbox:
        yield sandbox


def descendants(pid):
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{name}/stat") as file:
            if int(file.read().rpartition(")")[2].split()[1]) == pid:
                found += [int(name), *descendants(int(name))]
    return found


def settled(sandbox):
    """Nothing runs but the zygote (and what bwrap keeps beside it), and it still works."""
    assert one(sandbox, "def f(): return 1").value == 1
    deadline = time.monotonic() + 3
    most = 3 if nested(sandbox) else 1
    while len(running := descendants(os.getpid())) > most and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(running) <= most, running
    return True


# -- time


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time\ntime.sleep(100)",
        "import signal, os\nsignal.pause()",
        "10 ** 10 ** 9",
        "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
        "try:\n  while True: pass\nexcept BaseException:\n  while True: pass",
        "import os\nos.fork()\nos.fork()\nwhile True: pass",
        "import re\nre.match('(a*)*b', 'a' * 40)",
    ],
)
def test_time_runs_out(sandbox, program):
    started = time.monotonic()
    result = printed(sandbox, program)
    assert result.outcome == "timeout", result
    assert time.monotonic() - started < LIMITS["wall_s"] + 2
    assert settled(sandbox)


def test_cpu_time_counts_and_not_the_clock(sandbox):
    """A sleep beyond the CPU limit is fine; four processes share one limit."""
    assert printed(sandbox, "import time\ntime.sleep(1.4)\nprint(1)").outcome == "ok"
    program = "import os, time\nfor _ in range(2): os.fork()\nwhile True: pass"
    result = printed(sandbox, program)
    assert "CPU time" in result.detail, result


# -- memory, files, output


@pytest.mark.parametrize(
    "program",
    [
        "x = bytearray(1 << 30)",
        "x = []\nwhile True: x.append(bytearray(1 << 20))",
        "x = 'a' * (1 << 31)",
        "import mmap\nm = mmap.mmap(-1, 1 << 30)\nm.write(bytes(1 << 30))",
        "import numpy\nnumpy.ones(1 << 28)",
        "import os, time\nfor _ in range(2): os.fork()\nx = bytearray(b'x') * (100 << 20)\ntime.sleep(5)",
        "import os, mmap, time\nfor _ in range(2): os.fork()\nm = mmap.mmap(-1, 100 << 20)\nm.write(b'x' * (100 << 20))\ntime.sleep(5)",
        "import ctypes, os, time\nfor _ in range(2): os.fork()\nctypes.CDLL(None).prctl(4, 0)\nx = bytearray(b'x') * (100 << 20)\ntime.sleep(5)",
        "import ctypes, os, time\nctypes.CDLL(None).prctl(15, b'\\xff\\xfe')\nfor _ in range(2): os.fork()\n"
        "x = bytearray(b'x') * (100 << 20)\ntime.sleep(5)",  # a name that is no text
    ],
)
def test_memory_runs_out(sandbox, program):
    result = printed(sandbox, program)
    assert result.outcome in ("memory", "error"), result
    assert result.outcome == "memory" or "memory" in result.detail.lower(), result
    assert settled(sandbox)


def test_memory_within_the_limit_is_given(sandbox):
    assert printed(sandbox, "x = bytearray(b'x') * (180 << 20)\nprint(len(x))").outcome == "ok"


@pytest.mark.parametrize("folder", [".", "/tmp", "/dev/shm"])
def test_files_are_limited(sandbox, folder):
    """One file has a largest size; where there is a file system of its own, all files together have it too."""
    program = f"""
def f(count, size):
    written = 0
    for i in range(count):
        try:
            with open({folder!r} + "/x" + str(i), "wb", buffering=0) as file:
                written += file.write(bytes(size)) or 0
        except OSError as error:
            return written
    return written
"""
    assert one(sandbox, program, 1, 20 << 20).value <= 8 << 20
    if nested(sandbox):
        assert one(sandbox, program, 30, 1 << 20).value <= 8 << 20
        assert one(sandbox, program, 5000, 1).value <= 1024
    assert settled(sandbox)


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_flood_is_output(sandbox, stream):
    started = time.monotonic()
    result = printed(sandbox, f"import sys\nwhile True: print('x' * 1000, file=sys.{stream})")
    assert result.outcome == "output"
    assert len(result.stdout) <= 64 << 10
    assert time.monotonic() - started < 2
    assert printed(sandbox, "print('x' * 60000)").stdout == "x" * 60000 + "\n"


def test_a_value_that_is_too_large(sandbox):
    assert one(sandbox, "def f(): return 'x' * (5 << 20)").outcome == "error"
    assert len(one(sandbox, "def f(): return 'x' * (3 << 20)").value) == 3 << 20


# -- processes


BOMBS = [
    "import os\nwhile True: os.fork()",
    "import os, time\nfor _ in range(100):\n  if os.fork() == 0: time.sleep(50)\ntime.sleep(50)",
    "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass",
    "import threading, time\nfor _ in range(100): threading.Thread(target=time.sleep, args=(50,)).start()",
    "import os\nwhile True:\n  if os.fork(): os._exit(0)",
]


@pytest.mark.parametrize("program", BOMBS)
def test_bombs(sandbox, program):
    started = time.monotonic()
    result = printed(sandbox, program)
    assert result.outcome in ("error", "timeout", "processes", "ok"), result
    assert result.outcome != "ok" or program == BOMBS[-1]
    assert time.monotonic() - started < LIMITS["wall_s"] + 3
    assert settled(sandbox)


def test_some_processes_and_threads_are_fine(sandbox):
    if not nested(sandbox):
        pytest.skip("multiprocessing's locks want /dev/shm")
    program = """
import multiprocessing, threading
def square(x): return x * x
if __name__ == "__main__":
    with multiprocessing.Pool(2) as pool:
        print(pool.map(square, range(5)))
    threads = [threading.Thread(target=print, args=(i,)) for i in range(3)]
    for thread in threads: thread.start()
"""
    result = printed(sandbox, program)
    assert result.outcome == "ok", result
    assert result.stdout.splitlines()[0] == "[0, 1, 4, 9, 16]"
    assert sorted(result.stdout.split("\n")[1:-1]) == ["0", "1", "2"]


def test_nobody_survives(sandbox):
    """A daemon in the classical way: forked twice, in a session of its own, deaf to signals."""
    program = """
import os, signal, time
def f():
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            for number in range(1, 32):
                try: signal.signal(number, signal.SIG_IGN)
                except OSError: pass
            while True: time.sleep(1)
        os._exit(0)
    return os.getpid()
"""
    assert one(sandbox, program).outcome == "ok"
    assert settled(sandbox)
    assert printed(sandbox, program + "\nf()\nprint('x')").stdout == "x\n"
    assert settled(sandbox)


# -- exits and forgeries


@pytest.mark.parametrize(
    "end",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "raise SystemExit",
        "import os; os.kill(os.getpid(), 9)",
        "exit()",
        "import os; os.abort()",
        "import os; os.execv('/bin/true', ['true'])",
        "raise KeyboardInterrupt",
    ],
)
def test_an_exit_is_no_value(sandbox, end):
    for program in (f"{end}\ndef f(): return 1", f"def f():\n  {end}", f"def f(): return 1\n{end}"):
        result = one(sandbox, program)
        assert (result.outcome, result.value) != ("ok", 1)
        assert result.outcome == "error", result


def test_exit_codes_of_scripts(sandbox):
    assert printed(sandbox, "print(1)\nimport sys\nsys.exit(0)").outcome == "ok"
    assert printed(sandbox, "import os\nos.write(1, b'x')\nos._exit(0)").stdout == "x"
    for code, program in (
        (3, "import sys\nprint(1)\nsys.exit(3)"),
        (1, "exit('text')"),
        (-9, "import os\nos.kill(os.getpid(), 9)"),
    ):
        result = printed(sandbox, program)
        assert (result.outcome, result.value) == ("error", code), result


@pytest.mark.parametrize("attempt", ["os.close(3)", "os.close(4)", "os.closerange(0, 100)", "os.dup2(1, 3)"])
def test_closing_the_result_descriptor(sandbox, attempt):
    result = one(sandbox, f"import os\ndef f():\n  {attempt}\n  return 1")
    assert result.outcome in ("error", "ok")
    assert result.outcome == "error" or (attempt == "os.close(4)" and result.value == 1)
    assert settled(sandbox)


@pytest.mark.parametrize(
    "noise",
    [
        "b'garbage'",
        "b'\\xff' * 100",
        "b'\\0\\0\\0\\5hello'",
        "b'\\xff\\xff\\xff\\xff'",
        "b'\\0\\0\\0\\2{}' * 1000",
        "b'\\0\\0\\0\\1[' * 10",
        "(50000).to_bytes(4, 'big') + b'[' * 50000",
        '(33).to_bytes(4, \'big\') + b\'{"nonce": 0, "value": "[1, 2, 3]"}\'',
    ],
)
def test_what_is_written_to_the_descriptor_without_the_nonce_is_nothing(sandbox, noise):
    result = one(
        sandbox,
        f"import os\ndef f():\n  for fd in range(3, 10):\n    try: os.write(fd, {noise})\n    except OSError: pass\n  return 'end'",
    )
    assert (result.outcome, result.value) in (("ok", "end"), ("error", None), ("output", None)), result
    assert settled(sandbox)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 3000,
        '{"d": [[[1], 2]]}',
        '{"q": 1}',
        '{"i": "zz"}',
        '{"i": 5}',
        '{"s": 5}',
        '{"f": "0x"}',
        "NaN",
        '{"b": "0"}',
        '{"c": [1, 2]}',
        "1" * 5000,
        '{"t": [], "s": []}',
        "{",
        "",
        '{"d": [1]}',
        '{"d": {"a": 1}}',
        '{"f": []}',
        '{"s": [' + ",".join(f'{{"i": "{k * ((1 << 61) - 1):x}"}}' for k in range(5000)) + "]}",
    ],
)
def test_forged_values_are_refused(sandbox, text):
    """With the right nonce, as a program that looks for it can: it is no more than a value, and must be one."""
    program = """
import json, os, sys
def f(text):
    frame = sys._getframe()
    while "request" not in frame.f_locals:
        frame = frame.f_back
    message = json.dumps({"nonce": frame.f_locals["request"]["nonce"], "value": text}).encode()
    os.write(3, len(message).to_bytes(4, "big") + message)
    os._exit(0)
"""
    started = time.monotonic()
    result = one(sandbox, program, text)
    assert result.outcome == "error" and result.detail.startswith("returned "), result
    assert time.monotonic() - started < 2


def test_the_expected_value_is_nowhere(sandbox):
    """Whatever a program can see of itself: its own call, and nothing else."""
    program = """
import gc, sys
def f(x):
    seen, frame = [], sys._getframe()
    while frame:
        seen.append(sorted(frame.f_locals))
        if "request" in frame.f_locals:
            return sorted(frame.f_locals["request"])
        frame = frame.f_back
"""
    assert one(sandbox, program, 1).value == CALL


def test_stopping_everything_is_a_timeout(sandbox):
    result = printed(sandbox, "import os, signal\nos.kill(0, signal.SIGSTOP)")
    assert result.outcome == "timeout"
    result = printed(
        sandbox, "import os, signal\nif os.fork():\n  os.kill(-1, signal.SIGSTOP)\nos.kill(os.getpid(), signal.SIGSTOP)"
    )
    assert result.outcome == "timeout"
    assert settled(sandbox)


def test_the_caller_may_stop_asking(sandbox):
    results = sandbox.call("def f(x): return x", "f", [Call([i]) for i in range(1000)])
    assert next(results).value == 0
    results.close()
    assert settled(sandbox)
