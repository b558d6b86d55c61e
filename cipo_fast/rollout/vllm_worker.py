"""What runs inside vLLM's worker: checksums, the tied head's repair, weights from files. vLLM imports this file
where its worker lives (`worker_extension_cls`), in the trainer's process or in a server's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank
from vllm.distributed.weight_transfer import WeightTransferEngine, WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.model_executor.layers.linear import ColumnParallelLinear, LinearBase, RowParallelLinear
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from cipo_fast.rollout.checksums import checksum, to_ints
from cipo_fast.rollout.vllm import FILES

UNIT_VECTORS = 1024  # columns of a packed weight read back at once

if torch.cpu._is_amx_tile_supported():
    # Linux lends AMX's tiles to who asks for them; vLLM's bfloat16 kernels use them without, and die (SIGILL).
    torch.cpu._init_amx()


class WorkerExtension:
    """Methods that vLLM adds to its worker, for `collective_rpc`."""

    def cipo_refresh_tied_head(self) -> None:
        refresh_tied_head(self.model_runner.get_model())  # type: ignore[attr-defined]

    def cipo_checksums(self) -> dict[str, int]:
        model, dtype = self.model_runner.get_model(), self.model_config.dtype  # type: ignore[attr-defined]
        return to_ints(dict(checksums(model, dtype)))


def refresh_tied_head(model: nn.Module) -> None:
    """On CPU the head multiplies with a packed copy of the embedding, which a reload of the embedding leaves as it was:
    log-probs stay those of the old head, without a warning."""
    head = getattr(model, "lm_head", None)
    if isinstance(head, ParallelLMHead) and head.weight.device.type == "cpu":
        head.quant_method.process_weights_after_loading(head)


@torch.inference_mode()
def checksums(model: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Of this worker's share of the model, by the checkpoint's names: of what it multiplies with, fused layers taken
    apart, padding cut off. What all tensor-parallel ranks hold alike is the first one's; the shares of all workers add
    up to the whole. Covered are linear layers, embedding, head, and unfused parameters and buffers that are not cut."""
    fused: dict[str, list[str]] = getattr(model, "packed_modules_mapping", {})
    head = getattr(model, "lm_head", None)
    for name, module in model.named_modules():
        prefix, _, last = name.rpartition(".")
        if isinstance(module, LinearBase):
            yield from _linear(module, [f"{prefix}.{part}" for part in fused.get(last, [last])], dtype)
        elif isinstance(module, VocabParallelEmbedding):
            if name != "lm_head" and get_pp_group().is_first_rank:  # with pipelining the last one may have it too
                yield f"{name}.weight", _vocabulary(module, [(0, module.weight)])
        elif get_tensor_model_parallel_rank() == 0:
            for own, tensor in _own_tensors(module):
                yield f"{name}.{own}", checksum(tensor)
    if isinstance(head, VocabParallelEmbedding):
        yield "lm_head.weight", _vocabulary(head, _blocks(head, partial(_apply_head, model, head), dtype))
        if (bias := getattr(head, "bias", None)) is not None:
            yield "lm_head.bias", _vocabulary(head, [(0, bias[:, None])])


def _linear(module: Any, names: list[str], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Of a layer that is one or several of the trainer's, stacked by output, and cut by output or by input."""
    by_input, by_output = isinstance(module, RowParallelLinear), isinstance(module, ColumnParallelLinear)
    cut = (by_input or by_output) and module.tp_size > 1
    if not cut and get_tensor_model_parallel_rank() > 0:
        return
    rank, shards = (module.tp_rank, module.tp_size) if cut else (0, 1)
    column = rank * module.input_size_per_partition if by_input else 0
    sizes: list[int] = module.output_partition_sizes  # of this rank
    stacked = len(names) == len(sizes)  # else the trainer's own layer is stacked
    parts = []  # (name, rows of this rank, where they begin in the trainer's tensor)
    here = whole = 0
    for i, size in enumerate(sizes):
        replicas = getattr(module, "num_kv_head_replicas", 1) if i else 1  # of keys and values, not of queries
        place, replica = divmod(rank, replicas) if by_output else (0, 0)
        if replica == 0:
            row = place * size + (0 if stacked else whole)
            parts.append((names[i if stacked else 0], slice(here, here + size), row))
        here += size
        whole += size * (shards // replicas if by_output else 1)
    found: dict[str, Tensor] = {}
    for start, block in _blocks(module, partial(module.quant_method.apply, module), dtype):
        for name, rows, row in parts:
            _add(found, f"{name}.weight", checksum(block[rows], row, column + start))
    if module.bias is not None and (by_output or rank == 0):
        for name, rows, row in parts:
            _add(found, f"{name}.bias", checksum(module.bias[rows], row))
    yield from found.items()


def _blocks(module: Any, apply: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """(first column, W[:, columns]) of what a layer multiplies with. On a CPU that is a packed copy, which only a
    product shows: unit vectors select its columns, exactly, all other terms of the sum being zero."""
    if module.weight.device.type != "cpu":
        yield 0, module.weight
        return
    inputs = module.embedding_dim if isinstance(module, VocabParallelEmbedding) else module.input_size
    if isinstance(module, RowParallelLinear):
        inputs = module.input_size_per_partition
    for start in range(0, inputs, UNIT_VECTORS):
        n = min(UNIT_VECTORS, inputs - start)
        units = torch.zeros(n, inputs, dtype=dtype)
        units[torch.arange(n), start + torch.arange(n)] = 1
        yield start, apply(units).T


def _apply_head(model: nn.Module, head: VocabParallelEmbedding, x: Tensor) -> Tensor:
    """As the logits processor does: with head_dtype=float32 it multiplies with another tensor than without."""
    processor = getattr(model, "logits_processor", None)
    return head.quant_method.apply(head, x) if processor is None else processor._apply_head(head, x, None)


def _vocabulary(module: VocabParallelEmbedding, blocks: Iterable[tuple[int, Tensor]]) -> Tensor:
    """Of [V, H] in blocks of columns, of which this rank has a range of rows, and then padding."""
    shard = module.shard_indices
    n, first = shard.num_org_elements, shard.org_vocab_start_index
    return torch.stack([checksum(block[:n], first, start) for start, block in blocks]).sum()


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False)
    for name, buffer in module.named_buffers(recurse=False):
        if name not in module._non_persistent_buffers_set:
            yield name, buffer


def _add(found: dict[str, Tensor], name: str, value: Tensor) -> None:
    found[name] = found[name] + value if name in found else value


@dataclass
class FilesInit(WeightTransferInitInfo):
    pass


@dataclass
class FilesUpdate(WeightTransferUpdateInfo):
    path: str  # a safetensors file that holds some of the parameters


class FileTransferEngine(WeightTransferEngine[FilesInit, FilesUpdate]):
    """Weights as safetensors files in shared memory: the trainer and the server are on one node."""

    init_info_cls = FilesInit
    update_info_cls = FilesUpdate

    def init_transfer_engine(self, init_info: FilesInit) -> None:
        pass

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, str]) -> None:
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: FilesUpdate) -> None:
        self.model.load_weights(iter(load_file(update_info.path).items()))

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        refresh_tied_head(self.model)

    def shutdown(self) -> None:
        pass


WeightTransferEngineFactory.register_engine(FILES, FileTransferEngine)
