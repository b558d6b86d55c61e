"""LongAct [arXiv 2604.14922]: of queries and keys only the dimensions of the largest activations are trained.

    M[h, d] = mean over the update's conversations of sqrt(sum_s Q[s, h, d]^2), the same for K
    per head the largest `share` of the dims d keep their rows of dW_Q (dW_K); values, output and MLP learn in full

What the paper leaves open [ours]: M is taken anew in every update, from its own forward pass, where a conversation's s
are all tokens of its path, prompt and answer. Q and K are taken as the projections give them, before their norms and
before RoPE, where activation (h, d) is row (h, d) of the weight (and its bias, which goes with the row). A row outside
the mask does not move at all: its gradient is 0, which also counts for the norm that is clipped and for AdamW's
moments, and what momentum and weight decay would do to the row is undone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from cipo_fast.errors import UserError
from cipo_fast.packing import Pack
from cipo_fast.policy import decoder_layers


@dataclass
class _Projection:
    """A layer's queries or keys: `module`'s output and rows are [heads * dims]."""

    module: nn.Linear
    dims: int  # of a head
    norms: Tensor  # [heads * dims] fp32, sums over conversations of sqrt(sum_s x^2)


class LongAct:
    """Raises UserError for a model whose queries and keys are not projections of their own."""

    def __init__(self, model: PreTrainedModel, share: float):
        self.share = share
        self.pack: Pack | None = None  # whose activations are seen now
        self.projections = [projection for layer in decoder_layers(model) for projection in _of(model, layer)]
        for projection in self.projections:
            projection.module.register_forward_hook(self._hook(projection))

    def reset(self) -> None:
        """An update begins."""
        for projection in self.projections:
            projection.norms = torch.zeros_like(projection.norms)

    @contextmanager
    def seeing(self, pack: Pack) -> Iterator[None]:
        """The forward pass inside is of `pack`, and counts. (A checkpointed layer's second one is not inside.)"""
        self.pack = pack
        yield
        self.pack = None

    @contextmanager
    def masked(self) -> Iterator[None]:
        """To be entered with the update's gradients complete, and left after the optimiser's step. A collective."""
        held = []
        for weight, mask in self._masks():
            if weight.grad is not None:
                _local(weight.grad).mul_(mask)
            held.append((weight, mask, _local(weight).detach().clone()))
        yield
        with torch.no_grad():
            for weight, mask, before in held:
                own = _local(weight)
                own.copy_(torch.where(mask, own, before))

    def _masks(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """(parameter, this rank's mask [its rows, 1], or [its rows] of a bias)."""
        for projection in self.projections:
            norms = projection.norms
            if dist.is_initialized() and dist.get_world_size() > 1:
                dist.all_reduce(norms)
            # The mean divides all of them by one number, so their sums have its order.
            kept = largest(norms.view(-1, projection.dims), self.share).flatten()  # [heads * dims]
            for parameter in projection.module.parameters():
                yield parameter, _sharded_as(parameter, kept.view(-1, *[1] * (parameter.ndim - 1)))

    def _hook(self, projection: _Projection) -> Any:
        def add(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            if self.pack is None or not self.pack.conversations:
                return
            squares = output.detach()[0].float().square()  # [T, heads * dims]
            sums = _paths(self.pack).to(squares.dtype) @ squares  # [conversations, heads * dims]
            projection.norms = projection.norms.to(sums.device) + sums.sqrt().sum(0)

        return add


def largest(norms: Tensor, share: float) -> Tensor:
    """[heads, dims] bool: of each head the round(share * dims) dims of the largest norms, one at least; of equal ones
    the first."""
    count = max(1, round(share * norms.shape[1]))
    order = norms.sort(dim=1, descending=True, stable=True).indices
    return torch.zeros_like(norms, dtype=torch.bool).scatter(1, order[:, :count], True)


def _paths(pack: Pack) -> Tensor:
    """[conversations, T] bool: the tokens of each conversation, from its tree's root to its last token."""
    token = torch.arange(pack.layout.num_tokens, device=pack.last_token.device)
    last = pack.last_token[:, None]
    return (token <= last) & (last < pack.layout.subtree_end_of_token)


def _of(model: PreTrainedModel, layer: nn.Module) -> Iterator[_Projection]:
    text = model.config.get_text_config()
    attention = getattr(layer, "self_attn", None)
    dims = getattr(attention, "head_dim", None)
    queries = text.num_attention_heads
    for name, heads in (("q_proj", queries), ("k_proj", getattr(text, "num_key_value_heads", None) or queries)):
        module = getattr(attention, name, None)
        if not isinstance(module, nn.Linear) or dims is None or module.out_features != heads * dims:
            raise UserError(
                f"optim.long_act: {type(model).__name__} has no self_attn.{name} that gives each head its dimensions "
                "and nothing else; set it to null"
            )
        yield _Projection(module, dims, torch.zeros(heads * dims, device=module.weight.device))


def _sharded_as(parameter: nn.Parameter, mask: Tensor) -> Tensor:
    """This rank's part of `mask`, which all ranks have whole, as FSDP2 has cut the rows of `parameter`."""
    if not isinstance(parameter, DTensor):
        return mask
    return _local(distribute_tensor(mask, parameter.device_mesh, parameter.placements, src_data_rank=None))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
