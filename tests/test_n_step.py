"""NFPO's N-step weights: the identity they come from, by enumerating every answer; windows; what a pack gets."""

import itertools
import math

import pytest
import torch
from conversations import random_conversations
from torch import Tensor

from cipo_fast.n_step import n_step_weights, with_n_step
from cipo_fast.packing import Pack, build_trees, make_pack

VOCAB, LONGEST, END = 3, 4, 0
ANSWERS = [  # every answer there is: it ends with END, or after LONGEST tokens
    tokens
    for length in range(1, LONGEST + 1)
    for tokens in itertools.product(range(VOCAB), repeat=length)
    if END not in tokens[:-1] and (tokens[-1] == END or length == LONGEST)
]
# A table of logits, a row for each of the 15 states: what was said so far.
STATES = {s: i for i, s in enumerate(sorted({a[:t] for a in ANSWERS for t in range(len(a))}))}
FLAT = [(STATES[a[:t]], a[t]) for a in ANSWERS for t in range(len(a))]  # every token of every answer, in order
ANSWER_OF = torch.tensor([i for i, a in enumerate(ANSWERS) for _ in a])


@pytest.fixture
def policies() -> tuple[Tensor, Tensor, Tensor]:
    """(logits of pi, logits of mu, reward of each answer), fp64."""
    g = torch.Generator().manual_seed(0)
    mu = torch.randn(len(STATES), VOCAB, generator=g, dtype=torch.float64)
    pi = mu + 0.5 * torch.randn(len(STATES), VOCAB, generator=g, dtype=torch.float64)
    return pi.requires_grad_(), mu, torch.randn(len(ANSWERS), generator=g, dtype=torch.float64)


def token_logps(logits: Tensor) -> Tensor:
    """[tokens of all answers]."""
    state, token = torch.tensor(FLAT).T
    return logits.log_softmax(-1)[state, token]


def probabilities(logits: Tensor) -> Tensor:
    return torch.zeros(len(ANSWERS), dtype=torch.float64).index_add(0, ANSWER_OF, token_logps(logits)).exp()


def surrogate(log_ratio: Tensor, reward: Tensor, mu: Tensor, n: int, detached: bool) -> Tensor:
    """E_mu[R sum_t (rho_t - 1) w_t] over all answers; w by plain loops, differentiable unless detached."""
    total = torch.zeros((), dtype=torch.float64)
    for i, p in enumerate(probabilities(mu).detach()):
        own = log_ratio[i == ANSWER_OF]
        for t in range(len(own)):
            w = own[t + 1 : t + n].sum().exp()
            total = total + p * reward[i] * (own[t].exp() - 1) * (w.detach() if detached else w)
    return total


def test_there_is_every_answer(policies: tuple[Tensor, Tensor, Tensor]) -> None:
    assert probabilities(policies[0]).sum().item() == pytest.approx(1, abs=1e-14)


def test_the_whole_suffix_gives_the_difference_of_returns(policies: tuple[Tensor, Tensor, Tensor]) -> None:
    """J(pi) - J(mu) = E_mu[R sum_t (rho_t - 1) rho_{t+1:T}], and so are its gradients; PPO's (n = 1) are not."""
    pi, mu, reward = policies
    exact = ((probabilities(pi) - probabilities(mu)) * reward).sum()
    log_ratio = token_logps(pi) - token_logps(mu)
    whole, ppo = (surrogate(log_ratio, reward, mu, n, detached=False) for n in (LONGEST, 1))
    torch.testing.assert_close(whole, exact, rtol=1e-12, atol=1e-14)
    gradients = [torch.autograd.grad(x, pi, retain_graph=True)[0] for x in (exact, whole, ppo)]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-10, atol=1e-14)
    assert (gradients[2] - gradients[0]).norm() > 0.1 * gradients[0].norm()
    weights = n_step_weights(log_ratio.detach(), ANSWER_OF, LONGEST, math.inf)
    terms = probabilities(mu)[ANSWER_OF] * reward[ANSWER_OF] * (log_ratio.exp() - 1) * weights
    torch.testing.assert_close(terms.sum(), exact, rtol=1e-12, atol=1e-14)


def test_constant_weights_give_the_values_of_pi_in_the_states_of_mu(policies: tuple[Tensor, Tensor, Tensor]) -> None:
    """The gradient of constant w over the whole suffix is sum_s mu(s) sum_a dpi(a|s) Q_pi(s, a); PPO's has Q_mu."""
    pi, mu, reward = policies
    log_ratio = token_logps(pi) - token_logps(mu)

    def value(logits: Tensor, begin: tuple[int, ...]) -> Tensor:
        """Expected reward of answers that begin so, by `logits` from there on."""
        logp, total = token_logps(logits).detach(), torch.zeros((), dtype=torch.float64)
        for i, answer in enumerate(ANSWERS):
            if answer[: len(begin)] == begin:
                total = total + logp[i == ANSWER_OF][len(begin) :].sum().exp() * reward[i]
        return total

    def visited(state: tuple[int, ...]) -> Tensor:
        table = mu.log_softmax(-1)
        return sum((table[STATES[state[:t]], token] for t, token in enumerate(state)), mu.new_zeros(())).exp()

    for n, after in ((LONGEST, pi), (1, mu)):
        expected = sum(
            visited(s) * pi.softmax(-1)[i, a] * value(after, (*s, a)) for s, i in STATES.items() for a in range(VOCAB)
        )
        gradients = [
            torch.autograd.grad(x, pi, retain_graph=True)[0]
            for x in (expected, surrogate(log_ratio, reward, mu, n, detached=True))
        ]
        torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("n", [1, 2, 3, 50])
def test_windows_end_with_the_answer(n: int) -> None:
    log_ratio = torch.tensor([0.1, 0.2, -0.3, 0.7, 2.0, -0.5], dtype=torch.float64)
    answers = torch.tensor([0, 0, 0, 1, 2, 2])
    following = {
        1: [0.0, 0, 0, 0, 0, 0],
        2: [0.2, -0.3, 0, 0, -0.5, 0],
        3: [-0.1, -0.3, 0, 0, -0.5, 0],
        50: [-0.1, -0.3, 0, 0, -0.5, 0],
    }[n]
    expected = torch.tensor(following, dtype=torch.float64)
    torch.testing.assert_close(n_step_weights(log_ratio, answers, n, 9.0).log(), expected, rtol=0, atol=1e-12)
    capped = n_step_weights(log_ratio, answers, n, 0.25).log()
    torch.testing.assert_close(capped, expected.clamp(-0.25, 0.25), rtol=0, atol=1e-12)
    assert n_step_weights(log_ratio[:0], answers[:0], n, 1.0).shape == (0,)


def test_a_pack_is_weighed_against_old_logp_or_else_the_engine() -> None:
    pack = make_pack(build_trees(random_conversations(3, n_trees=2)))
    logp = pack.sampler_logp + torch.linspace(-0.3, 0.3, len(pack.sampler_logp))
    weighed = with_n_step(pack, logp, 3, 1.0)
    answers = pack.conversation.tolist()
    for t, w in enumerate((weighed.advantage / pack.advantage).tolist()):
        window = [s for s in (t + 1, t + 2) if s < len(answers) and answers[s] == answers[t]]
        assert math.log(w) == pytest.approx(sum((logp - pack.sampler_logp)[window].tolist()), abs=1e-5)
    assert torch.equal(weighed.rl_weight, pack.rl_weight)
    of_batch = with_n_step(Pack(**{**pack.__dict__, "old_logp": logp}), logp, 3, 1.0)
    assert torch.equal(of_batch.advantage, pack.advantage)  # ratios of 1
    first = pack.conversation == 0
    for unknown in (math.nan, -math.inf):  # what one answer's engine did not say, or denies, is no other answer's
        other = Pack(**{**pack.__dict__, "sampler_logp": pack.sampler_logp.masked_fill(first, unknown)})
        torch.testing.assert_close(with_n_step(other, logp, 3, 1.0).advantage[~first], weighed.advantage[~first])
        assert with_n_step(other, logp, 3, 1.0).advantage.isfinite().all()
