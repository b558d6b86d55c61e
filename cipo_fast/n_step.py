"""NFPO's N-step likelihood ratios (arXiv 2605.20865; read from its abstract, the form below is inferred from that).

With rho_t = pi(y_t) / mu(y_t), mu the policy that sampled, J(pi) - J(mu) = E_mu[R sum_t (rho_t - 1) rho_{t+1:T}],
exactly. PPO and GRPO take the ratios that follow a token as 1. N-step takes the next N - 1 of them as they are, as a
constant weight of the token's advantage:

    w_t = exp(clip(sum_{k=1}^{N-1} log rho_{t+k}, -cap, cap)),    M_t A rho_t w_t in place of M_t A rho_t

M_t is PPO's clip of rho_t. Windows end with the answer. N and the cap [ours]: none is published.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from cipo_fast.packing import Pack


def with_n_step(pack: Pack, logp: Tensor, n: int, cap: float) -> Pack:
    """The pack with each advantage times its w_t. logp [N]: of the policy that the update starts from.

    mu is old_logp where the batch has one, else the engine (nan where no engine sampled: a ratio of 1). The advantage
    and not rl_weight takes it, for KL and entropy bonus are no part of the identity above."""
    mu = pack.sampler_logp if pack.old_logp is None else pack.old_logp
    # A sum that is differences of running sums: what is not finite would reach all that follows.
    log_ratio = (logp.double() - mu.double()).nan_to_num(0.0, cap, -cap)
    weight = n_step_weights(log_ratio, pack.conversation, n, cap)
    return dataclasses.replace(pack, advantage=pack.advantage * weight.to(pack.advantage.dtype))


def n_step_weights(log_ratio: Tensor, conversation: Tensor, n: int, cap: float) -> Tensor:
    """w [N] from log rho [N], fp64; equal neighbours in `conversation` [N], which never falls, make an answer."""
    place = torch.arange(len(log_ratio), device=log_ratio.device)
    last = torch.searchsorted(conversation, conversation, right=True) - 1  # of each one's answer
    total = log_ratio.cumsum(0)
    following = total[torch.minimum(place + n - 1, last)] - total
    return following.clamp(-cap, cap).exp()
