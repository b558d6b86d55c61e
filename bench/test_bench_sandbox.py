"""Isolated executions a second of a trivial program: one sandbox, and two side by side as two workers have them.

`pytest bench/ --benchmark-only -k sandbox`
"""

import threading

import pytest

from cipo_fast.config import SandboxConfig
from cipo_fast.verify.sandbox import Call, Sandbox, choose

PROGRAM = "def f(x): return x + 1"
COUNT = 100


def execute(sandbox, count):
    """`count` executions, each with its own right value."""
    values = [result.value for result in sandbox.call(PROGRAM, "f", [Call([i]) for i in range(count)])]
    assert values == list(range(1, count + 1))


@pytest.mark.parametrize("sandboxes", [1, 2])
def test_bench_sandbox(benchmark, sandboxes):
    config = SandboxConfig()
    tier = choose(config)
    running = [Sandbox(config, tier) for _ in range(sandboxes)]
    failed = []

    def worker(sandbox, count):
        try:
            execute(sandbox, count)
        except BaseException as error:
            failed.append(error)

    def run(count=COUNT):
        threads = [threading.Thread(target=worker, args=(sandbox, count)) for sandbox in running]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed, failed[0]

    for sandbox in running:  # the zygote starts in the thread that stays: it ends with the thread that started it
        execute(sandbox, 5)
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
    a_second = sandboxes * COUNT / benchmark.stats["median"]
    benchmark.extra_info["executions_per_s"] = round(a_second)
    for sandbox in running:
        sandbox.close()
    assert a_second >= 60
