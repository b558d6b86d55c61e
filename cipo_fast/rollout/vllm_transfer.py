"""The trainer's end of a weight transfer to a vLLM server: through vLLM's own engines, and never stuck in one.

Gathering a parameter is a collective of the trainer's ranks, sending it is a transport to another process that may die
at any time. The two meet in a queue: all ranks gather, in the main thread; the first rank's `Sender` sends, in a thread
of its own. When that one fails or hangs the ranks gather to the end all the same, and know it within a time-out.
"""

from __future__ import annotations

import queue
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

import torch
from safetensors.torch import save_file
from torch import Tensor
from vllm.distributed.weight_transfer import (
    HTTPVLLMWeightSyncClient,
    ParamMeta,
    TrainerWeightTransferEngine,
    VLLMWeightSyncClient,
    WeightSource,
    WeightTransferTrainerFactory,
)
from vllm.distributed.weight_transfer.base import TrainerInitInfo

from cipo_fast.rollout import EngineFailure
from cipo_fast.rollout.connection import Connection
from cipo_fast.rollout.vllm import FILES

BUCKET_BYTES = 2**28  # of parameters that wait in shared memory at once
END = None  # in the queue: no parameter follows


class SyncClient(HTTPVLLMWeightSyncClient):
    """vLLM's client over our connection: with its key, past its proxies. It asks nothing twice."""

    def __init__(self, http: Connection):
        super().__init__(http.url, http.timeout_s)
        self.http = http

    def _post(self, path: str, json: dict[str, Any] | None = None) -> None:
        self.http.request("POST", path, json, self.timeout, ())


class QueueSource(WeightSource):
    """What the main thread puts in, in the order and of the types that `parameters` declares."""

    def __init__(self, parameters: list[ParamMeta]):
        self.parameters = parameters
        self.items: queue.Queue[tuple[str, Tensor] | None] = queue.Queue(maxsize=8)

    def metadata(self) -> list[ParamMeta]:
        return self.parameters

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        while (item := self.items.get()) is not END:
            yield item


class Sender:
    """One transfer. `put` every parameter, then `finish`."""

    def __init__(self, engine: TrainerWeightTransferEngine, source: QueueSource, timeout_s: float):
        self.source = source
        self.deadline = time.monotonic() + timeout_s
        self.error: BaseException | None = None
        source.items = queue.Queue(maxsize=8)  # what an earlier transfer left behind is gone
        self.thread = threading.Thread(target=self._send, args=(engine,), daemon=True)
        self.thread.start()

    def put(self, name: str, tensor: Tensor) -> None:
        """Returns at once when the transfer has failed: the other ranks still gather."""
        if tensor.is_cuda:
            torch.cuda.current_stream().synchronize()  # the sender works on streams of its own
        self._put((name, tensor))

    def finish(self) -> None:
        """Raises EngineFailure unless everything has arrived in time."""
        self._put(END)
        self.thread.join(max(0.0, self.deadline - time.monotonic()))
        if self.thread.is_alive():
            raise EngineFailure("the weight transfer did not end in time")
        if self.error is not None:
            raise EngineFailure(f"the weight transfer failed: {self.error}") from self.error

    def _put(self, item: tuple[str, Tensor] | None) -> None:
        while self.thread.is_alive() and time.monotonic() < self.deadline:
            try:
                self.source.items.put(item, timeout=0.2)
                return
            except queue.Full:
                continue

    def _send(self, engine: TrainerWeightTransferEngine) -> None:
        try:
            engine.send_weights()
        except BaseException as error:
            self.error = error


def connect(
    kind: str, client: HTTPVLLMWeightSyncClient, parameters: list[ParamMeta], workers: int, timeout_s: float
) -> tuple[TrainerWeightTransferEngine, QueueSource]:
    """Meet the server's transfer engine. kind: nccl or shared_memory; `workers` counts the server's devices.

    Raises EngineFailure when that fails or takes longer than `timeout_s`. A connection to a dead server is dropped, not
    closed: NCCL may wait for its peer for ever."""
    source = QueueSource(parameters)
    info: TrainerInitInfo
    if kind == "nccl":
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        info = NCCLTrainerInitInfo(_own_address(client.base_url), _free_port(), workers + 1, rank=0)
    else:
        info = FilesTrainerInit(rank=0)
    met: queue.Queue[TrainerWeightTransferEngine | BaseException] = queue.Queue()

    def meet() -> None:
        try:
            met.put(WeightTransferTrainerFactory.trainer_init(info, client=client, source=source))
        except BaseException as error:
            met.put(error)

    threading.Thread(target=meet, daemon=True).start()
    try:
        engine = met.get(timeout=timeout_s)
    except queue.Empty:
        raise EngineFailure("the server's weight transfer was not met in time") from None
    if isinstance(engine, BaseException):
        raise EngineFailure(f"no weight transfer: {engine}") from engine
    return engine, source


def backend(kind: str) -> str:
    """vLLM's name of a transfer kind, for the server's `--weight-transfer-config`."""
    return "nccl" if kind == "nccl" else FILES


@dataclass
class FilesTrainerInit(TrainerInitInfo):
    backend: ClassVar[str] = FILES


class FileTrainerEngine(TrainerWeightTransferEngine[FilesTrainerInit]):
    """Parameters as safetensors files in shared memory, a bucket at a time."""

    init_info_cls = FilesTrainerInit

    @classmethod
    def trainer_init(
        cls, init_info: FilesTrainerInit, *, client: VLLMWeightSyncClient, source: WeightSource | None = None
    ) -> FileTrainerEngine:
        client.init_weight_transfer_engine({})
        return cls(client=client, source=source)

    def send_weights(self) -> None:
        assert self.source is not None
        shared = Path("/dev/shm")
        with tempfile.TemporaryDirectory(prefix="cipo-", dir=shared if shared.is_dir() else None) as folder:
            self.client.start_weight_update()
            for i, bucket in enumerate(_buckets(self.source)):
                path = Path(folder) / f"{i}.safetensors"
                save_file(bucket, path)
                self.client.update_weights({"path": str(path)})
                path.unlink()
            self.client.finish_weight_update()


WeightTransferTrainerFactory.register_engine(FILES, FileTrainerEngine)


def _buckets(source: WeightSource) -> Iterator[dict[str, Tensor]]:
    bucket: dict[str, Tensor] = {}
    size = 0
    for name, tensor in source:
        if bucket and size + tensor.nbytes > BUCKET_BYTES:
            yield bucket
            bucket, size = {}, 0
        bucket[name] = tensor.cpu().contiguous()
        size += tensor.nbytes
    yield bucket


def _own_address(server: str) -> str:
    """The address under which a server sees this node."""
    host = urlsplit(server).hostname or ""
    family = socket.getaddrinfo(host, 9)[0][0]
    with socket.socket(family, socket.SOCK_DGRAM) as s:
        s.connect((host, 9))
        return s.getsockname()[0]


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("", 0))
        return s.getsockname()[1]
