"""Trees against one row a conversation, in fp64: the loss and every gradient; and what the policy refuses."""

import copy
from functools import partial

import pytest
import torch
from cipo_kernels import TreeLayout
from cipo_kernels.tree_attention import flash as tree_attention_flash
from conversations import random_conversations
from torch import Tensor
from transformers import (
    AttentionInterface,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from cipo_fast.config import Config, LossConfig, ModelConfig, RolloutConfig, load_config
from cipo_fast.errors import UserError
from cipo_fast.packing import Pack, build_trees, make_pack, split_tree
from cipo_fast.policy import ATTENTION, Policy, build_policy, cost_model
from cipo_fast.records import Conversation

VOCAB = 50
SHAPE = dict(  # noqa: C408
    vocab_size=VOCAB, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256,
)  # fmt: skip
LOSS = LossConfig(beta=0.1, entropy_coef=0.05, is_cap=1.5)


def build(kind: str = "qwen3", tied: bool = True, **more: object) -> PreTrainedModel:
    torch.manual_seed(0)
    config_class, model_class = {
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
        "llama": (LlamaConfig, LlamaForCausalLM),
    }[kind]
    config = config_class(**SHAPE, head_dim=8, tie_word_embeddings=tied, initializer_range=0.3, **more)
    model = model_class._from_config(config, attn_implementation=ATTENTION).double()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            # transformers' norms round to fp32 on the way, which would hide anything below 1e-7
            module.forward = partial(fp64_rms_norm, module)
    return model


def fp64_rms_norm(module: torch.nn.Module, x: Tensor) -> Tensor:
    return module.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon)


def pack_of(conversations: list[Conversation], packing: str) -> Pack:
    return make_pack(build_trees(conversations, packing))


def with_terms(pack: Pack, seed: int = 1) -> Pack:
    """The pack with an old_logp and ref_logp that depend on the conversation and target alone, not on the order."""
    values = {}
    for c in pack.conversations:
        draw = torch.Generator().manual_seed(seed + sum(map(hash, c.sampler_logps)) % 2**31)
        values[id(c)] = -4 * torch.rand(2, len(c.sampler_logps), generator=draw, dtype=torch.float64)
    old, ref = torch.cat([values[id(c)] for c in pack.conversations], dim=1)
    return Pack(**{**pack.__dict__, "old_logp": old, "ref_logp": ref})


def settings(loss: LossConfig | None = None, temperature: float = 1.0, attention: str = "auto") -> Config:
    return Config(
        loss=loss or LossConfig(),
        rollout=RolloutConfig(temperature=temperature),
        model=ModelConfig(attention=attention),
    )


def loss_and_gradients(
    model: PreTrainedModel, packs: list[Pack], loss: LossConfig = LOSS, attention: str = "auto"
) -> tuple[float, dict[str, Tensor]]:
    policy = Policy(model, settings(loss, 0.8, attention))
    policy.zero_grad()
    total = 0.0
    for pack in packs:
        output = policy(with_terms(pack))
        output.loss.backward()
        total += output.loss.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same(
    a: tuple[float, dict[str, Tensor]], b: tuple[float, dict[str, Tensor]], tolerance: float = 1e-9
) -> None:
    assert a[0] == pytest.approx(b[0], rel=tolerance)
    assert a[1].keys() == b[1].keys()
    for name in a[1]:
        scale = b[1][name].abs().max()
        assert scale > 0, name
        assert (a[1][name] - b[1][name]).abs().max() <= tolerance * scale, name


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_trees_equal_rows(kind: str, tied: bool, seed: int) -> None:
    conversations = random_conversations(seed, n_trees=3, depth=4, vocab=VOCAB)
    model = build(kind, tied)
    rows = [pack_of([c], "rows") for c in conversations]
    assert_same(loss_and_gradients(model, [pack_of(conversations, "tree")]), loss_and_gradients(model, rows))


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_every_depth_and_both_ratios(depth: int, ratio: str) -> None:
    conversations = random_conversations(10 + depth, n_trees=2, depth=depth, vocab=VOCAB)
    model, loss = build(), LossConfig(ratio=ratio, beta=0.1)
    rows = [pack_of([c], "rows") for c in conversations]
    assert_same(
        loss_and_gradients(model, [pack_of(conversations, "tree")], loss), loss_and_gradients(model, rows, loss)
    )


@pytest.mark.parametrize("seed", range(3))
def test_split_trees_equal_whole_ones(seed: int) -> None:
    conversations = random_conversations(20 + seed, n_trees=2, depth=4, vocab=VOCAB, max_children=4)
    model = build()
    trees = build_trees(conversations)
    capacity = max(tree.longest_path for tree in trees) + 2
    pieces = [piece for tree in trees for piece in split_tree(tree, capacity)]
    assert len(pieces) > len(trees)
    assert_same(
        loss_and_gradients(model, [make_pack([piece]) for piece in pieces]),
        loss_and_gradients(model, [make_pack(trees)]),
    )


def test_length_1_segments_and_duplicates_with_different_advantages() -> None:
    conversations = random_conversations(5, n_trees=4, depth=3, vocab=3, max_len=1, max_children=4)
    same = [c for c in conversations for d in conversations if c is not d and c.segments[:-1] == d.segments[:-1]
            and c.segments[-1].token_ids == d.segments[-1].token_ids]  # fmt: skip
    assert same  # equal siblings are there
    model = build()
    rows = [pack_of([c], "rows") for c in conversations]
    assert_same(loss_and_gradients(model, [pack_of(conversations, "tree")]), loss_and_gradients(model, rows))


def test_perturbing_a_sibling_changes_nothing_bitwise() -> None:
    conversations = random_conversations(7, n_trees=2, depth=3, vocab=VOCAB)
    policy = Policy(build().float(), settings())
    changed = next(
        c for c in conversations if all(c.segments[-1] not in d.segments for d in conversations if d is not c)
    )
    before_pack = pack_of(conversations, "tree")
    before = policy(before_pack, "logp")
    kept = torch.tensor([c is not changed for c in before_pack.conversations])[before_pack.conversation]
    segment = changed.segments[-1]
    segment.token_ids = [(t + 1) % VOCAB for t in segment.token_ids]
    after = policy(pack_of(conversations, "tree"), "logp")
    assert (before[kept] == after[kept]).all()
    assert (before[~kept] != after[~kept]).any()


def test_activation_checkpointing_changes_nothing() -> None:
    conversations = random_conversations(8, n_trees=2, depth=3, vocab=VOCAB)
    packs = [pack_of(conversations, "tree")]
    plain, recomputed = build(), build()
    recomputed.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(loss_and_gradients(recomputed, packs), loss_and_gradients(plain, packs))


@pytest.mark.parametrize("implementation", ["reference", "torch"])
def test_every_implementation_gives_the_same(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    conversations = random_conversations(9, n_trees=2, depth=3, vocab=VOCAB)
    packs = [pack_of(conversations, "tree")]
    expected = loss_and_gradients(build(), packs)
    monkeypatch.setenv("CIPO_KERNELS", implementation)
    assert_same(loss_and_gradients(build(), packs), expected)


@pytest.mark.parametrize("seed", range(2))
def test_flash_attention_over_rectangles_gives_the_same(seed: int) -> None:
    conversations = random_conversations(30 + seed, n_trees=3, depth=4, vocab=VOCAB)
    packs = [pack_of(conversations, "tree")]
    assert_same(loss_and_gradients(build(), packs, attention="flash"), loss_and_gradients(build(), packs))


def test_triton_gives_the_same_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted, where there is no GPU; the tolerance is fp32's, against fp64."""
    conversations = random_conversations(9, n_trees=2, depth=3, vocab=VOCAB)
    packs = [pack_of(conversations, "tree")]
    expected = loss_and_gradients(build(), packs)
    monkeypatch.setenv("CIPO_KERNELS", "triton")
    loss, gradients = loss_and_gradients(build().float(), packs)
    assert_same((loss, {name: gradient.double() for name, gradient in gradients.items()}), expected, 1e-4)


def test_sharded_policy_equals_the_plain_one(mesh) -> None:
    conversations = random_conversations(11, n_trees=2, depth=3, vocab=VOCAB)
    pack = pack_of(conversations, "tree")
    model = build().float()
    twin = copy.deepcopy(model)
    sharded = build_policy(twin, load_config([], ["rollout.temperature=0.8"]), mesh)
    plain = Policy(model, settings(temperature=0.8))
    a, b = plain(pack), sharded(pack)
    a.loss.backward()
    b.loss.backward()
    assert torch.equal(a.loss, b.loss)
    for (name, p), (_, q) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert torch.equal(p.grad, q.grad.full_tensor()), name


def test_a_sequences_importance_weight_is_the_product_of_its_tokens() -> None:
    """loss.is_level=sequence against plain autograd: -min(prod_t exp(old - sampler), cap) * clipped ratio * A."""
    conversations = random_conversations(12, n_trees=3, depth=3, vocab=VOCAB)
    for c in conversations:
        c.ce_weight = 0.0
    pack = with_terms(pack_of(conversations, "tree"))
    model = build()
    loss = LossConfig(is_cap=1.5, is_level="sequence", eps_low=0.2, eps_high=0.28)
    policy = Policy(model, settings(loss, 0.8))
    output = policy(pack)
    logp = policy(pack, "logp")
    total = torch.zeros((), dtype=torch.float64)
    capped = []
    for i in range(len(pack.conversations)):
        at = pack.conversation == i
        weight = (pack.old_logp[at] - pack.sampler_logp[at].double()).sum().exp()
        capped.append(bool(weight > 1.5))
        q, a = (logp[at] - pack.old_logp[at]).exp(), pack.advantage[at].double()
        clipped = torch.minimum(q * a, q.clamp(0.8, 1.28) * a)
        total = total - (pack.rl_weight[at].double() * weight.clamp(max=1.5) * clipped).sum()
    assert {True, False} == set(capped)
    torch.testing.assert_close(output.loss, total, rtol=1e-6, atol=0)


def test_transformers_builds_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    inner = AttentionInterface._global_mapping[ATTENTION]

    def spy(module, q, k, v, attention_mask, **kw):
        seen.append(attention_mask)
        return inner(module, q, k, v, attention_mask, **kw)

    monkeypatch.setitem(AttentionInterface._global_mapping, ATTENTION, spy)
    Policy(build(), settings())(pack_of(random_conversations(1, vocab=VOCAB), "tree"), "logp")
    assert seen == [None, None]


def test_attention_without_a_tree_or_with_a_mask_is_refused() -> None:
    model = build().float()
    ids = torch.tensor([[1, 2, 3]])
    with pytest.raises(ValueError, match="TreeLayout"):
        model(ids)
    with pytest.raises(ValueError, match="no attention mask"):
        model(ids, attention_mask=torch.ones(1, 1, 3, 3), tree=TreeLayout.from_parents([3], [-1]))


def tiny(config_class: type[PretrainedConfig], model_class: type[PreTrainedModel], **more: object) -> PreTrainedModel:
    return model_class._from_config(config_class(**SHAPE, **more), attn_implementation=ATTENTION)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny(MistralConfig, MistralForCausalLM, sliding_window=8), "sliding attention window"),
        (lambda: tiny(Gemma2Config, Gemma2ForCausalLM, head_dim=8), "sliding attention window"),
        (
            lambda: tiny(Gemma2Config, Gemma2ForCausalLM, head_dim=8, layer_types=["full_attention"] * 2),
            "caps its attention logits",
        ),
        (lambda: build("llama", attention_dropout=0.1), "has dropout"),
        (lambda: build(layer_types=["full_attention", "linear_attention"]), "linear_attention"),
    ],
)
def test_models_that_tree_attention_would_change_are_refused(make, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Policy(make(), settings())


def test_stock_attention_is_refused() -> None:
    model = build()
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="must be loaded with cipo_tree"):
        Policy(model, settings())


def test_cost_model_counts_the_weights_of_the_layers() -> None:
    model = build(tied=False)
    cost = cost_model(model.config, model.num_parameters())
    assert cost.per_token == 6 * (model.num_parameters() - 2 * VOCAB * 32)
    assert cost.per_target == 6 * VOCAB * 32


@pytest.mark.parametrize("attention", ["flash", "torch"])
def test_recomputed_layers_keep_their_attention(mesh, monkeypatch: pytest.MonkeyPatch, attention: str) -> None:
    pack = pack_of(random_conversations(12, n_trees=2, depth=3, vocab=VOCAB), "tree")
    seen = {"layers": 0, "attention": 0}
    layer_forward, attention_forward = Qwen3DecoderLayer.forward, tree_attention_flash._varlen_forward

    def count_layer(*args, **kwargs):
        seen["layers"] += 1
        return layer_forward(*args, **kwargs)

    def count_attention(q, k, v, call, scale):
        seen["attention"] += call.causal  # one such call an attention
        return attention_forward(q, k, v, call, scale)

    monkeypatch.setattr(Qwen3DecoderLayer, "forward", count_layer)
    monkeypatch.setattr(tree_attention_flash, "_varlen_forward", count_attention)
    gradients, runs = [], []
    for checkpointing in ("false", "true"):
        keys = [f"model.activation_checkpointing={checkpointing}", f"model.attention={attention}"]
        policy = build_policy(build().float(), load_config([], keys), mesh)
        policy(pack).loss.backward()
        gradients.append([p.grad.full_tensor() for p in policy.parameters()])
        runs.append(dict(seen))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    counted = 2 if attention == "flash" else 0  # one a layer
    assert runs[0] == {"layers": 2, "attention": counted}
    assert runs[1] == {"layers": 2 + 2 * 2, "attention": 2 * counted}  # layers go forward twice, attention does not
