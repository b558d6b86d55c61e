"""LongAct: which rows of queries and keys are trained, that the others do not move at all, and that ranks agree."""

import math
import os
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from long_act_on_ranks import HEADS, KEPT, UPDATES, conversations_of, packs_of, settings, weights_after
from torch import Tensor
from transformers import Phi3Config, Phi3ForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from cipo_fast.embedded.model import new_model
from cipo_fast.errors import UserError
from cipo_fast.learner import Learner
from cipo_fast.long_act import LongAct, largest
from cipo_fast.packing import build_trees, make_pack
from cipo_fast.policy import ATTENTION, Policy, build_policy

PROJECTIONS = ("q_proj", "k_proj")


def rows_kept(model: PreTrainedModel, conversations: list) -> dict[str, Tensor]:
    """The masks from the formula: a stock model, one conversation after another."""
    norms: Counter = Counter()

    def add(name: str, _module: Any, _inputs: Any, output: Tensor) -> None:
        norms[name] = norms[name] + output[0].square().sum(0).sqrt() / len(conversations)

    modules = {name: m for name, m in model.named_modules() if name.endswith(PROJECTIONS)}
    hooks = [m.register_forward_hook(partial(add, name)) for name, m in modules.items()]
    for conversation in conversations:
        ids = [token for segment in conversation.segments for token in segment.token_ids]
        with torch.no_grad():
            model(torch.tensor([ids]), use_cache=False)
    for hook in hooks:
        hook.remove()
    kept = {}
    for name, norm in norms.items():
        heads = HEADS[name[-6:]]
        mask = torch.zeros(heads, norm.numel() // heads, dtype=torch.bool)
        for h, row in enumerate(norm.view(heads, -1)):
            for d in sorted(range(len(row)), key=lambda d: -row[d].item())[:KEPT]:
                mask[h, d] = True
        kept[f"{name}.weight"] = mask.flatten()
    return kept


def adamw(p: Tensor, grad: Tensor, m: Tensor, v: Tensor, t: int, config: Any) -> Tensor:
    """One AdamW step written out; `m` and `v` change in place."""
    m.mul_(config.beta1).add_(grad, alpha=1 - config.beta1)
    v.mul_(config.beta2).add_(grad.square(), alpha=1 - config.beta2)
    step = (m / (1 - config.beta1**t)) / ((v / (1 - config.beta2**t)).sqrt() + 1e-8)
    return p * (1 - config.lr * config.weight_decay) - config.lr * step


@pytest.mark.parametrize("checkpointed", [False, True])
def test_masked_rows_stay_and_the_others_are_adamws(mesh, checkpointed: bool) -> None:
    """Four updates with momentum and weight decay, each with other conversations and so with another mask."""
    config = settings(f"model.activation_checkpointing={str(checkpointed).lower()}")
    model = new_model(config, ATTENTION)
    plain = new_model(config, ATTENTION)  # gives the gradients that nothing masks
    stock = new_model(config, "sdpa")
    learner = Learner(build_policy(model, config, mesh), config.optim, UPDATES)
    unmasked = Policy(plain, config)
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in plain.named_parameters()}
    changed: set[str] = set()
    masks_before: dict[str, Tensor] = {}
    for t in range(1, UPDATES + 1):
        before = {name: p.detach().clone() for name, p in plain.named_parameters()}
        stock.load_state_dict(before, strict=False)
        masks = rows_kept(stock, conversations_of(t))
        for pack in packs_of(t):
            unmasked(pack).loss.backward()
        for name, p in plain.named_parameters():
            mask = masks.get(name)
            p.grad *= 1.0 if mask is None else mask[:, None]
        norm = math.sqrt(sum(p.grad.square().sum().item() for p in plain.parameters()))
        factor = min(1.0, config.optim.max_grad_norm / (norm + 1e-6))
        assert factor < 1
        for name, p in plain.named_parameters():
            new = adamw(before[name], p.grad * factor, *moments[name], t, config.optim)
            p.data = new if name not in masks else torch.where(masks[name][:, None], new, before[name])
            p.grad = None
        update = learner.update(packs_of(t), t - 1)
        assert update.grad_norm == pytest.approx(norm, rel=1e-4)
        for name, whole in learner.policy.full_weights():
            torch.testing.assert_close(whole, dict(plain.named_parameters())[name], rtol=1e-5, atol=2e-5)
            if name in masks:
                assert torch.equal(whole[~masks[name]], before[name][~masks[name]]), name
                assert (whole[masks[name]] != before[name][masks[name]]).any(dim=1).all(), name
            else:
                assert not torch.equal(whole, before[name]), name
        with torch.no_grad():  # what rounding has parted goes on together
            for (_, whole), p in zip(learner.policy.full_weights(), plain.parameters(), strict=True):
                p.copy_(whole)
        changed |= {name for name in masks if t > 1 and not torch.equal(masks[name], masks_before[name])}
        masks_before = masks
    assert changed  # a row that was trained before, so that it has momentum, has stayed


def test_of_each_head_the_largest() -> None:
    norms = torch.tensor([[3.0, 1, 2, 4], [1, 1, 1, 1]])
    assert largest(norms, 0.5).tolist() == [[True, False, False, True], [True, True, False, False]]
    assert largest(norms, 0.01).sum(1).tolist() == [1, 1]


def test_what_is_measured_does_not_count(mesh) -> None:
    """Passes without an update (old log-probs, measurements) leave the masks alone."""
    config = settings()
    found = []
    for measured in (False, True):
        learner = Learner(Policy(new_model(config, ATTENTION), config), config.optim, 1)
        if measured:
            learner.measure([make_pack(build_trees(conversations_of(9)))])
            learner.with_log_probs(packs_of(9), need_old=True)
        learner.update(packs_of(1), 0)
        found.append({name: p.detach().clone() for name, p in learner.policy.named_parameters()})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_fused_projections_are_refused() -> None:
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = Phi3ForCausalLM(Phi3Config(**shape, vocab_size=8, pad_token_id=0))
    with pytest.raises(UserError, match=r"optim.long_act: Phi3ForCausalLM has no self_attn.q_proj .*set it to null"):
        LongAct(model, 0.3)


def test_a_bias_goes_with_its_row(mesh) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = Qwen2ForCausalLM._from_config(
        Qwen2Config(**shape, num_key_value_heads=2, vocab_size=50), attn_implementation=ATTENTION
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = settings("optim.weight_decay=0")
    Learner(Policy(model, config), config.optim, 1).update(packs_of(1), 0)
    moved = {name: p != before[name] for name, p in model.named_parameters()}
    for name, heads in HEADS.items():
        bias, weight = (moved[f"model.layers.0.self_attn.{name}.{part}"] for part in ("bias", "weight"))
        assert torch.equal(bias, weight.any(dim=1))
        assert bias.view(heads, -1).sum(1).tolist() == [KEPT] * heads


def test_two_ranks_are_one(mesh, tmp_path: Path) -> None:
    script = Path(__file__).with_name("long_act_on_ranks.py")
    done = subprocess.run(
        [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node=2", str(script),
         str(tmp_path / "weights.pt")],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=250, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found, start = torch.load(tmp_path / "weights.pt"), dict(new_model(settings(), ATTENTION).named_parameters())
    expected = weights_after(mesh, 0, 1)
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=2e-5)
        if name.split(".")[-2] in PROJECTIONS:
            still = (weight == start[name]).all(dim=1)
            assert 0 < still.sum() < len(still)
            assert torch.equal(still, (found[name] == start[name]).all(dim=1)), name
