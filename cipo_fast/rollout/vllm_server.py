"""A vLLM server: token ids and log-probs over HTTP, weights through vLLM's own transfer engines.

The first rank starts it (`rollout.server.start`), watches it and restarts it; or all find it by its URL. During a sync
the server is paused, and a sync that breaks off leaves it so: nothing is sampled from half-updated weights. Every call
has a time-out, and a call that fails is an EngineFailure.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import requests
import torch
from torch import Tensor

from cipo_fast.config import Config
from cipo_fast.distributed import is_main, raise_together
from cipo_fast.errors import TrainingStopped, UserError
from cipo_fast.records import Completion
from cipo_fast.rollout import EngineFailure, Sampling, SyncReport
from cipo_fast.rollout.fingerprints import Fingerprint
from cipo_fast.rollout.vllm import engine_arguments, sampling_arguments, two_lines

CONNECT_TIMEOUT_S = 10.0
CONTROL_TIMEOUT_S = 60.0  # of the small calls: pause, resume, reset


class VllmServerEngine:
    """`folder` holds config.json and the tokenizer, no weights; `shapes` are the trainer's parameters, in order."""

    def __init__(
        self, folder: Path, config: Config, shapes: dict[str, tuple[int, ...]], eos_ids: list[int], device: str
    ):
        self.config = config.rollout.server
        self.url = self.config.url.rstrip("/") if self.config.url else _own_url(self.config.port)
        self.transfer_kind = transfer_kind(config, device)
        self.shapes = shapes
        self.dtype = getattr(torch, config.model.dtype)
        self.eos_ids = eos_ids
        self.policy_version = -1
        self.in_flight = 2 * max(1, config.rollout.vllm.max_sequences // config.rollout.samples_per_prompt)
        self.session = requests.Session()
        for scheme in ("http://", "https://"):
            self.session.mount(scheme, requests.adapters.HTTPAdapter(pool_maxsize=self.in_flight))
        self.restarts = 0
        self.process: ServerProcess | None = None
        if self.config.start and is_main():
            self.process = ServerProcess(folder, config, device)
        try:
            self._meet()
        except EngineFailure as failure:
            self.close()
            raise UserError(f"rollout.engine=vllm_server: {failure}") from None
        self.max_model_len: int | None = self._get("v1/models")["data"][0]["max_model_len"]
        try:
            self._score([0, 0])  # from its dummy weights: what it can load and cannot run shows here
        except EngineFailure as failure:
            self.close()
            raise UserError(
                f"model.path={config.model.path}: vLLM cannot run it: {failure}{self._log_hint()}"
            ) from None

    def generate(self, prompts: Sequence[list[int]], n: int, sampling: Sampling, seed: int) -> list[list[Completion]]:
        self._check_ready()
        bodies = [
            {
                "token_ids": prompt,
                "sampling_params": sampling_arguments(
                    len(prompt), n, sampling, seed, i, self.eos_ids, self.max_model_len
                ),
            }
            for i, prompt in enumerate(prompts)
        ]
        with ThreadPoolExecutor(self.in_flight) as pool:
            return list(pool.map(self._generate, bodies))

    def sync(self, weights: Iterable[tuple[str, Tensor]], version: int) -> SyncReport:
        started = time.perf_counter()
        self.policy_version = -1
        error, sender, size = None, None, 0
        if is_main():
            from cipo_fast.rollout.vllm_transfer import Sender

            try:
                self._post("pause?mode=abort")
                sender = Sender(*self.transfer, self.config.timeout_s)
            except EngineFailure as failure:
                error = failure
        sent = set()
        for name, tensor in weights:  # a collective: every rank walks to the end
            self._check_parameter(name, tensor)
            sent.add(name)
            size += tensor.nbytes
            if sender is not None:
                sender.put(name, tensor)
        if missing := set(self.shapes) - sent:
            raise RuntimeError(f"sync: the trainer sent no {', '.join(sorted(missing)[:3])}")
        if sender is not None:
            try:
                sender.finish()
                self._commit(version)
            except EngineFailure as failure:
                error = failure
        raise_together(error)
        self.policy_version = version
        return SyncReport(version, len(sent), size, time.perf_counter() - started)

    def score(self, sequences: Sequence[list[int]]) -> list[list[float]]:
        self._check_ready()
        with ThreadPoolExecutor(len(sequences)) as pool:
            return list(pool.map(self._score, sequences))

    def fingerprints(self) -> dict[str, Fingerprint]:
        (found,) = self._post("collective_rpc", {"method": "cipo_fingerprints"})["results"]
        return {name: Fingerprint(*values) for name, values in found.items()}

    def release(self) -> None:
        pass  # its devices are its own

    def restart(self) -> None:
        """Of a server that the trainer started; one found by URL is given the same time to come back."""
        self.policy_version = -1
        self.restarts += 1
        if self.restarts > self.config.max_restarts:
            raise TrainingStopped(
                f"the vLLM server at {self.url} failed {self.restarts} times (rollout.server.max_restarts="
                f"{self.config.max_restarts}){self._log_hint()}"
            )
        if self.process is not None:
            self.process.stop()
            self.process.start()
        try:
            self._meet()
        except EngineFailure as failure:
            raise TrainingStopped(f"the vLLM server did not come back: {failure}") from None

    def prefix_cache(self) -> tuple[int, int]:
        text = self._request("GET", "metrics", None, CONTROL_TIMEOUT_S).text
        counts = {"vllm:prefix_cache_queries_total": 0.0, "vllm:prefix_cache_hits_total": 0.0}
        for line in text.splitlines():
            name, _, rest = line.partition("{")
            if name in counts:
                counts[name] += float(rest.rsplit(" ", 1)[1])
        queries, hits = counts.values()
        return int(queries), int(hits)

    def close(self) -> None:
        if self.process is not None:
            self.process.stop()
        self.session.close()

    def _check_ready(self) -> None:
        if self.policy_version < 0:
            raise RuntimeError("the server has no whole set of weights: a sync comes first")

    # -------------------------------------------------------------------------------------------------- one request

    def _generate(self, body: dict[str, Any]) -> list[Completion]:
        answer = self._post("inference/v1/generate", body, self.config.timeout_s)
        found = []
        for choice in sorted(answer["choices"], key=lambda c: c["index"]):
            if choice["finish_reason"] not in ("stop", "length"):
                raise EngineFailure(f"{self.url} ended an answer with {choice['finish_reason']!r}")
            versions = {span["version"] for span in choice["weight_versions"]}
            if versions != {str(self.policy_version)}:
                raise EngineFailure(
                    f"{self.url} sampled with weights {', '.join(sorted(versions))}, not {self.policy_version}"
                )
            logps = [token["logprob"] for token in choice["logprobs"]["content"]]
            truncated = choice["finish_reason"] == "length"
            found.append(Completion(choice["token_ids"], logps, truncated, self.policy_version))
        return found

    def _score(self, ids: list[int]) -> list[float]:
        params = {"max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 0, "detokenize": False}
        answer = self._post("inference/v1/generate", {"token_ids": ids, "sampling_params": params})
        positions = zip(answer["prompt_logprobs"][1:], ids[1:], strict=True)
        return [position[str(token)]["logprob"] for position, token in positions]

    def _post(self, path: str, body: Any = None, timeout_s: float = CONTROL_TIMEOUT_S) -> Any:
        return self._request("POST", path, body, timeout_s).json()

    def _get(self, path: str) -> Any:
        return self._request("GET", path, None, CONTROL_TIMEOUT_S).json()

    def _request(self, method: str, path: str, body: Any, timeout_s: float) -> requests.Response:
        try:
            answer = self.session.request(
                method, f"{self.url}/{path}", json=body, timeout=(CONNECT_TIMEOUT_S, timeout_s)
            )
        except requests.RequestException as error:
            raise EngineFailure(f"{self.url}/{path}: {_reason(error)}") from error
        if 400 <= answer.status_code < 500:  # the same request would be refused again
            raise TrainingStopped(f"{self.url}/{path}: HTTP {answer.status_code}: {answer.text[:300]}")
        if answer.status_code != 200:
            raise EngineFailure(f"{self.url}/{path}: HTTP {answer.status_code}: {answer.text[:300]}")
        return answer

    # --------------------------------------------------------------------------------------------- start and weights

    def _commit(self, version: int) -> None:
        """New weights are in place: no key or value of the old ones may be found again."""
        self._post("update_weight_version", {"new_version": str(version)})
        if not self._post("reset_prefix_cache")["success"]:
            raise EngineFailure(f"{self.url} kept its prefix cache, which holds keys and values of the old weights")
        self._post("resume")

    def _check_parameter(self, name: str, tensor: Tensor) -> None:
        if self.shapes.get(name) != tuple(tensor.shape) or tensor.dtype != self.dtype:
            raise RuntimeError(f"sync: no parameter {name} of shape {tuple(tensor.shape)} and type {tensor.dtype}")

    def _meet(self) -> None:
        """Wait for the server, set up the weight transfer. Raises EngineFailure on all ranks or on none."""
        error = None
        try:
            self._wait_until_healthy()
            self._connect()
        except EngineFailure as failure:
            error = failure
        raise_together(error)

    def _connect(self) -> None:
        """The first rank meets the server's transfer engine."""
        if not is_main():
            return
        from vllm.distributed.weight_transfer import HTTPVLLMWeightSyncClient, ParamMeta

        from cipo_fast.rollout.vllm_transfer import connect

        workers = self._get("get_world_size")["world_size"]
        client = HTTPVLLMWeightSyncClient(self.url, timeout=self.config.timeout_s)
        parameters = [ParamMeta(name, self.dtype, shape) for name, shape in self.shapes.items()]
        self.transfer = connect(self.transfer_kind, client, parameters, workers, self.config.timeout_s)

    def _wait_until_healthy(self) -> None:
        deadline = time.monotonic() + self.config.start_timeout_s
        while True:
            if self.process is not None and self.process.ended():
                raise EngineFailure(f"the server ended at its start: {self.process.last_error()}{self._log_hint()}")
            try:
                self._request("GET", "health", None, CONNECT_TIMEOUT_S)
                return
            except EngineFailure:
                if time.monotonic() > deadline:
                    raise EngineFailure(
                        f"{self.url} did not answer for {self.config.start_timeout_s:g} s{self._log_hint()}"
                    ) from None
            time.sleep(0.5)

    def _log_hint(self) -> str:
        return f"; its log is {self.process.log}" if self.process is not None else ""


class ServerProcess:
    """`vllm serve` as a process group of its own, that dies with the trainer."""

    def __init__(self, folder: Path, config: Config, device: str):
        self.command = serve_command(folder, config, device)
        self.devices = config.rollout.server.devices
        self.log = folder / "server.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        environment = {k: v for k, v in os.environ.items() if k not in TORCHRUN} | ENVIRONMENT
        if self.devices is not None:
            environment["CUDA_VISIBLE_DEVICES"] = self.devices
        launch = [sys.executable, "-m", "cipo_fast.rollout.vllm_launch", str(os.getpid())]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*launch, *self.command], stdout=log, stderr=log, env=environment, start_new_session=True
            )

    def ended(self) -> bool:
        return self.process is None or self.process.poll() is not None

    def stop(self) -> None:
        """The whole group at once: a wedged server does not end itself, and its weights are the trainer's anyway."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def last_error(self) -> str:
        """Of its log, without the process names that vLLM writes in front of each line."""
        lines = [
            re.sub(r"^\(\w+ pid=\d+\) ", "", x)
            for x in self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        ]
        errors = [i for i, line in enumerate(lines) if re.match(r"[\w.]+(Error|Exception): ", line)]
        return two_lines("\n".join(lines[errors[-1] :])) if errors else "its log names no error"


ENVIRONMENT = {
    "VLLM_SERVER_DEV_MODE": "1",  # weight updates, pause, cache reset
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # without a GPU the cores are the trainer's too
}
# What torchrun tells its workers; a server is none of them.
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


def transfer_kind(config: Config, device: str) -> str:
    kind = config.rollout.server.transfer
    return kind if kind != "auto" else "nccl" if device == "cuda" else "shared_memory"


def serve_command(folder: Path, config: Config, device: str) -> list[str]:
    """Options of vLLM's API server."""
    from cipo_fast.rollout.vllm_transfer import backend

    arguments = {
        "model": str(folder),
        "served_model_name": "policy",
        "disable_uvicorn_access_log": True,
        "enable_scale_out": True,  # /inference/v1/generate: token ids in, token ids out
        "host": "127.0.0.1" if _one_node() else "0.0.0.0",
        "port": config.rollout.server.port,
        "weight_transfer_config": {"backend": backend(transfer_kind(config, device))},
    } | engine_arguments(config, device)
    options: list[str] = []
    for name, value in arguments.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            options.append(f"--{option}" if value else f"--no-{option}")
        else:
            options += [f"--{option}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return options


def _one_node() -> bool:
    return os.environ.get("WORLD_SIZE", "1") == os.environ.get("LOCAL_WORLD_SIZE", "1")


def _own_url(port: int) -> str:
    host = "127.0.0.1" if _one_node() else os.environ["MASTER_ADDR"]
    return f"http://{host}:{port}"


def _reason(error: Exception) -> str:
    """The innermost cause: what requests and urllib3 wrap around it says little."""
    if isinstance(error, requests.Timeout):
        return "no answer in time"
    if isinstance(error, requests.ConnectionError):
        return "no connection, or it broke off"
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
