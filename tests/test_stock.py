"""What the check against the stock model lets pass and what it does not: nothing in between is silently wrong."""

from collections.abc import Callable

import pytest
import torch
import transformers as hf
from torch import nn
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from cipo_fast.config import Config, load_config
from cipo_fast.errors import UserError
from cipo_fast.policy import ATTENTION, refuse_shape
from cipo_fast.stock import check_against_stock

SHAPE = dict(  # noqa: C408
    vocab_size=200, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, bos_token_id=None, eos_token_id=1, pad_token_id=0,
)  # fmt: skip
HEADS = dict(head_dim=8)  # noqa: C408
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, **HEADS)
GLM = dict(
    n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=0,
    moe_intermediate_size=16, **HEADS,
)  # fmt: skip
FULL = dict(layer_types=["full_attention"] * 2, **HEADS)
PROMPTS = [torch.randint(2, 200, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (40, 19, 33)]
LONGEST = 300


def settings(*more: str) -> Config:
    sizes = ["data.max_prompt_tokens=200", "correction.max_prompt_tokens=200", "rollout.max_tokens=100"]
    config = load_config([], ["model.path=any", "eval.max_tokens=100", *sizes, *more])
    assert config.max_model_len == LONGEST
    return config


def build(kind: str, **more: object) -> PreTrainedModel:
    torch.manual_seed(0)
    shape = getattr(hf, f"{kind}Config")(**{**SHAPE, **more})
    return AutoModelForCausalLM.from_config(shape, attn_implementation=ATTENTION)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("Qwen3", HEADS),
        ("Llama", {}),
        ("Phi3", {"sliding_window": 262144}),
        ("Phi3", {"sliding_window": LONGEST}),
        ("Mistral", {"sliding_window": LONGEST}),
        ("Gemma2", {**HEADS, "attn_logit_softcapping": None, "sliding_window": LONGEST}),  # caps its final logits
        ("Gemma3Text", {**HEADS, "sliding_window": LONGEST}),
        ("Granite", {"embedding_multiplier": 12.0, "residual_multiplier": 0.2}),
        ("Cohere", {"logit_scale": 1.0}),  # parallel blocks
        ("Olmo2", {}),
        ("SmolLM3", {}),  # layers without positions
        ("Glm4", HEADS),  # partial rotary
        ("Phi", {}),  # a head with a bias
        ("Mixtral", {"num_local_experts": 4}),
        ("Qwen3Moe", EXPERTS),
        ("Glm4Moe", GLM),
    ],
)
def test_what_is_exact_passes(kind: str, more: dict[str, object]) -> None:
    model = build(kind, **more)
    check_against_stock(model, settings(), PROMPTS)
    assert model.config._attn_implementation == ATTENTION


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        ("Granite", {"logits_scaling": 8.0}, "GraniteForCausalLM is not supported: its log-probs .* scales or shapes"),
        ("Cohere", {}, "CohereForCausalLM is not supported: its log-probs"),  # logit_scale, of 1/16
        ("Gemma2", {**FULL}, "caps its attention logits"),
        ("GptOss", {**FULL, "num_local_experts": 4, "num_experts_per_tok": 2}, "attention sinks"),
        ("Gemma3Text", {**FULL, "use_bidirectional_attention": True}, "tokens to come"),
        ("RecurrentGemma", {}, "is not supported: its hidden states"),
        ("Mixtral", {"num_local_experts": 4, "router_jitter_noise": 0.01}, "noise in training .router_jitter_noise"),
        ("Qwen3", {**HEADS, "attention_dropout": 0.1}, "noise in training .attention_dropout"),
        ("Jamba", {}, "linear_attention"),
        ("FalconH1", HEADS, "hybrid"),
        ("Qwen3Next", HEADS, "linear_attention"),
        ("Lfm2", {"layer_types": ["conv", "full_attention"]}, "conv"),
        ("Llama4Text", {**HEADS, "intermediate_size_mlp": 48, "num_local_experts": 2}, "place in the stream"),
        ("StableLm", {}, "cannot run on trees"),  # builds masks of its own
        ("Mistral", {"sliding_window": LONGEST - 1}, f"sliding_window={LONGEST - 1}.*longest sequence has {LONGEST} "),
        ("Gemma3Text", {**HEADS, "sliding_window": 299}, "sliding_window=299"),
    ],
)
def test_what_trees_would_change_is_refused(kind: str, more: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        check_against_stock(build(kind, **more), settings(), PROMPTS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["GPT2", "Bloom", "Mpt", "OPT"])
def test_models_of_another_plan_are_refused(kind: str) -> None:
    """Learned positions, ALiBi: no `.layers`, and what the check would find wrong is not even reached."""
    model = AutoModelForCausalLM.from_config(getattr(hf, f"{kind}Config")(vocab_size=200), attn_implementation="eager")
    model.config._attn_implementation = ATTENTION
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout"):
        if hasattr(model.config, key):
            setattr(model.config, key, 0.0)
    with pytest.raises(UserError, match="decoder layers"):
        check_against_stock(model, settings(), PROMPTS)


def sees_its_siblings(model: PreTrainedModel, patch: pytest.MonkeyPatch) -> None:
    def causal(module, q, k, v, attention_mask, *, tree, tree_impl, **kwargs):
        return sdpa_attention_forward(module, q, k, v, None, is_causal=True, **kwargs)

    patch.setitem(AttentionInterface._global_mapping, ATTENTION, causal)


def counts_positions_along_the_stream(model: PreTrainedModel, patch: pytest.MonkeyPatch) -> None:
    inner = model.model.rotary_emb.forward
    patch.setattr(model.model.rotary_emb, "forward", lambda x, position_ids: inner(x, torch.arange(x.shape[1])[None]))


def stretches_positions_where_it_trains(model: PreTrainedModel, patch: pytest.MonkeyPatch) -> None:
    inner = model.model.rotary_emb.forward
    patch.setattr(
        model.model.rotary_emb,
        "forward",
        lambda x, position_ids: inner(x, position_ids * (1.02 if model.training else 1.0)),
    )


def is_noisy_where_it_trains(model: PreTrainedModel, patch: pytest.MonkeyPatch) -> None:
    mlp = model.model.layers[0].mlp
    mlp.register_forward_hook(
        lambda module, _, out: out * (1 + 1e-3 * torch.randn(out.shape)) if module.training else out
    )


def has_a_head_of_its_own(model: PreTrainedModel, patch: pytest.MonkeyPatch) -> None:
    model.get_output_embeddings().register_forward_hook(lambda _m, _i, logits: logits * 1.01)


def is_not_a_number(model: PreTrainedModel, patch: pytest.MonkeyPatch) -> None:
    model.model.layers[1].mlp.register_forward_hook(lambda _m, _i, out: out * float("nan"))


@pytest.mark.parametrize(
    "fault",
    [
        sees_its_siblings,
        counts_positions_along_the_stream,
        stretches_positions_where_it_trains,
        is_noisy_where_it_trains,
        has_a_head_of_its_own,
        is_not_a_number,
    ],
)
@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1], [[7, 7]]], ids=["three", "one", "short"])
def test_a_model_that_does_otherwise_is_found(
    fault: Callable[[PreTrainedModel, pytest.MonkeyPatch], None],
    prompts: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a random model of transformers' default scale, whose hidden states hardly depend on what came before."""
    model = build("Llama")
    check_against_stock(model, settings(), prompts)
    fault(model, monkeypatch)
    with pytest.raises(UserError, match="LlamaForCausalLM is not supported"):
        check_against_stock(model, settings(), prompts)
    assert model.config._attn_implementation == ATTENTION


@pytest.mark.parametrize(
    ("kind", "more", "longest", "passes"),
    [
        ("Qwen2", {"use_sliding_window": False, "sliding_window": 64}, 1000, True),
        ("Qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}, 64, True),
        ("Qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}, 65, False),
        ("Qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2}, 1000, True),
        ("Phi3", {"sliding_window": 2047}, 2047, True),
        ("Phi3", {"sliding_window": 2047}, 2048, False),
        ("Mistral", {"sliding_window": None}, 1000, True),
        ("Llama4Text", {"attn_temperature_tuning": False, "attention_chunk_size": 128, **HEADS}, 128, True),
        ("Llama4Text", {"attn_temperature_tuning": False, "attention_chunk_size": 128, **HEADS}, 129, False),
    ],
)
def test_windows_count_the_token_itself(kind: str, more: dict[str, object], longest: int, passes: bool) -> None:
    shape = getattr(hf, f"{kind}Config")(**{**SHAPE, **more})
    if passes:
        refuse_shape(shape, longest)
    else:
        with pytest.raises(UserError, match=f"{longest - 1}.*{longest} tokens"):
            refuse_shape(shape, longest)


def test_a_window_as_long_as_a_sequence_changes_nothing() -> None:
    """The border, by the stock model itself: of that many tokens the last one sees the first; of one more, it does
    not."""
    model = build("Mistral", sliding_window=8)
    model.set_attn_implementation("eager")
    for length, changes in ((8, True), (9, False)):
        ids = torch.randint(2, 200, (1, length))
        other = ids.clone()
        other[0, 0] += 1 if ids[0, 0] < 199 else -1
        with torch.no_grad():  # one layer: two reach further together
            hidden = [model.model.layers[0](model.model.embed_tokens(x), **_inputs(model, x)) for x in (ids, other)]
        assert torch.equal(hidden[0][0, -1], hidden[1][0, -1]) is not changes


def _inputs(model: PreTrainedModel, ids: torch.Tensor) -> dict[str, object]:
    from transformers.masking_utils import create_sliding_window_causal_mask

    embeds = model.model.embed_tokens(ids)
    places = torch.arange(ids.shape[1])[None]
    mask = create_sliding_window_causal_mask(
        config=model.config, inputs_embeds=embeds, attention_mask=None, past_key_values=None, position_ids=places
    )
    return {"attention_mask": mask, "position_embeddings": model.model.rotary_emb(embeds, position_ids=places)}
