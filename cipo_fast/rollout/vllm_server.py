"""A vLLM server: token ids and log-probs over HTTP, weights through vLLM's own transfer engines.

The first rank starts it (`rollout.server.start`) and restarts it; or all find it by its URL. A server is ours or
refused: one that we started proves it by its name, one that we found by its version and settings, and every answer by
the label of the weights that it was sampled with, which no other trainer gives. During a sync the server is paused, and
a sync that breaks off leaves it so: nothing is sampled from half-updated weights.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cipo_fast.config import Config
from cipo_fast.distributed import is_main, on_main, together, told
from cipo_fast.errors import TrainingStopped, UserError, note
from cipo_fast.records import Completion
from cipo_fast.rollout import EngineFailure, Finished, Sampling, SyncReport
from cipo_fast.rollout.checksums import added
from cipo_fast.rollout.connection import CONNECT_TIMEOUT_S, Address, Connection
from cipo_fast.rollout.server_process import ServerProcess, served_name, transfer_kind
from cipo_fast.rollout.vllm import (
    VERSIONS,
    engine_arguments,
    refuse_unknown,
    sampling_arguments,
    scoring_arguments,
    tell,
)
from cipo_fast.rollout.vllm_guard import KEY

Wanted = dict[str, tuple[tuple[int, ...], torch.dtype]]
SAY_EVERY_S = 30.0  # that a server is still waited for
FREE = "free"  # label of weights that no trainer gives any more


def build_server_engine(
    folder: Path, config: Config, wanted: Wanted, eos_ids: list[int], device: str
) -> VllmServerEngine:
    """The engine, its server running and met. `folder` holds config.json and the tokenizer, no weights; `wanted` are
    the shapes and types of what the trainer will send. A collective; UserError when there is no such server."""
    settings = config.rollout.server
    process = on_main(lambda: ServerProcess(folder, config, device)) if settings.start else None
    address = told(process.address if process is not None else None)
    if address is None:
        assert settings.url is not None
        name = told(on_main(lambda: served_name(folder, config))) or ""
        address = Address(settings.url.rstrip("/"), name, os.environ.get(KEY) or None, started=False)
    engine = VllmServerEngine(address, process, told(_claim()), config, wanted, eos_ids, device)
    try:
        on_main(engine.meet)
        together(engine.try_out)
    except BaseException as error:
        engine.close()
        if isinstance(error, EngineFailure | TrainingStopped):
            raise UserError(f"rollout.engine=vllm_server: {error}") from None
        raise
    return engine


class VllmServerEngine:
    """A rank's client. `process` is the server itself, on the first rank, when the trainer has started it; `claim`
    names the run in the label of its weights; `wanted` are the (shape, type) of what the trainer will send, by name
    and in order."""

    def __init__(
        self,
        address: Address,
        process: ServerProcess | None,
        claim: str,
        config: Config,
        wanted: Wanted,
        eos_ids: list[int],
        device: str,
    ):
        self.settings = config
        self.config = config.rollout.server
        self.address = address
        self.process = process
        self.claim = claim
        self.model_path = config.model.path
        self.wanted_len = engine_arguments(config, device)["max_model_len"]
        self.max_sequences = config.rollout.vllm.max_sequences
        self.transfer_kind = transfer_kind(config, device)
        self.wanted = wanted
        self.eos_ids = eos_ids
        self.policy_version = -1
        self.max_model_len: int | None = None
        self.taken = False  # a server that we found, and claimed
        self.http = Connection(address, self.config.timeout_s, process.check if process is not None else lambda: None)

    def generate(
        self,
        prompts: Sequence[list[int]],
        n: int,
        sampling: Sampling,
        seed: int,
        finished: Finished | None = None,
    ) -> list[list[Completion]]:
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
        at_once = max(1, 2 * self.max_sequences // (n * dist.get_world_size()))  # twice what runs: no slot waits for us

        def ask(item: tuple[int, dict[str, Any]]) -> list[Completion]:
            i, body = item
            completions = self._generate(body)
            if finished is not None:
                tell(finished, i, completions)
            return completions

        return self.http.for_all(ask, enumerate(bodies), at_once)

    def sync(self, weights: Iterable[tuple[str, Tensor]], version: int) -> SyncReport:
        started = time.perf_counter()
        self.policy_version = -1
        sender, size, sent = None, 0, set()
        if is_main():
            from cipo_fast.rollout.vllm_transfer import Sender

            self.http.post("pause?mode=abort")
            sender = Sender(*self.transfer, self.config.timeout_s)
        for name, tensor in weights:
            self._check_parameter(name, tensor)
            sent.add(name)
            size += tensor.nbytes
            if sender is not None:
                sender.put(name, tensor)
        if missing := set(self.wanted) - sent:
            raise RuntimeError(f"sync: the trainer sent no {', '.join(sorted(missing)[:3])}")
        if sender is not None:
            sender.finish()
            self._commit(version)
        self.policy_version = version
        return SyncReport(version, len(sent), size, time.perf_counter() - started)

    def score(self, sequences: Sequence[list[int]]) -> list[list[float]]:
        self._check_ready()
        return self.http.for_all(self._score, sequences, max(1, len(sequences)))

    def checksums(self) -> dict[str, int]:
        answer = self.http.post("collective_rpc", {"method": "cipo_checksums"}, self.config.timeout_s)
        return added(answer["results"])

    def release(self) -> None:
        pass  # its devices are its own

    def restart(self) -> None:
        """Of a server that the trainer started; one found by URL is given the same time to come back."""
        self.policy_version = -1
        if not is_main():
            return
        try:
            if self.process is not None:
                self.process.stop()
                self.process.start()
            self.meet()
        except UserError as taken:
            raise TrainingStopped(str(taken)) from None
        except EngineFailure as failure:
            if self.process is None:
                raise TrainingStopped(f"the server did not come back: {failure}; start it anew") from None
            raise

    def prefix_cache(self) -> tuple[int, int] | None:
        found = self.http.metrics(("vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total"))
        if found is None:
            return None
        queries, hits = found.values()
        return int(queries), int(hits)

    def close(self) -> None:
        if self.process is not None:
            self.process.stop()
        elif self.taken:
            with suppress(EngineFailure, TrainingStopped):
                if self._holder() == self.claim:
                    self._label(FREE)
        self.http.close()

    def meet(self) -> None:
        """The first rank waits for the server, makes sure whose it is and sets up the weight transfer."""
        self._wait_until_healthy()
        self._recognise()
        if not self.address.started:
            self._take()
        self._connect()

    def try_out(self) -> None:
        """A token from its dummy weights: what it can load and cannot run shows here."""
        self._recognise()
        try:
            self.http.for_all(self._score, [[0, 0]], 1)
            refuse_unknown(self.wanted, self.checksums(), self.settings)
        except (EngineFailure, TrainingStopped) as failure:
            raise UserError(f"model.path={self.model_path}: vLLM cannot run it: {failure}{self._log_hint()}") from None

    def _check_ready(self) -> None:
        if self.policy_version < 0:
            raise RuntimeError("the server has no whole set of weights: a sync comes first")

    # -------------------------------------------------------------------------------------------------- one request

    def _generate(self, body: dict[str, Any]) -> list[Completion]:
        answer = self.http.post("inference/v1/generate", body, None)  # for_all looks for progress
        found = []
        for choice in sorted(answer["choices"], key=lambda c: c["index"]):
            if choice["finish_reason"] not in ("stop", "length"):
                raise EngineFailure(f"{self.http.url} ended an answer with {choice['finish_reason']!r}")
            self._check_label({span["version"] for span in choice["weight_versions"]})
            logps = [token["logprob"] for token in choice["logprobs"]["content"]]
            truncated = choice["finish_reason"] == "length"
            found.append(Completion(choice["token_ids"], logps, truncated, self.policy_version))
        return found

    def _check_label(self, labels: set[str]) -> None:
        if labels == {f"{self.claim}/{self.policy_version}"}:
            return
        if strangers := sorted(label for label in labels if not label.startswith(f"{self.claim}/")):
            raise TrainingStopped(
                f"{self.http.url} sampled with weights of another trainer ({strangers[0]!r}): a server serves one run, "
                "start one for each"
            )
        raise EngineFailure(f"{self.http.url} sampled with weights {sorted(labels)}, not {self.policy_version}")

    def _score(self, ids: list[int]) -> list[float]:
        body = {"token_ids": ids, "sampling_params": scoring_arguments()}
        answer = self.http.post("inference/v1/generate", body, None)
        positions = zip(answer["prompt_logprobs"][1:], ids[1:], strict=True)
        return [position[str(token)]["logprob"] for position, token in positions]

    # --------------------------------------------------------------------------------------------- start and weights

    def _commit(self, version: int) -> None:
        """New weights are in place: no key or value of the old ones may be found again."""
        self._label(f"{self.claim}/{version}")
        if not self.http.post("reset_prefix_cache")["success"]:
            raise EngineFailure(f"{self.http.url} kept its prefix cache, with keys and values of the old weights")
        self.http.post("resume")

    def _label(self, label: str) -> None:
        self.http.post("update_weight_version", {"new_version": label})

    def _holder(self) -> str:
        """The claim in the label of the server's weights."""
        return str(self.http.get("weight_info").get("weight_version")).rpartition("/")[0]

    def _check_parameter(self, name: str, tensor: Tensor) -> None:
        if self.wanted.get(name) != (tuple(tensor.shape), tensor.dtype):
            raise RuntimeError(f"sync: no parameter {name} of shape {tuple(tensor.shape)} and type {tensor.dtype}")

    def _wait_until_healthy(self) -> None:
        started = said = time.monotonic()
        deadline = started + self.config.start_timeout_s
        while True:
            try:
                self.http.request("GET", "health", None, CONNECT_TIMEOUT_S, ())
                return
            except EngineFailure as failure:
                self.http.check()  # one that has ended says why
                now = time.monotonic()
                if now - said > SAY_EVERY_S:
                    note(f"still waiting after {now - started:.0f} s: {failure}")
                    said = now
                if now > deadline:
                    raise EngineFailure(
                        f"{self.http.url} did not answer for {self.config.start_timeout_s:g} s{self._log_hint()}"
                    ) from None
            time.sleep(0.5)

    def _recognise(self) -> None:
        """TrainingStopped unless it is the server that we mean, with the settings that we sample with."""
        try:
            (model,) = self.http.get("v1/models")["data"]
            name, length = model["id"], model["max_model_len"]
        except (KeyError, TypeError, ValueError):
            raise TrainingStopped(
                f"{self.http.url}: what answers there is no vLLM server; see rollout.server.url"
            ) from None
        self.http.check()  # the name is ours alone, but it can have ended since
        if name != self.address.name:
            raise TrainingStopped(
                f"{self.http.url}: another server answers there, its model is {name!r} and not {self.address.name!r}; "
                + ("end it, or take another port" if self.address.started else "start it with the run's own settings")
            )
        self.max_model_len = length
        if not self.address.started:
            self._check_settings(length)

    def _check_settings(self, length: int) -> None:
        version = str(self.http.get("version").get("version"))
        if not version.startswith(VERSIONS):
            raise TrainingStopped(
                f"{self.http.url} runs vLLM {version}; tested with {', '.join(VERSIONS)}x: install that there"
            )
        if length != self.wanted_len:
            raise TrainingStopped(
                f"{self.http.url} holds sequences of {length} tokens, this run's are of {self.wanted_len}: start "
                "cipo_fast.serve with the run's own settings"
            )

    def _take(self) -> None:
        """Claim a server found by its URL. Whoever held it and lives elsewhere finds our label on its next answers."""
        host, _, rest = self._holder().partition(":")
        pid = rest.partition(":")[0]
        if host == socket.gethostname() and pid.isdigit() and int(pid) != os.getpid() and Path(f"/proc/{pid}").exists():
            raise TrainingStopped(
                f"{self.http.url} serves the run of process {pid} on {host}: end that run, or start another server"
            )
        self._label(f"{self.claim}/start")
        self.taken = True

    def _connect(self) -> None:
        """The first rank meets the server's transfer engine, which may still hold an earlier connection."""
        from vllm.distributed.weight_transfer import ParamMeta

        from cipo_fast.rollout.vllm_transfer import SyncClient, connect

        self.http.post("shutdown_weight_transfer_engine")
        workers = self.http.get("get_world_size")["world_size"]
        parameters = [ParamMeta(name, dtype, shape) for name, (shape, dtype) in self.wanted.items()]
        self.transfer = connect(self.transfer_kind, SyncClient(self.http), parameters, workers, self.config.timeout_s)

    def _log_hint(self) -> str:
        return f"; its log is {self.process.log}" if self.process is not None else ""


def _claim() -> str:
    """A run's name for its weights' labels: who holds a server, as well."""
    return f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
