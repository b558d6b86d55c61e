"""Are samples from the distribution they are said to be from? Chi-square of first and second tokens."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cipo_fast.records import Completion

SAMPLES = 4000
# The seeds are fixed, so nothing here fails now and then. Had they been drawn anew, a right sampler would fail one test
# in 10,000; sampled at T=0.9 instead of 1 the tests' models are far beyond.
FALSE_ALARMS = 1e-4

HOSTILE = {
    "a distribution of its own": {
        **{"do_sample": True, "temperature": 0.05, "top_p": 0.5, "top_k": 3, "min_p": 0.2, "typical_p": 0.5},
        **{"epsilon_cutoff": 0.05, "eta_cutoff": 0.05, "top_h": 0.5},
    },
    "penalties": {
        **{"repetition_penalty": 1.5, "encoder_repetition_penalty": 1.5, "no_repeat_ngram_size": 1},
        **{"exponential_decay_length_penalty": [0, 3.0], "guidance_scale": 2.0, "sequence_bias": [[[5], 9.0]]},
        "watermarking_config": {"greenlist_ratio": 0.25, "bias": 2.5},
    },
    "tokens that must or must not be": {
        **{"bad_words_ids": [[5]], "suppress_tokens": [6], "begin_suppress_tokens": [7], "min_new_tokens": 2},
        **{"min_length": 50, "forced_bos_token_id": 8, "forced_eos_token_id": 9, "eos_token_id": 1},
    },
    "another way to search": {"num_beams": 4, "num_return_sequences": 4, "length_penalty": 2.0, "early_stopping": True},
    "another result": {
        **{"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "use_cache": False},
        **{"max_length": 4, "max_time": 1e-9, "renormalize_logits": True, "cache_implementation": "static"},
    },
}


def shaped(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """[..., V] probabilities: at the temperature, the most likely tokens that hold top_p together, renormalised."""
    p = (logits.double() / temperature).softmax(-1)
    order = p.argsort(-1, descending=True)
    ordered = p.gather(-1, order)
    ordered[ordered.cumsum(-1) - ordered >= top_p] = 0
    return torch.zeros_like(p).scatter(-1, order, ordered / ordered.sum(-1, keepdim=True))


def p_values(
    next_logits: Callable[[list[list[int]]], Tensor],  # [N, V] after each of N sequences
    prompt: list[int],
    answers: Sequence[Completion],
    eos: Sequence[int],
    temperature: float,
    top_p: float,
) -> tuple[float, float]:
    """Of the answers' first and second tokens under the trainer's own probabilities; answers of two tokens."""
    first = shaped(next_logits([prompt]), temperature, top_p)[0]  # [V]
    after = shaped(next_logits([[*prompt, v] for v in range(len(first))]), temperature, top_p)  # [V, V]
    going_on = first.clone()
    going_on[list(eos)] = 0
    second = torch.cat([going_on @ after, (1 - going_on.sum())[None]])  # the last one: ended before
    seen = torch.tensor([[[*a.token_ids, len(first)][i] for i in (0, 1)] for a in answers])
    return chi_square(seen[:, 0], first), chi_square(seen[:, 1], second)


def logp_error(
    next_logits: Callable[[list[list[int]]], Tensor],
    prompt: list[int],
    answers: Sequence[Completion],
    temperature: float,
    top_p: float,
) -> float:
    """Largest |recorded log-prob - log-prob of the distribution asked for|, in nats."""
    found = []
    for i in (0, 1):
        some = [a for a in answers if len(a.token_ids) > i][:200]
        p = shaped(next_logits([prompt + a.token_ids[:i] for a in some]), temperature, top_p)
        taken = p.gather(1, torch.tensor([[a.token_ids[i]] for a in some])).log().squeeze(1)
        found.append((taken - torch.tensor([a.logps[i] for a in some])).abs().max().item())
    return max(found)


def chi_square(seen: Tensor, p: Tensor) -> float:
    """p-value of the outcomes `seen` [n] under p [K]. Cells that expect fewer than five are one cell together."""
    counts = torch.bincount(seen, minlength=len(p)).double()
    if counts[p == 0].any():
        return 0.0
    n = len(seen)
    rare = p * n < 5
    expected = torch.cat([p[~rare] * n, (p[rare].sum() * n)[None]])
    observed = torch.cat([counts[~rare], counts[rare].sum()[None]])
    if expected[-1] < 5:
        expected, observed = expected[:-1], observed[:-1]
    statistic = ((observed - expected) ** 2 / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2).double(), statistic / 2).item()
