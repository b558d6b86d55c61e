"""The fused loss against other people's: TRL's GRPOTrainer, Liger's GRPO loss, torch's cross-entropies. Tests skip
where those are not installed. All in fp32, as theirs compute: loss to 1e-5, gradients to 1e-5 of their largest."""

import pytest
import torch
import torch.nn.functional as F
from cipo_kernels import fused_linear_cipo_loss
from torch import Tensor

B, P, C, H, V = 4, 3, 6, 16, 57  # rows, tokens of their prompts and completions
EPS = {"eps_low": 0.2, "eps_high": 0.28}
WEIGHTS = {  # of a completion's token, by the name both libraries give its normalisation
    "grpo": lambda mask: mask / mask.sum(1, keepdim=True) / B,
    "bnpo": lambda mask: mask / mask.sum(),
    "dr_grpo": lambda mask: mask / (B * C),
}
OPTIONS = {  # ours
    "clip": {},
    "kl": {"beta": 0.3},
    "is": {"is_cap": 1.1},
    "sequence": {"ratio": "sequence", "beta": 0.3, "is_cap": 1.1},
}


@pytest.fixture(params=["torch", "triton"])
def _ours(request, monkeypatch) -> None:
    monkeypatch.setenv("CIPO_KERNELS", request.param)


def make_batch(vocab: int) -> dict[str, Tensor]:
    """[B, C] but for advantages [B]; old_logp is far enough from any fresh policy that some ratios are clipped."""
    g = torch.Generator().manual_seed(0)
    uniform = -torch.tensor(float(vocab)).log()
    old = uniform + 0.4 * torch.randn(B, C, generator=g)
    return {
        "ids": torch.randint(vocab, (B, C), generator=g),
        "mask": (torch.arange(C) < torch.tensor([[6], [1], [4], [5]])).float(),
        "advantages": torch.tensor([1.0, -1.0, 0.7, -0.4]),
        "old_logp": old,
        "ref_logp": old + 0.5 * torch.randn(B, C, generator=g),
        "sampler_logp": old + 0.3 * torch.randn(B, C, generator=g),
    }


def importance_ratio(batch: dict[str, Tensor], options: dict) -> Tensor | None:
    """What both libraries take ready made; ones without is_cap, None for Liger, say the same."""
    cap = options.get("is_cap")
    return None if cap is None else (batch["old_logp"] - batch["sampler_logp"]).exp().clamp(max=cap)


def ours(hidden: Tensor, weight: Tensor, pred_index: Tensor, batch: dict[str, Tensor], loss_type: str, **options):
    """hidden [T, H]; pred_index [B, C]."""
    names = ("old_logp", "ref_logp", "sampler_logp")
    return fused_linear_cipo_loss(
        hidden,
        weight,
        pred_index.flatten(),
        batch["ids"].flatten(),
        **{k: batch[k].flatten() for k in names},
        advantage=batch["advantages"].repeat_interleave(C),
        rl_weight=WEIGHTS[loss_type](batch["mask"]).flatten(),
        ce_weight=torch.zeros(B * C),
        row_lengths=[C] * B,
        chunk_targets=7,
        **EPS,
        **options,
    )


def assert_same(actual: Tensor, expected: Tensor, parameters: list[Tensor]) -> None:
    grads = [torch.autograd.grad(loss, parameters) for loss in (actual, expected)]
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    for d, e in zip(*grads, strict=True):
        assert e.abs().max() > 1e-4
        torch.testing.assert_close(d, e, rtol=1e-5, atol=1e-5 * e.abs().max().item())


# ---- TRL


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    """A GRPOTrainer around a two-layer Qwen3; its loss is called with batches of ours."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from cipo_fast.embedded.model import embedded_tokenizer

    torch.manual_seed(0)
    tokenizer = embedded_tokenizer()
    shape = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=H, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, tie_word_embeddings=True, initializer_range=0.2,
    )  # fmt: skip
    arguments = trl.GRPOConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")), use_cpu=True, bf16=False, report_to=[], num_generations=2,
        per_device_train_batch_size=B, max_completion_length=C, gradient_checkpointing=False, beta=0.0,
        epsilon=EPS["eps_low"], epsilon_high=EPS["eps_high"], temperature=0.9,
        use_bias_correction_kl=False,  # its default multiplies the KL by the ratio
    )  # fmt: skip
    made = trl.GRPOTrainer(
        model=Qwen3ForCausalLM(shape), reward_funcs=lambda completions, **_: [0.0] * len(completions), args=arguments,
        train_dataset=Dataset.from_list([{"prompt": "1+1="}]), processing_class=tokenizer,
    )  # fmt: skip
    made.current_gradient_accumulation_steps = 1  # what its training loop sets
    return made


@pytest.mark.usefixtures("_ours")
@pytest.mark.parametrize(
    ("name", "loss_type"),
    # TRL's entropy is a mean over tokens whatever the loss_type, ours has rl_weight: the same for bnpo
    [*((name, loss_type) for name in OPTIONS for loss_type in WEIGHTS), ("entropy", "bnpo")],
)
def test_trl_grpo_loss(name, loss_type, trainer, monkeypatch):
    options = OPTIONS.get(name, {"entropy_coef": 0.1})
    batch = make_batch(trainer.model.config.vocab_size)
    prompt = torch.arange(B * P).view(B, P) + 60
    ratio = importance_ratio(batch, options)
    settings = {
        "loss_type": loss_type,
        "beta": options.get("beta", 0.0),
        "importance_sampling_level": options.get("ratio", "token"),
        "use_vllm": ratio is not None,
        "vllm_importance_sampling_correction": ratio is not None,
        "entropy_coef": options.get("entropy_coef", 0.0),
        "_entropy_bonus_enabled": "entropy_coef" in options,
    }
    for key, value in settings.items():
        assert hasattr(trainer, key), key
        monkeypatch.setattr(trainer, key, value)
    expected = trainer._compute_loss(
        trainer.model,
        {
            "prompt_ids": prompt,
            "prompt_mask": torch.ones_like(prompt),
            "completion_ids": batch["ids"],
            "completion_mask": batch["mask"],
            "advantages": batch["advantages"],
            "old_per_token_logps": batch["old_logp"],
            "ref_per_token_logps": batch["ref_logp"],
            "importance_sampling_ratio": ratio,
        },
    )
    ids, mask = torch.cat((prompt, batch["ids"]), 1), torch.cat((torch.ones(B, P), batch["mask"]), 1)
    hidden = trainer.model.model(input_ids=ids, attention_mask=mask).last_hidden_state.flatten(0, 1)
    pred_index = torch.arange(B)[:, None] * (P + C) + P - 1 + torch.arange(C)
    weight = trainer.model.lm_head.weight
    out = ours(hidden, weight, pred_index, batch, loss_type, temperature=0.9, **options)
    assert 0 < out.clip_fraction < 1
    assert_same(out.loss, expected, list(trainer.model.parameters()))


# ---- Liger


@pytest.mark.usefixtures("_ours")
@pytest.mark.parametrize("loss_type", WEIGHTS)
@pytest.mark.parametrize("name", OPTIONS)
def test_liger_grpo_loss(name, loss_type):
    pytest.importorskip("liger_kernel")
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    options, batch, g = OPTIONS[name], make_batch(V), torch.Generator().manual_seed(1)
    hidden = torch.randn(B, C, H, generator=g).requires_grad_()
    weight = (0.2 * torch.randn(V, H, generator=g)).requires_grad_()
    bias = (0.2 * torch.randn(V, generator=g)).requires_grad_()
    liger = LigerFusedLinearGRPOLoss(
        beta=options.get("beta", 0.0), compiled=False, use_ref_model="beta" in options, loss_type=loss_type,
        temperature=0.9, epsilon_low=EPS["eps_low"], epsilon_high=EPS["eps_high"], max_completion_length=C,
        importance_sampling_level=options.get("ratio", "token"),
    )  # fmt: skip
    expected, *_ = liger(
        _input=hidden, lin_weight=weight, selected_token_ids=batch["ids"], attention_mask=batch["mask"],
        advantages=batch["advantages"], bias=bias, ref_per_token_logps=batch["ref_logp"],
        old_per_token_logps=batch["old_logp"], vllm_is_ratio=importance_ratio(batch, options),
    )  # fmt: skip
    pred_index = torch.arange(B * C).view(B, C)
    out = ours(hidden.flatten(0, 1), weight, pred_index, batch, loss_type, bias=bias, temperature=0.9, **options)
    assert 0 < out.clip_fraction < 1
    assert_same(out.loss, expected, [hidden, weight, bias])


# ---- torch


def linear_then_cross_entropy(x, weight, target, *, linear_bias, reduction):
    return F.cross_entropy(F.linear(x, weight, linear_bias), target, reduction=reduction)


@pytest.mark.usefixtures("_ours")
@pytest.mark.parametrize("fused", [False, True])
def test_cross_entropy_of_torch(fused):
    if fused and not hasattr(F, "linear_cross_entropy"):
        pytest.skip("this torch has no linear_cross_entropy")
    theirs = F.linear_cross_entropy if fused else linear_then_cross_entropy
    g = torch.Generator().manual_seed(2)
    leaves = [torch.randn(*shape, generator=g).requires_grad_() for shape in ((9, H), (V, H), (V,))]
    pred_index, target = torch.randint(9, (20,), generator=g), torch.randint(V, (20,), generator=g)
    ce_weight, zero = torch.rand(20, generator=g), torch.zeros(20)
    hidden, weight, bias = leaves
    out = fused_linear_cipo_loss(
        hidden, weight, pred_index, target, bias=bias, old_logp=None, advantage=zero, rl_weight=zero,
        ce_weight=ce_weight, chunk_targets=7,
    )  # fmt: skip
    each = theirs(hidden[pred_index], weight, target, linear_bias=bias, reduction="none")
    assert_same(out.loss, (ce_weight * each).sum(), leaves)
