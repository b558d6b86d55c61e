"""The local engine: log-probs, end of answer, seeds, sync."""

import copy

import pytest
import torch
from transformers import PreTrainedModel

from cipo_fast.config import load_config
from cipo_fast.embedded.model import embedded_tokenizer, new_model
from cipo_fast.rollout import Sampling
from cipo_fast.rollout.local import LocalEngine

TOKENIZER = embedded_tokenizer()
PROMPTS = [TOKENIZER(text)["input_ids"] for text in ("ab", "a longer prompt", "x", "three")]


def model() -> PreTrainedModel:
    return new_model(load_config([], ["model.embedded.hidden=32", "model.embedded.mlp=48"]), "sdpa")


def engine(
    m: PreTrainedModel | None = None, eos: list[int] | None = None, pad: int | None = None, batch: int = 64
) -> LocalEngine:
    return LocalEngine(
        m or model(), eos or [TOKENIZER.eos_token_id], TOKENIZER.pad_token_id if pad is None else pad, batch
    )


def direct_logps(m: PreTrainedModel, prompt: list[int], answer: list[int], temperature: float) -> torch.Tensor:
    with torch.no_grad():
        logits = m(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).squeeze(1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_those_of_the_sampled_ids_at_the_temperature(temperature: float) -> None:
    e = engine()
    for prompt, completions in zip(PROMPTS, e.generate(PROMPTS, 3, Sampling(temperature, 1.0, 10), 0), strict=True):
        for c in completions:
            assert len(c.logps) == len(c.token_ids)
            expected = direct_logps(e.model, prompt, c.token_ids, temperature)
            assert torch.tensor(c.logps) == pytest.approx(expected, abs=2e-5)


def test_top_p_log_probs_are_those_of_the_cut_distribution() -> None:
    e = engine()
    completions = [c for cs in e.generate(PROMPTS, 8, Sampling(1.0, 0.5, 6), 0) for c in cs]
    full = [direct_logps(e.model, PROMPTS[i // 8], c.token_ids, 1.0) for i, c in enumerate(completions)]
    raised = torch.cat([torch.tensor(c.logps) - f for c, f in zip(completions, full, strict=True)])
    assert (raised > 0.3).all()  # renormalised over half the mass: about log 2 more


@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_answers_end_with_their_eos_whatever_the_pad(pad_is_eos: bool) -> None:
    m = model()
    eos = TOKENIZER.eos_token_id
    with torch.no_grad():
        m.lm_head.weight[eos] += 1.5 * m.model.norm.weight.sign()  # tied: shifts the input too, which is fine
    e = engine(m, pad=eos if pad_is_eos else None)
    completions = [c for cs in e.generate(PROMPTS, 16, Sampling(1.0, 1.0, 8), 1) for c in cs]
    ended = [c for c in completions if not c.truncated]
    assert ended
    assert any(c.truncated for c in completions)
    for c in completions:
        assert c.token_ids.count(eos) == (0 if c.truncated else 1)
        assert c.truncated == (len(c.token_ids) == 8 and c.token_ids[-1] != eos)
    for c in ended:
        assert c.token_ids[-1] == eos
        assert all(lp < 0 for lp in c.logps)


def test_several_eos_ids() -> None:
    likely = int(direct_argmax(engine().model, PROMPTS[0]))
    found = engine(eos=[TOKENIZER.eos_token_id, likely]).generate(PROMPTS[:1], 1, Sampling(0.0, 1.0, 8), 0)[0][0]
    assert found.token_ids == [likely]
    assert not found.truncated


def direct_argmax(m: PreTrainedModel, prompt: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return m(torch.tensor([prompt])).logits[0, -1].argmax()


def test_seeds_and_order() -> None:
    e = engine()
    s = Sampling(1.0, 1.0, 6)
    a, b, c = e.generate(PROMPTS, 2, s, 5), e.generate(PROMPTS, 2, s, 5), e.generate(PROMPTS, 2, s, 6)
    assert a == b != c
    greedy = e.generate(PROMPTS, 1, Sampling(0.0, 1.0, 6), 0)
    one_by_one = [e.generate([p], 1, Sampling(0.0, 1.0, 6), 0)[0] for p in PROMPTS]
    assert [[c.token_ids for c in g] for g in greedy] == [[c.token_ids for c in g] for g in one_by_one]
    small = engine(batch=2).generate(PROMPTS, 1, Sampling(0.0, 1.0, 6), 0)
    assert [[c.token_ids for c in g] for g in small] == [[c.token_ids for c in g] for g in greedy]


def test_sampling_leaves_the_global_generator_alone() -> None:
    e = engine()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    e.generate(PROMPTS, 2, Sampling(1.0, 1.0, 4), 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_sync_takes_all_weights_or_says_what_is_missing() -> None:
    e, other = engine(), model()
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.1)
    report = e.sync(other.named_parameters(), 7)
    assert (e.policy_version, report.version, report.parameters) == (7, 7, len(list(other.parameters())))
    assert all(torch.equal(p, q) for p, q in zip(e.model.parameters(), other.parameters(), strict=True))
    assert e.generate(PROMPTS[:1], 1, Sampling(0.0, 1.0, 2), 0)[0][0].policy_version == 7
    weights = dict(copy.deepcopy(other).named_parameters())
    missing = dict(list(weights.items())[1:])
    with pytest.raises(RuntimeError, match=next(iter(weights))):
        e.sync(missing.items(), 8)
    with pytest.raises(RuntimeError, match="no parameter nonsense"):
        e.sync([("nonsense", torch.zeros(1))], 8)
