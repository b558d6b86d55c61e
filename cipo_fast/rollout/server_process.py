"""`vllm serve` as a process group of its own: started, watched, ended. It dies with the trainer."""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from cipo_fast.config import Config
from cipo_fast.errors import EngineFailure, UserError
from cipo_fast.rollout.connection import Address, is_loopback
from cipo_fast.rollout.vllm import engine_arguments, two_lines
from cipo_fast.rollout.vllm_guard import KEY

DEFAULT_PORT = 8100  # of cipo_fast.serve
ENVIRONMENT = {
    "VLLM_SERVER_DEV_MODE": "1",  # weight updates, pause, cache reset
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # without a GPU the cores are the trainer's too
}
# What torchrun tells its workers; a server is none of them.
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


class ServerProcess:
    """Nobody else's: its port was free, it answers to a name that no other server has, and to no one without its key.

    UserError when the port is taken. `folder` holds the model's config and gets server.log."""

    def __init__(self, folder: Path, config: Config, device: str):
        settings = config.rollout.server
        self.host = _host()
        self.port = settings.port or _free_port(self.host)
        url_host = f"[{self.host}]" if ":" in self.host else self.host
        name = f"{served_name(folder, config)}-{secrets.token_hex(8)}"
        key = secrets.token_urlsafe(32)
        self.address = Address(f"http://{url_host}:{self.port}", name, key, started=True)
        self.command = serve_command(folder, config, device, self.host, self.port, name)
        self.devices = settings.devices
        self.log = folder / "server.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        refuse_taken(self.host, self.port)
        environment = {k: v for k, v in os.environ.items() if k not in TORCHRUN} | ENVIRONMENT
        environment[KEY] = self.address.key or ""
        if self.devices is not None:
            environment["CUDA_VISIBLE_DEVICES"] = self.devices
        launch = [sys.executable, "-m", "cipo_fast.rollout.vllm_launch", str(os.getpid())]
        if self.log.exists():
            self.log.replace(self.log.with_name("server.before.log"))  # what is quoted is of this start
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*launch, *self.command], stdout=log, stderr=log, env=environment, start_new_session=True
            )

    def check(self) -> None:
        """Raises EngineFailure when it has ended."""
        if self.process is None or self.process.poll() is not None:
            raise EngineFailure(f"the server has ended: {self.last_error()}; its log is {self.log}")

    def stop(self) -> None:
        """The whole group at once: a wedged server does not end itself, and its weights are the trainer's anyway."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def last_error(self) -> str:
        """Of its log, without the process names that vLLM writes in front of each line."""
        text = self.log.read_text(encoding="utf-8", errors="replace")
        lines = [re.sub(r"^\(\w+ pid=\d+\) ", "", line) for line in text.splitlines()]
        errors = [i for i, line in enumerate(lines) if re.match(r"[\w.]+(Error|Exception): |\S+: error: ", line)]
        return two_lines("\n".join(lines[errors[-1] :])) if errors else "its log names no error"


def served_name(folder: Path, config: Config) -> str:
    """Of a server with this model and these settings: what a trainer and the server that it finds must agree in."""
    shape = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    parts = [shape.get(key) for key in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")]
    parts.append(config.model.dtype)
    if config.model.dtype == "bfloat16" and config.rollout.vllm.fp32_head:
        parts.append("fp32_head")
    return "-".join(["policy", *map(str, parts)])


def serve_command(folder: Path, config: Config, device: str, host: str, port: int, name: str) -> list[str]:
    """Options of vLLM's API server."""
    from cipo_fast.rollout.vllm_transfer import backend

    arguments = {
        "model": str(folder),
        "served_model_name": name,
        "disable_uvicorn_access_log": True,
        "enable_scale_out": True,  # /inference/v1/generate: token ids in, token ids out
        "host": host,
        "port": port,
        "middleware": "cipo_fast.rollout.vllm_guard.Guard",
        "weight_transfer_config": {"backend": backend(transfer_kind(config, device))},
    } | engine_arguments(config, device)
    options: list[str] = []
    for name, value in arguments.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            options.append(f"--{option}" if value else f"--no-{option}")
        elif isinstance(value, list):
            options += [f"--{option}", *map(str, value)]
        elif value is not None:
            options += [f"--{option}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return options


def check_port(config: Config) -> None:
    """UserError where the trainer is to start a server on a port that is taken."""
    if config.rollout.server.start and config.rollout.server.port:
        refuse_taken(_host(), config.rollout.server.port)


def transfer_kind(config: Config, device: str) -> str:
    kind = config.rollout.server.transfer
    return kind if kind != "auto" else "nccl" if device == "cuda" else "shared_memory"


def refuse_taken(host: str, port: int) -> None:
    """UserError unless `port` can be listened on."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port whose connections are but fading is free
        try:
            s.bind((host, port))
        except (OSError, ValueError) as error:  # ValueError: no name of a host
            reason = getattr(error, "strerror", None) or error
            raise UserError(
                f"rollout.server.port={port}: {host}:{port} cannot be had ({reason}), another run's "
                "perhaps; without this setting a free one is taken"
            ) from None


def _free_port(host: str) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as s:
        s.bind((host, 0))
        return s.getsockname()[1]


def _host() -> str:
    return "127.0.0.1" if _one_node() else _interface(os.environ["MASTER_ADDR"])


def _one_node() -> bool:
    return os.environ.get("WORLD_SIZE", "1") == os.environ.get("LOCAL_WORLD_SIZE", "1")


def _interface(master: str) -> str:
    """This node's address that the other nodes know: where MASTER_ADDR points (the first rank's node is the master's).
    A node may know itself by a loopback address; then that of its default route."""
    address = str(socket.getaddrinfo(master, None, type=socket.SOCK_STREAM)[0][4][0])
    if not is_loopback(address):
        return address
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.connect(("192.0.2.1", 9))  # nothing is sent
        return s.getsockname()[0]
