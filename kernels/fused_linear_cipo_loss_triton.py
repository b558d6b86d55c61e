# mypy: allow-untyped-defs, allow-untyped-calls
"""The head and its loss on Triton: cuBLAS GEMMs around one kernel, a program a target, that owns its row of logits.

For target n with raw logits r = x W^T, the formulas of fused_linear_logprob.py and fused_linear_cipo_loss.py:

    z = softcap * tanh((r + bias) / softcap) / temperature
    logp = z[target] - lse(z),   H = -sum_v p_v log p_v,   loss(logp, H)
    dz_v = g_logp * (onehot_v - p_v) - g_H * p_v * (log p_v + H),   g = d loss / d logp, d loss / d H
    dr_v = dz_v * (1 - tanh^2) / temperature

Sums leave the target's own column out, so that logp and 1 - p[target] keep their digits where p is near 1:
`logp_entropy_rest`. A target id outside the vocabulary gives logp = nan.

`token_loss_kernel` sweeps the row twice: for logp and H (online log-sum-exp), then to write dr over r. Logits are
fp32 from bf16 operands; dr is the next GEMMs' bf16 operand, packed in the first half of its own fp32 row. A row
costs 4 + 4 + 2 bytes a logit in the kernel, 4 written and 2 x 2 read by the GEMMs.
A sequence's ratio needs the whole row of targets first: `logp_kernel` and `gradient_kernel` are the two sweeps, with
`target_loss` in torch between them. They are also fused_linear_logprob's forward and backward.

Every target's logp is an output, so none is left out of the first GEMM; weights of 0 give gradients of exactly 0.
Atomics: only in index_add_, where targets of one chunk share a hidden row. No host synchronisation.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .fused_linear_logprob import ChunkedHead, gemm
from .lm_head.terms import Options, Terms

BLOCK_V = 4096  # columns a program reads at once
NUM_WARPS = 8
OLD_LOGP, ADVANTAGE, RL_WEIGHT, CE_WEIGHT, REF_LOGP, SAMPLER_LOGP = (tl.constexpr(i) for i in range(len(Terms._fields)))
LOWEST = tl.constexpr(-1e30)  # a logit past the vocabulary: finite, for 0 * (z - max) has to be 0


@triton.jit
def minimum(a, b):
    """nan if one of them is: tl.minimum would return the other, and a diverged run would go on with a finite loss."""
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def maximum(a, b):
    """As `minimum`."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def soft_capped(z, softcap):
    """(softcap * tanh(z / softcap), its derivative)."""
    e = tl.exp(-2.0 * tl.abs(z) / softcap)
    tanh = (1.0 - e) / (1.0 + e)
    slope = 4.0 * e / ((1.0 + e) * (1.0 + e))  # 1 - tanh^2, without its cancellation
    return tl.where(z < 0, -tanh, tanh) * softcap, slope


@triton.jit
def _logits(row, bias, v, vocab, inv_t, softcap):
    """z at columns v of the row of raw logits, and dz/dr. inv_t: 1 / temperature, correctly rounded by its maker."""
    z = tl.load(row + v, mask=v < vocab, other=0.0)
    slope = inv_t
    if bias is not None:
        z += tl.load(bias + v, mask=v < vocab, other=0.0)
    if softcap is not None:
        z, slope = soft_capped(z, softcap)
        slope *= inv_t
    return tl.where(v < vocab, z * inv_t, LOWEST), slope


@triton.jit
def log1p(x):
    """log(1 + x) of x >= 0 to rounding: with u = fl(1 + x), log(u) / (u - 1) varies slowly (Kahan; Goldberg 1991)."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def logp_entropy_rest(d, s, t):
    """(logp, H, 1 - p) of a target with d = z[target] - k, from the sums over the *other* columns

        s = sum exp(z_v - k),   t = sum exp(z_v - k) (z_v - k)

    for any k. With e = exp(d): p = e / (s + e). Where p >= 1/2 no step subtracts what is nearly equal:

        logp = -log(1 + s / e),   H = -logp + (d s - t) / (s + e),   1 - p = s / (s + e)
    """
    e = tl.exp(d)
    total = s + e
    confident = s <= e
    logp = tl.where(confident, -log1p(s / tl.where(confident, e, 1.0)), d - tl.log(total))
    entropy = tl.where(confident, (d * s - t) / total - logp, tl.log(total) - (t + e * d) / total)
    return logp, entropy, s / total


@triton.jit
def _sweep_logp(row, bias, target, vocab, inv_t, softcap, BLOCK_V: tl.constexpr):
    """(m, log_s, logp, H, 1 - p) of a row: m = max z, log_s = lse(z) - m; s and t without the target's column."""
    dtype = row.dtype.element_ty
    m = tl.full((), LOWEST, dtype)
    s = tl.zeros((BLOCK_V,), dtype)  # a lane each, added up at the end
    t = tl.zeros((BLOCK_V,), dtype)
    for start in range(0, vocab, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        z, _ = _logits(row, bias, v, vocab, inv_t, softcap)
        new_m = tl.maximum(m, tl.max(z, 0))
        scale = tl.exp(m - new_m)
        e = tl.where(v == target, 0.0, tl.exp(z - new_m))
        t = scale * (t + (m - new_m) * s) + e * (z - new_m)
        s = scale * s + e
        m = new_m
    known = (target >= 0) & (target < vocab)
    z_target, _ = _logits(row, bias, tl.where(known, target, 0), vocab, inv_t, softcap)
    d = tl.where(known, z_target - m, float("nan"))
    others = tl.sum(s, 0)
    logp, entropy, rest = logp_entropy_rest(d, others, tl.sum(t, 0))
    return m, tl.log(others + tl.exp(d)), logp, entropy, rest


@triton.jit
def _sweep_gradient(
    row, d_row, bias, target, vocab, inv_t, softcap, m, log_s, entropy, rest, g_logp, g_entropy,
    WITH_ENTROPY: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Write dr to d_row, which may be row itself or, packed at half its width, the first half of it.

    A block's stores then end where the block's own loads end or before, so they can only hit what this block has
    loaded or what earlier blocks have: with a barrier between its loads and its stores, nothing unread is lost.
    """
    for start in range(0, vocab, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        z, slope = _logits(row, bias, v, vocab, inv_t, softcap)
        logp_v = z - m - log_s
        p = tl.exp(logp_v)
        dz = g_logp * tl.where(v == target, rest, -p)
        if WITH_ENTROPY:
            dz -= g_entropy * p * (logp_v + entropy)
        tl.debug_barrier()  # bar.sync: the loads of all warps are done
        tl.store(d_row + v, (dz * slope).to(d_row.dtype.element_ty), mask=v < vocab)


@triton.jit
def load_or(pointer, n, value):
    """pointer[n], or value without a pointer."""
    if pointer is None:
        return value
    else:  # Triton would compile what follows a return
        return tl.load(pointer + n)


@triton.jit
def _policy_term(q, a, p, eps_low, eps_high, dual_clip, CISPO: tl.constexpr):
    """(term of the policy, its d/d logp, clipped); that of q is q."""
    if CISPO:
        held = minimum(maximum(q, 1.0 - eps_low), 1.0 + eps_high)
        return held * a * p, held * a, held != q
    else:  # Triton would compile what follows a return
        free = q * a
        bounded = tl.minimum(tl.maximum(q, 1.0 - eps_low), 1.0 + eps_high) * a
        policy, clipped = minimum(free, bounded), bounded < free
        if dual_clip is not None:
            below = (a < 0) & (policy < dual_clip * a)
            policy, clipped = tl.where(below, dual_clip * a, policy), clipped | below
        return policy, tl.where(clipped, 0.0, free), clipped


@triton.jit
def target_loss_of_token(
    n, logp, entropy, terms, targets, eps_low, eps_high, dual_clip, beta, entropy_coef, is_cap,
    ON_POLICY: tl.constexpr, CISPO: tl.constexpr,
):  # fmt: skip
    """(loss, q, clipped, g_logp, g_entropy) of target n of `targets`."""
    rl, ce = tl.load(terms + RL_WEIGHT * targets + n), tl.load(terms + CE_WEIGHT * targets + n)
    on = rl != 0
    p = tl.where(on, logp, 0.0)
    old = p
    if not ON_POLICY:
        old = tl.where(on, tl.load(terms + OLD_LOGP * targets + n), 0.0)
    a = tl.where(on, tl.load(terms + ADVANTAGE * targets + n), 0.0)
    q = tl.exp(p - old)
    policy, slope, clipped = _policy_term(q, a, p, eps_low, eps_high, dual_clip, CISPO)
    importance = 1.0
    if is_cap is not None:
        sampler_logp = tl.load(terms + SAMPLER_LOGP * targets + n)
        importance = minimum(tl.exp(old - tl.where(on, sampler_logp, 0.0)), is_cap)
    loss = -importance * policy
    g = -importance * slope  # d/d logp
    if beta is not None:
        d = tl.where(on, tl.load(terms + REF_LOGP * targets + n), 0.0) - p
        loss += beta * (tl.exp(d) - d - 1.0)  # k3
        g += beta * (1.0 - tl.exp(d))
    g_entropy = 0.0
    if entropy_coef is not None:
        loss -= entropy_coef * tl.where(on, entropy, 0.0)
        g_entropy = -entropy_coef * rl
    loss = rl * loss - ce * tl.where(ce != 0, logp, 0.0)
    return loss, q, clipped, rl * g - ce, g_entropy


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


class TritonChunk(NamedTuple):
    """A chunk of n targets after `TritonHead.forward`; its logits are in the head's buffer: the next overwrites."""

    start: int
    x: Tensor  # [n, H]
    m: Tensor  # [n] max z
    log_s: Tensor  # [n] lse(z) - m
    logp: Tensor  # [n]
    entropy: Tensor  # [n]
    rest: Tensor  # [n] 1 - p[target]


class TritonHead(ChunkedHead):
    """bf16 operands stay bf16 and their logits are fp32.

    One [chunk, V] buffer: d(logits) lies over the logits.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.inv_temperature = None if self.temperature is None else self.temperature.reciprocal()  # [N]

    @staticmethod
    def auto_chunk_targets(weight: Tensor) -> int:
        if not weight.is_cuda:
            return ChunkedHead.auto_chunk_targets(weight)
        return gpu_chunk_targets(weight.shape[0])

    def operand_dtype(self, hidden: Tensor, weight: Tensor) -> torch.dtype:
        return hidden.dtype

    def allocate(self, rows: int) -> None:
        vocab = self.weight.shape[0]
        columns = triton.cdiv(vocab, 64) * 64  # aligned rows, whatever V
        buffer = torch.empty(rows, columns, dtype=self.dtype, device=self.weight.device)
        self.logits = buffer[:, :vocab]  # [chunk, V]
        self.d_logits = buffer.view(self.weight.dtype)[:, :vocab]  # [chunk, V] in the same memory

    def compute_logits(self, start: int, end: int) -> Tensor:
        """Targets start:end: their logits before bias, softcap and temperature, in the buffer. Returns x [n, H]."""
        x = self.gather(start, end)
        gemm(self.logits[: end - start], x, self.weight.T)
        return x

    def arguments(self, start: int) -> dict[str, Any]:
        """What every kernel of a chunk is launched with."""
        return {
            "first": start,
            "bias": self.bias,
            "target_id": self.target_id,
            "inv_temperature": self.inv_temperature,
            "vocab": self.weight.shape[0],
            "softcap": self.softcap,
            "BLOCK_V": BLOCK_V,
            "num_warps": NUM_WARPS,
        }

    def forward(self, start: int, end: int) -> TritonChunk:
        x = self.compute_logits(start, end)
        m, log_s, logp, entropy, rest = torch.empty(5, end - start, dtype=self.dtype, device=x.device).unbind()
        logp_kernel[(end - start,)](
            logits=self.logits, row_stride=self.logits.stride(0), **self.arguments(start),
            m_out=m, log_s_out=log_s, logp_out=logp, entropy_out=entropy, rest_out=rest,
        )  # fmt: skip
        return TritonChunk(start, x, m, log_s, logp, entropy, rest)

    def backward(self, chunk: TritonChunk, g_logp: Tensor, g_entropy: Tensor | None) -> None:
        n = len(chunk.x)
        gradient_kernel[(n,)](
            logits=self.logits, d_logits=self.d_logits, row_stride=self.logits.stride(0),
            d_row_stride=self.d_logits.stride(0), **self.arguments(chunk.start),
            m_in=chunk.m, log_s_in=chunk.log_s, entropy_in=chunk.entropy, rest_in=chunk.rest,
            g_logp_in=g_logp, g_entropy_in=g_entropy,
        )  # fmt: skip
        self.accumulate(self.pred_index[chunk.start : chunk.start + n], chunk.x, self.d_logits[:n])


def arguments(options: Options) -> dict[str, Any]:
    """None: a term that is not there, and not compiled."""
    return {
        "eps_low": options.eps_low,
        "eps_high": options.eps_high,
        "dual_clip": options.dual_clip,
        "beta": options.beta or None,
        "entropy_coef": options.entropy_coef or None,
        "is_cap": options.is_cap,
        "ON_POLICY": bool(options.on_policy),
        "CISPO": bool(options.cispo),
    }


def token_loss(head: TritonHead, group: Any, terms: Tensor, options: Options, _rows: None, out: Any) -> None:
    """As fused_linear_cipo_loss.py's `_group_loss`, for a group of one chunk and the ratio of tokens."""
    [(start, end)] = group.chunks
    x = head.compute_logits(start, end)
    token_loss_kernel[(end - start,)](
        logits=head.logits, d_logits=head.d_logits, row_stride=head.logits.stride(0),
        d_row_stride=head.d_logits.stride(0), **head.arguments(start), terms=terms, targets=terms.shape[1],
        **arguments(options), loss_out=out.loss, logp_out=out.logp, entropy_out=out.entropy, ratio_out=out.ratio,
        clipped_out=out.clipped,
    )  # fmt: skip
    head.accumulate(head.pred_index[start:end], x, head.d_logits[: end - start])


def gpu_chunk_targets(vocab: int, bytes_each: int = 4) -> int:
    """The largest multiple of 128 whose logits, of bytes_each, take at most 2 GiB; from 128 to 2^15."""
    return 128 * max(1, min(2**31 // (bytes_each * 128 * vocab), 2**8))
