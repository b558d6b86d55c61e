"""The head in torch, a chunk at a time, in three [chunk, V] buffers; gradients by hand."""

from typing import NamedTuple

import torch
from torch import Tensor

from .head import Head


class Chunk(NamedTuple):
    """A chunk of n targets after `forward`; the [n, V] are the buffer's: the next chunk overwrites them."""

    x: Tensor  # [n, H]
    target: Tensor  # [n, 1]
    temperature: float | Tensor  # or [n, 1]
    logp_v: Tensor  # [n, V] log p
    p: Tensor  # [n, V]
    lse: Tensor  # [n, 1]: z = logp_v + lse
    logp: Tensor  # [n]
    entropy: Tensor  # [n]
    mine: Tensor | None = None  # [n, 1] bool: the target's column is here; None: all of them are

    @property
    def rest(self) -> Tensor:  # [n] 1 - p[target]
        return -torch.expm1(self.logp)


def auto_chunk_targets(weight: Tensor) -> int:
    """2^23 logits on CPU, 2^27 on a GPU (32 and 512 MiB a buffer), at least 64 targets."""
    return max(64, 2 ** (27 if weight.is_cuda else 23) // weight.shape[0])


def new_buffer(head: Head, rows: int) -> Tensor:
    return head.weight.new_empty(3, rows, head.weight.shape[0])  # z then p, log p, scratch


def linear_logits(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    out: Tensor | None = None,
) -> Tensor:
    """Logits z [n, V] of x [n, H], weight [V, H], bias [V]; temperature a number or [n, 1]; every step in `out`."""
    z = torch.mm(x, weight.T, out=out) if bias is None else torch.addmm(bias, x, weight.T, out=out)  # [n, V]
    if softcap is not None:
        z = torch.mul(torch.tanh(torch.div(z, softcap, out=out), out=out), softcap, out=out)
    if isinstance(temperature, Tensor) or temperature != 1.0:
        z = torch.div(z, temperature, out=out)
    return z


def forward(head: Head, buffer: Tensor, start: int, end: int) -> Chunk:
    """Targets start:end: one GEMM, then their log-probs and entropies."""
    buffer_z, buffer_logp, scratch = buffer[:, : end - start]
    target = head.target_id[start:end, None]
    t = 1.0 if head.temperature is None else head.temperature[start:end, None]
    x = head.gather(start, end)
    z = linear_logits(x, head.weight, head.bias, t, head.softcap, out=buffer_z)  # [n, V]
    logp_v = torch.log_softmax(z, 1, out=buffer_logp)
    logp = logp_v.gather(1, target)
    lse = z.gather(1, target) - logp
    p = torch.exp(logp_v, out=z)
    entropy = -torch.mul(p, logp_v, out=scratch).sum(1)
    return Chunk(x, target, t, logp_v, p, lse, logp[:, 0], entropy)


def d_logits(head: Head, buffer: Tensor, chunk: Chunk, g_logp: Tensor, g_entropy: Tensor | None) -> Tensor:
    """dr [n, V], given d loss/d logp and d loss/d entropy [n]. Overwrites the chunk."""
    _, target, t, logp_v, p, lse, _, entropy, mine = chunk
    if head.softcap is not None:  # tanh' = 1 - tanh^2, where tanh = z * temperature / softcap
        tanh = torch.add(logp_v, lse, out=buffer[2, : len(p)]).mul_(t / head.softcap)
        slope = tanh.square_().neg_().add_(1)
    g = g_logp[:, None] / t
    if g_entropy is None:
        dz = p.mul_(-g)
    else:
        dz = p.mul_(logp_v.add_(entropy[:, None]).mul_(-g_entropy[:, None] / t).sub_(g))
    dz.scatter_add_(1, target, g if mine is None else g * mine)
    return dz if head.softcap is None else dz.mul_(slope)


def rescaled(chunk: Chunk, mine: Tensor, log_share: Tensor, logp: Tensor, entropy: Tensor, rest: Tensor) -> Chunk:
    """As one of vocab_parallel.py's, whose columns have the share exp(log_share) [n] of the probability; in place."""
    log_share = log_share[:, None]
    chunk.logp_v.add_(log_share)
    chunk.p.mul_(log_share.exp())
    return chunk._replace(lse=chunk.lse - log_share, logp=logp, entropy=entropy, mine=mine[:, None])
