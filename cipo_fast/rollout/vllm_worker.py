"""What runs inside vLLM's worker: fingerprints, the tied head's repair, weights from files. vLLM imports this file
where its worker lives (`worker_extension_cls`), in the trainer's process or in a server's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from vllm.distributed.weight_transfer import WeightTransferEngine, WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from cipo_fast.rollout.fingerprints import Fingerprint, fixed_vector, of_output, of_parameter
from cipo_fast.rollout.vllm import FILES


class WorkerExtension:
    """Methods that vLLM adds to its worker, for `collective_rpc`."""

    def cipo_refresh_tied_head(self) -> None:
        refresh_tied_head(self.model_runner.get_model())  # type: ignore[attr-defined]

    def cipo_fingerprints(self) -> dict[str, list[float]]:
        model, dtype = self.model_runner.get_model(), self.model_config.dtype  # type: ignore[attr-defined]
        return {name: list(found) for name, found in fingerprints(model, dtype)}


def refresh_tied_head(model: nn.Module) -> None:
    """On CPU the head multiplies with a packed copy of the embedding, which a reload of the embedding leaves as it was:
    log-probs stay those of the old head, without a warning."""
    head = getattr(model, "lm_head", None)
    if isinstance(head, ParallelLMHead) and head.weight.device.type == "cpu":
        head.quant_method.process_weights_after_loading(head)


@torch.inference_mode()
def fingerprints(model: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, Fingerprint]]:
    """By the checkpoint's names: fused layers are taken apart. With tensor parallelism a layer's output is a part of
    the whole, and says nothing: only unfused parameters are compared then."""
    fused: dict[str, list[str]] = getattr(model, "packed_modules_mapping", {})
    for name, module in model.named_modules():
        prefix, _, last = name.rpartition(".")
        if isinstance(module, LinearBase):
            if getattr(module, "tp_size", 1) > 1:
                continue
            sizes = getattr(module, "output_sizes", None) or [module.output_size]
            parts = [f"{prefix}.{part}" for part in fused.get(last, [last])]
            x = fixed_vector(module.input_size, torch.empty(0, dtype=dtype, device=_device(model)))
            yield from _parts(parts, "weight", module.quant_method.apply(module, x[None])[0], sizes)
            if module.bias is not None:
                yield from _parts(parts, "bias", module.bias, sizes)
        elif isinstance(module, ParallelLMHead):
            x = fixed_vector(module.embedding_dim, module.weight)
            y = module.quant_method.apply(module, x[None])[0]
            yield f"{name}.weight", of_output(y[: module.org_vocab_size])
        elif isinstance(module, VocabParallelEmbedding):
            yield f"{name}.weight", of_parameter(module.weight[: module.org_vocab_size])
        else:
            for own, parameter in module.named_parameters(recurse=False):
                yield f"{name}.{own}", of_parameter(parameter)


def _parts(names: list[str], kind: str, y: Tensor, sizes: list[int]) -> Iterator[tuple[str, Fingerprint]]:
    for name, part in zip(names, y.split(sizes), strict=True):
        yield f"{name}.{kind}", of_output(part)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


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
