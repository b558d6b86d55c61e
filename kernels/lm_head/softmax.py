# mypy: allow-untyped-defs, allow-untyped-calls
"""A target's log-prob, entropy and 1 - p from sums over the other columns, and what else kernels of the head share.

Sums leave the target's own column out, so that logp and 1 - p keep their digits where p is near 1.
"""

import triton
import triton.language as tl

LOG2E, LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1e30)  # a logit past the vocabulary: finite, for 0 * (z - max) has to be 0


@triton.jit
def load_or(pointer, n, value):
    """pointer[n], or value without a pointer."""
    if pointer is None:
        return value
    else:  # Triton would compile what follows a return
        return tl.load(pointer + n)


@triton.jit
def exp(x):
    """e^x in two instructions. tl.exp takes five, for results below 1.2e-38; here those are 0."""
    return tl.exp2(x * LOG2E)


@triton.jit
def soft_capped(z, softcap):
    """(softcap * tanh(z / softcap), its derivative)."""
    e = exp(-2.0 / softcap * tl.abs(z))
    tanh = (1.0 - e) / (1.0 + e)
    slope = 4.0 * e / ((1.0 + e) * (1.0 + e))  # 1 - tanh^2, without its cancellation
    return tl.where(z < 0, -tanh, tanh) * softcap, slope


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
