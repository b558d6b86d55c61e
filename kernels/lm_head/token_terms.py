# mypy: allow-untyped-defs, allow-untyped-calls
"""`target_loss` and `target_loss_gradient` of a token, for a kernel: the formulas of terms.py.

A kernel takes terms as `stack_terms` makes them, a row of N targets each, and options as `loss_arguments` gives them.
"""

from typing import Any

import triton
import triton.language as tl

from .terms import Options, Terms

OLD_LOGP, ADVANTAGE, RL_WEIGHT, CE_WEIGHT, REF_LOGP, SAMPLER_LOGP = (tl.constexpr(i) for i in range(len(Terms._fields)))


def loss_arguments(options: Options) -> dict[str, Any]:
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


@triton.jit
def minimum(a, b):
    """nan if one of them is: tl.minimum would return the other, and a diverged run would go on with a finite loss."""
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def maximum(a, b):
    """As `minimum`."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


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
