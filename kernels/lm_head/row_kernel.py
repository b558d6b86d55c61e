# mypy: allow-untyped-defs, allow-untyped-calls
"""The head on Triton: cuBLAS GEMMs around one kernel, a program a target, that owns its row of logits.

`token_loss_kernel` sweeps the row twice: for logp and H (online log-sum-exp), then to write dr over r: the formulas of
head.py, and between them that of terms.py. Logits are fp32 from bf16 operands; dr is the next GEMMs' bf16 operand,
packed in the first half of its own fp32 row. A row costs 4 + 4 + 2 bytes a logit in the kernel, 4 written and 2 x 2
read by the GEMMs.
A sequence's ratio needs the whole row of targets first: `logp_kernel` and `gradient_kernel` are the two sweeps, with
`target_loss` in torch between them. They are also fused_linear_logprob's forward and backward.

Every target's logp is an output, so none is left out of the first GEMM; weights of 0 give gradients of exactly 0. A
target id outside the vocabulary gives logp = nan. No atomics, no host synchronisation.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch_configs import launch_config
from . import chunked
from .head import Head, gemm
from .softmax import LOWEST, exp, load_or, logp_entropy_rest, soft_capped
from .terms import Options, TargetOutputs
from .token_terms import loss_arguments, target_loss_of_token


class Block(NamedTuple):
    """Columns a program reads at once."""

    columns: int
    warps: int


BLOCK = Block(4096, 8)


@triton.jit
def _logits(row, bias, v, vocab, inv_t, softcap, INSIDE: tl.constexpr):
    """z at columns v of the row of raw logits, and dz/dr. inv_t: 1 / temperature, correctly rounded by its maker.

    INSIDE: all v are below vocab. Without a mask a row is loaded 16 bytes at once, whatever the vocabulary.
    """
    mask = None if INSIDE else v < vocab
    z = tl.load(row + v, mask=mask)
    slope = inv_t
    if bias is not None:
        z += tl.load(bias + v, mask=mask)
    if softcap is not None:
        z, slope = soft_capped(z, softcap)
        slope *= inv_t
    z *= inv_t
    return z if INSIDE else tl.where(v < vocab, z, LOWEST), slope


@triton.jit
def _sweep_logp(row, bias, target, vocab, inv_t, softcap, BLOCK_V: tl.constexpr):
    """(m, log_s, logp, H, 1 - p) of a row: m = max z, log_s = lse(z) - m; s and t without the target's column."""
    dtype = row.dtype.element_ty
    m = tl.full((BLOCK_V // 4,), LOWEST, dtype)
    s = tl.zeros((BLOCK_V // 4,), dtype)
    t = tl.zeros((BLOCK_V // 4,), dtype)
    inside = vocab // BLOCK_V * BLOCK_V
    for start in range(0, inside, BLOCK_V):
        m, s, t = _fold(m, s, t, row, bias, start, target, vocab, inv_t, softcap, True, BLOCK_V)
    if inside < vocab:
        m, s, t = _fold(m, s, t, row, bias, inside, target, vocab, inv_t, softcap, False, BLOCK_V)
    row_m = tl.max(m, 0)
    scale = exp(m - row_m)
    t = scale * (t + (m - row_m) * s)
    known = (target >= 0) & (target < vocab)
    z_target, _ = _logits(row, bias, tl.where(known, target, 0), vocab, inv_t, softcap, True)
    d = tl.where(known, z_target - row_m, float("nan"))
    others = tl.sum(scale * s, 0)
    logp, entropy, rest = logp_entropy_rest(d, others, tl.sum(t, 0))
    return row_m, tl.log(others + tl.exp(d)), logp, entropy, rest


@triton.jit
def _fold(m, s, t, row, bias, start, target, vocab, inv_t, softcap, INSIDE: tl.constexpr, BLOCK_V: tl.constexpr):
    """(m, s, t) [BLOCK_V // 4] with a block's columns, four to a lane and all four in one thread: no barrier."""
    lane = tl.arange(0, BLOCK_V // 4)
    v = start + tl.arange(0, 4)[:, None] * (BLOCK_V // 4) + lane[None, :]
    z, _ = _logits(row, bias, v, vocab, inv_t, softcap, INSIDE)
    new_m = tl.maximum(m, tl.max(z, 0))
    scale = exp(m - new_m)
    z -= new_m[None, :]
    e = tl.where(v == target, 0.0, exp(z))
    return new_m, scale * s + tl.sum(e, 0), scale * (t + (m - new_m) * s) + tl.sum(e * z, 0)


@triton.jit
def _sweep_gradient(
    row, d_row, bias, target, vocab, inv_t, softcap, m, log_s, entropy, rest, g_logp, g_entropy,
    WITH_ENTROPY: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Write dr to d_row, which may be row itself or, packed at half its width, the first half of it.

    A block's stores then end where the block's own loads end or before, so they can only hit what this block has
    loaded or what earlier blocks have: with a barrier between its loads and its stores, nothing unread is lost.
    """
    inside = vocab // BLOCK_V * BLOCK_V
    for start in range(0, inside, BLOCK_V):
        _gradient(
            row, d_row, bias, start, target, vocab, inv_t, softcap, m, log_s, entropy, rest, g_logp, g_entropy,
            WITH_ENTROPY, True, BLOCK_V,
        )  # fmt: skip
    if inside < vocab:
        _gradient(
            row, d_row, bias, inside, target, vocab, inv_t, softcap, m, log_s, entropy, rest, g_logp, g_entropy,
            WITH_ENTROPY, False, BLOCK_V,
        )  # fmt: skip


@triton.jit
def _gradient(
    row, d_row, bias, start, target, vocab, inv_t, softcap, m, log_s, entropy, rest, g_logp, g_entropy,
    WITH_ENTROPY: tl.constexpr, INSIDE: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    v = start + tl.arange(0, BLOCK_V)
    z, slope = _logits(row, bias, v, vocab, inv_t, softcap, INSIDE)
    logp_v = z - m - log_s
    p = exp(logp_v)
    dz = g_logp * tl.where(v == target, rest, -p)
    if WITH_ENTROPY:
        dz -= g_entropy * p * (logp_v + entropy)
    tl.debug_barrier()  # bar.sync: the loads of all warps are done
    tl.store(d_row + v, (dz * slope).to(d_row.dtype.element_ty), mask=None if INSIDE else v < vocab)


@triton.jit(do_not_specialize=["first", "targets"])
def token_loss_kernel(
    logits, d_logits, row_stride, d_row_stride, first, bias, target_id, inv_temperature, terms, targets,
    loss_out, logp_out, entropy_out, ratio_out, clipped_out,
    vocab, softcap, eps_low, eps_high, dual_clip, beta, entropy_coef, is_cap,
    ON_POLICY: tl.constexpr, CISPO: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Row i of logits belongs to target first + i of `targets`. None: a term that is not there."""
    i = tl.program_id(0).to(tl.int64)
    n = first + i
    row, target, inv_t = logits + i * row_stride, tl.load(target_id + n), load_or(inv_temperature, n, 1.0)
    m, log_s, logp, entropy, rest = _sweep_logp(row, bias, target, vocab, inv_t, softcap, BLOCK_V)
    loss, q, clipped, g_logp, g_entropy = target_loss_of_token(
        n, logp, entropy, terms, targets, eps_low, eps_high, dual_clip, beta, entropy_coef, is_cap, ON_POLICY, CISPO
    )
    tl.store(loss_out + n, loss)
    tl.store(logp_out + n, logp)
    tl.store(entropy_out + n, entropy)
    tl.store(ratio_out + n, q)
    tl.store(clipped_out + n, clipped)
    _sweep_gradient(
        row, d_logits + i * d_row_stride, bias, target, vocab, inv_t, softcap, m, log_s, entropy, rest,
        g_logp, g_entropy, entropy_coef is not None, BLOCK_V,
    )  # fmt: skip


@triton.jit(do_not_specialize=["first"])
def logp_kernel(
    logits, row_stride, first, bias, target_id, inv_temperature, m_out, log_s_out, logp_out, entropy_out, rest_out,
    vocab, softcap, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Row i of logits belongs to target first + i; outputs are the chunk's, at i."""
    i = tl.program_id(0).to(tl.int64)
    target, inv_t = tl.load(target_id + first + i), load_or(inv_temperature, first + i, 1.0)
    m, log_s, logp, entropy, rest = _sweep_logp(logits + i * row_stride, bias, target, vocab, inv_t, softcap, BLOCK_V)
    tl.store(m_out + i, m)
    tl.store(log_s_out + i, log_s)
    tl.store(logp_out + i, logp)
    tl.store(entropy_out + i, entropy)
    tl.store(rest_out + i, rest)


@triton.jit(do_not_specialize=["first"])
def gradient_kernel(
    logits, d_logits, row_stride, d_row_stride, first, bias, target_id, inv_temperature,
    m_in, log_s_in, entropy_in, rest_in, g_logp_in, g_entropy_in,
    vocab, softcap, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Row i of logits belongs to target first + i; the other inputs are the chunk's, at i."""
    i = tl.program_id(0).to(tl.int64)
    target, inv_t = tl.load(target_id + first + i), load_or(inv_temperature, first + i, 1.0)
    _sweep_gradient(
        logits + i * row_stride, d_logits + i * d_row_stride, bias, target, vocab, inv_t, softcap,
        tl.load(m_in + i), tl.load(log_s_in + i), tl.load(entropy_in + i), tl.load(rest_in + i),
        tl.load(g_logp_in + i), load_or(g_entropy_in, i, 0.0), g_entropy_in is not None, BLOCK_V,
    )  # fmt: skip


class Chunk(NamedTuple):
    """A chunk of n targets after `forward`; its logits are in the buffer: the next chunk overwrites them."""

    start: int
    x: Tensor  # [n, H]
    m: Tensor  # [n] max z
    log_s: Tensor  # [n] lse(z) - m
    logp: Tensor  # [n]
    entropy: Tensor  # [n]
    rest: Tensor  # [n] 1 - p[target]

    @property
    def lse(self) -> Tensor:
        return self.m + self.log_s


class Buffer(NamedTuple):
    """[chunk, V] both, in the same memory: d(logits) lies over the logits, in the first part of each row."""

    logits: Tensor
    d_logits: Tensor


def auto_chunk_targets(weight: Tensor) -> int:
    return gpu_chunk_targets(weight.shape[0]) if weight.is_cuda else chunked.auto_chunk_targets(weight)


def gpu_chunk_targets(vocab: int, bytes_each: int = 4) -> int:
    """The largest multiple of 128 whose logits, of bytes_each, take at most 2 GiB; from 128 to 2^15."""
    return 128 * max(1, min(2**31 // (bytes_each * 128 * vocab), 2**8))


def new_buffer(head: Head, rows: int) -> Buffer:
    vocab = head.weight.shape[0]
    columns = triton.cdiv(vocab, 64) * 64  # aligned rows, whatever V
    memory = torch.empty(rows, columns, dtype=head.dtype, device=head.weight.device)
    return Buffer(memory[:, :vocab], memory.view(head.weight.dtype)[:, :vocab])


def forward(head: Head, buffer: Buffer, start: int, end: int) -> Chunk:
    """Targets start:end: one GEMM, then their log-probs and entropies."""
    x = _logits_of(head, buffer, start, end)
    m, log_s, logp, entropy, rest = torch.empty(5, end - start, dtype=head.dtype, device=x.device).unbind()
    logp_kernel[(end - start,)](
        logits=buffer.logits, row_stride=buffer.logits.stride(0), **_arguments(head, start),
        m_out=m, log_s_out=log_s, logp_out=logp, entropy_out=entropy, rest_out=rest,
    )  # fmt: skip
    return Chunk(start, x, m, log_s, logp, entropy, rest)


def d_logits(head: Head, buffer: Buffer, chunk: Chunk, g_logp: Tensor, g_entropy: Tensor | None) -> Tensor:
    """dr [n, V], over the chunk's logits, given d loss/d logp and d loss/d entropy [n]."""
    gradient_kernel[(len(chunk.x),)](
        logits=buffer.logits, d_logits=buffer.d_logits, row_stride=buffer.logits.stride(0),
        d_row_stride=buffer.d_logits.stride(0), **_arguments(head, chunk.start),
        m_in=chunk.m, log_s_in=chunk.log_s, entropy_in=chunk.entropy, rest_in=chunk.rest,
        g_logp_in=g_logp, g_entropy_in=g_entropy,
    )  # fmt: skip
    return buffer.d_logits[: len(chunk.x)]


def rescaled(chunk: Chunk, mine: Tensor, log_share: Tensor, logp: Tensor, entropy: Tensor, rest: Tensor) -> Chunk:
    """As one of vocab_parallel.py's, whose columns have the share exp(log_share) [n] of the probability."""
    return chunk._replace(log_s=chunk.log_s - log_share, logp=logp, entropy=entropy, rest=rest)


def token_loss(
    head: Head, buffer: Buffer, start: int, end: int, terms: Tensor, options: Options, out: TargetOutputs
) -> tuple[Tensor, Tensor]:
    """(x [n, H], dr [n, V]) of targets start:end; their outputs are written. For the ratio of tokens."""
    x = _logits_of(head, buffer, start, end)
    token_loss_kernel[(end - start,)](
        logits=buffer.logits, d_logits=buffer.d_logits, row_stride=buffer.logits.stride(0),
        d_row_stride=buffer.d_logits.stride(0), **_arguments(head, start), terms=terms, targets=terms.shape[1],
        **loss_arguments(options), loss_out=out.loss, logp_out=out.logp, entropy_out=out.entropy, ratio_out=out.ratio,
        clipped_out=out.clipped,
    )  # fmt: skip
    return x, buffer.d_logits[: end - start]


def _logits_of(head: Head, buffer: Buffer, start: int, end: int) -> Tensor:
    """Targets start:end: their logits before bias, softcap and temperature, in the buffer. Returns x [n, H]."""
    x = head.gather(start, end)
    gemm(buffer.logits[: end - start], x, head.weight.T)
    return x


def _arguments(head: Head, start: int) -> dict[str, Any]:
    """What every kernel here is launched with."""
    block = launch_config("row_kernel", BLOCK, head.weight.device)
    return {
        "first": start,
        "bias": head.bias,
        "target_id": head.target_id,
        "inv_temperature": head.inv_temperature,
        "vocab": head.weight.shape[0],
        "softcap": head.softcap,
        "BLOCK_V": block.columns,
        "num_warps": block.warps,
    }
