"""The local engine: log-probs, end of answer, seeds, sync."""

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from cipo_fast.config import load_config
from cipo_fast.embedded.model import embedded_tokenizer, new_model
from cipo_fast.engines import twin_of
from cipo_fast.model import load_model
from cipo_fast.packing import build_trees, make_pack
from cipo_fast.policy import ATTENTION, build_policy
from cipo_fast.records import Conversation, Segment
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


def test_an_interrupted_sync_leaves_an_engine_that_refuses() -> None:
    e, other = engine(), model()

    def broken() -> Iterator[tuple[str, torch.Tensor]]:
        yield from list(other.named_parameters())[:5]
        raise ConnectionResetError("half-way")

    with pytest.raises(ConnectionResetError):
        e.sync(broken(), 1)
    for ask in (lambda: e.generate(PROMPTS, 1, Sampling(1.0, 1.0, 2), 0), lambda: e.score(PROMPTS)):
        with pytest.raises(RuntimeError, match="a sync comes first"):
            ask()
    e.sync(other.named_parameters(), 2)
    assert e.generate(PROMPTS[:1], 1, Sampling(1.0, 1.0, 2), 0)[0][0].policy_version == 2


def test_answers_are_cut_at_max_model_len_each_by_its_prompt() -> None:
    e = engine()
    whole = e.generate(PROMPTS, 3, Sampling(1.0, 1.0, 12), 4)
    e.max_model_len = 17
    cut = e.generate(PROMPTS, 3, Sampling(1.0, 1.0, 12), 4)
    shortened = 0
    for prompt, before, after in zip(PROMPTS, whole, cut, strict=True):
        room = min(12, 17 - len(prompt))
        for b, a in zip(before, after, strict=True):
            assert a.token_ids == b.token_ids[:room]
            assert a.logps == pytest.approx(b.logps[:room], abs=1e-5)
            assert a.truncated == (len(b.token_ids) > room or b.truncated)
            shortened += len(b.token_ids) > room
    assert shortened
    e.max_model_len = 15  # the length of a prompt
    with pytest.raises(RuntimeError, match="a prompt of 15 tokens leaves no room in 15"):
        e.generate(PROMPTS, 1, Sampling(1.0, 1.0, 12), 4)


def test_bfloat16_is_the_trainers_policy_after_1000_tokens_too(mesh: DeviceMesh) -> None:
    """RoPE's frequencies rounded to bfloat16 are off by a radian there: 0.14 nats a token, against 0.001 here."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 64}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "max_position_embeddings": 4096}
    shape = Qwen3Config(vocab_size=64, initializer_range=0.1, rope_theta=1e6, **sizes, **heads)
    m = Qwen3ForCausalLM._from_config(shape, attn_implementation=ATTENTION)
    with torch.no_grad():
        for name, p in m.named_parameters():
            if "q_norm" in name:
                p.fill_(3)  # attention that tells positions apart, as a trained model's does
            p.copy_(p.bfloat16())  # weights that both types hold
    ids = torch.randint(2, 64, (2000,)).tolist()
    truth = torch.tensor(LocalEngine(twin_of(m, "cpu", torch.float32), [1], 0, 8).score([ids])[0])
    local = LocalEngine(twin_of(m, "cpu", torch.bfloat16), [1], 0, 8)
    buffers = dict(m.named_buffers())
    assert all(torch.equal(b, buffers[name]) for name, b in local.model.named_buffers())
    assert {p.dtype for p in local.model.parameters()} == {torch.bfloat16}
    theirs = torch.tensor(local.score([ids])[0])
    pack = make_pack(
        build_trees([Conversation((Segment(ids[:1]), Segment(ids[1:])), None, "rollout", 0.0, 0.0, 0.0)], "rows")
    )
    policy = build_policy(m, load_config([], ["model.dtype=bfloat16"]), mesh)
    ours = policy.log_probs(pack, temperature=1.0)
    assert all(b.dtype == torch.float32 for b in policy.buffers())  # FSDP2 casts parameters alone
    late = slice(1000, None)
    assert (ours - theirs)[late].abs().mean() < 0.005
    assert (theirs - truth)[late].abs().mean() < 1.5 * (ours - truth)[late].abs().mean() < 0.05


def test_a_bfloat16_checkpoint_is_loaded_with_fp32_frequencies(tmp_path: Path) -> None:
    m = model()
    m.to(torch.bfloat16).save_pretrained(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "answer": "b"}')
    config = load_config([], [f"model.path={tmp_path}", f"data.train={tmp_path / 'rows.jsonl'}"])
    loaded = load_model(config, "sdpa")
    assert torch.equal(loaded.model.rotary_emb.inv_freq, model().model.rotary_emb.inv_freq)
    assert loaded.model.rotary_emb.inv_freq.dtype == torch.float32
