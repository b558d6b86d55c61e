"""10,000 executions leave nothing behind."""

import gc
import os
import threading
import time

import pytest
from test_sandbox_isolation import working
from test_sandbox_limits import descendants

from cipo_fast.config import SandboxConfig
from cipo_fast.verify.sandbox import Call, Sandbox

COUNT = 10_000
# Each leaves a child behind and files in all places that take some.
PROGRAM = """
import os, time
def f(x):
    for folder in (".", "/tmp", "/dev/shm"):
        try:
            open(f"{folder}/left{x}", "w").close()
        except OSError:
            pass
    if x % 10 == 0 and os.fork() == 0:
        time.sleep(1000)
    return x
"""


def everything():
    return {(folder, name) for folder in ("/tmp", "/dev/shm") for name in os.listdir(folder) if name.startswith("left")}


def descriptors_open():
    return len(os.listdir("/proc/self/fd"))


def zombies():
    found = []
    for pid in descendants(os.getpid()):
        try:
            with open(f"/proc/{pid}/stat") as file:
                found += [pid] if file.read().rpartition(")")[2].split()[0] == "Z" else []
        except OSError:
            pass
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("kind", "count"), [("bubblewrap", COUNT), ("sandlock", COUNT // 10)])
def test_many_executions_leave_nothing(kind, count):
    tier = working(kind)
    if isinstance(tier, str):
        pytest.skip(tier)
    config = SandboxConfig()
    gc.collect()  # what earlier tests of this process left open is not closed in the middle of this one
    files, running, descriptors = everything(), descendants(os.getpid()), descriptors_open()
    sandboxes, failed = [Sandbox(config, tier), Sandbox(config, tier)], []

    def work(sandbox, numbers):
        results = sandbox.call(PROGRAM, "f", [Call([number]) for number in numbers])
        for number, result in zip(numbers, results, strict=True):
            if result.outcome != "ok" or result.value != number:
                failed.append((number, result))

    threads = [
        threading.Thread(target=work, args=(sandbox, range(start, count, 2))) for start, sandbox in enumerate(sandboxes)
    ]
    for sandbox in sandboxes:
        assert next(sandbox.call("def f(): return 1", "f", [Call([])])).value == 1
    alone = len(descendants(os.getpid()))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    until = time.monotonic() + 5
    while len(descendants(os.getpid())) > alone and time.monotonic() < until:
        time.sleep(0.05)
    assert len(descendants(os.getpid())) == alone
    assert zombies() == []
    folders = [sandbox._nest._scratch for sandbox in sandboxes]
    for sandbox in sandboxes:
        sandbox.close()
    assert not any(os.path.exists(folder) for folder in folders)
    assert set(descendants(os.getpid())) <= set(running)
    assert everything() <= files
    gc.collect()
    assert descriptors_open() <= descriptors
