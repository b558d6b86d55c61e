"""The policy: a Hugging Face causal LM, tree attention in place of its own, the loss inside the FSDP2 root.

Stock attention with tree positions is silently wrong (a rollout would see its siblings, or lose its prompt), so
`Policy` runs with `cipo_tree` attention only, and refuses models whose attention it would change.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from cipo_kernels import LossOutput, TreeLayout, device_rates, fused_linear_cipo_loss, fused_linear_logprob
from cipo_kernels.tree_attention import tree_attention
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel

from cipo_fast.config import Config
from cipo_fast.errors import UserError
from cipo_fast.model import cast_weights, tied_names
from cipo_fast.packing import CostModel, Pack

ATTENTION = "cipo_tree"
# Layers that see less than the whole sequence -> the key that says how much of it.
WINDOWS = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
NOISE = re.compile(r"drop|jitter")  # keys of what makes a model in training another one than in sampling
ATTENTION_OPS = ("cipo_kernels::tree_attention", "cipo_kernels::tree_attention_flash")


def cipo_tree_attention(
    module: nn.Module,
    query: Tensor,  # [1, Hq, T, D]
    key: Tensor,  # [1, Hkv, T, D]
    value: Tensor,  # [1, Hkv, T, D]
    attention_mask: Tensor | None,
    *,
    tree: TreeLayout | None = None,
    tree_impl: str = "auto",
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The attention function transformers calls in every layer; returns ([1, T, Hq, D], None)."""
    if softcap is not None:
        raise UserError("model.path: the model caps its attention logits; tree attention does not")
    if s_aux is not None:
        raise UserError("model.path: the model has attention sinks; tree attention has none")
    if is_causal is False or getattr(module, "is_causal", True) is False:
        raise UserError("model.path: the model looks at tokens to come; tree attention does not")
    if tree is None or attention_mask is not None or query.shape[0] != 1:
        raise ValueError("cipo_tree attention takes one packed stream and its TreeLayout, and no attention mask")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return tree_attention(q, k, v, tree, scale=scaling, impl=tree_impl)[None], None


# No mask function is registered under this name: transformers then builds no mask.
AttentionInterface.register(ATTENTION, cipo_tree_attention)


class Policy(nn.Module):
    """`policy(pack) -> LossOutput`, `policy(pack, "logp") -> logp [N] fp32`, `"measure"`: (logp, entropy).

    All run in `forward`, inside the FSDP root, so that its hooks unshard the head once for the fused loss; a head that
    is not the embedding has hooks of its own around `with_head`.
    """

    def __init__(self, model: PreTrainedModel, config: Config):
        super().__init__()
        refuse_unsupported(model, config.max_model_len)
        self.model = model
        self.loss = config.loss
        self.temperature = config.rollout.temperature
        self.attention = config.model.attention
        self.loss_impl = config.model.loss
        self.softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        self.train()

    def forward(
        self, pack: Pack, what: str = "loss", temperature: float | None = None
    ) -> LossOutput | Tensor | tuple[Tensor, Tensor]:
        hidden = self.model.base_model(
            input_ids=pack.input_ids[None],
            position_ids=pack.layout.position_ids[None],
            tree=pack.layout,
            tree_impl=self.attention,
            use_cache=False,
        ).last_hidden_state[0]  # [T, H]
        return self.with_head(hidden, pack, what, temperature)

    def with_head(
        self, hidden: Tensor, pack: Pack, what: str, temperature: float | None
    ) -> LossOutput | Tensor | tuple[Tensor, Tensor]:
        """What `forward` returns, of the last hidden states [T, H]."""
        head = self.model.get_output_embeddings()
        bias = getattr(head, "bias", None)
        inputs = (hidden, head.weight, pack.pred_index, pack.target_id)
        if what != "loss":
            temperature = self.temperature if temperature is None else temperature
            entropy = what == "measure"
            return fused_linear_logprob(
                *inputs, bias=bias, softcap=self.softcap, temperature=temperature, return_entropy=entropy
            )
        return fused_linear_cipo_loss(
            *inputs,
            old_logp=pack.old_logp,
            advantage=pack.advantage,
            rl_weight=pack.rl_weight,
            ce_weight=pack.ce_weight,
            ref_logp=pack.ref_logp,
            sampler_logp=self._sampler_logp(pack),
            eps_low=self.loss.eps_low,
            eps_high=self.loss.eps_high,
            clip=self.loss.clip,
            dual_clip=self.loss.dual_clip,
            beta=self.loss.beta,
            entropy_coef=self.loss.entropy_coef,
            is_cap=self.loss.is_cap,
            ratio=self.loss.ratio,
            row_lengths=pack.target_counts,
            temperature=self.temperature,
            bias=bias,
            softcap=self.softcap,
            impl=self.loss_impl,
        )

    @torch.no_grad()
    def log_probs(self, pack: Pack, temperature: float | None = None) -> Tensor:
        """[N] fp32, without a backward pass to follow; at the sampling temperature unless given."""
        logp = self(pack, "logp", temperature)
        self._reshard()
        return logp

    @torch.no_grad()
    def measure(self, pack: Pack) -> tuple[Tensor, Tensor]:
        """(log-probs [N], entropies [N]) fp32 at the sampling temperature, without a backward pass to follow."""
        found = self(pack, "measure")
        self._reshard()
        return found

    def _reshard(self) -> None:
        for module in (self, self.model.get_output_embeddings()):
            if isinstance(module, FSDPModule):
                module.reshard()  # FSDP2 leaves the root's and the head's gathered for a backward pass

    def _sampler_logp(self, pack: Pack) -> Tensor:
        """[N] such that exp(old_logp - it) is the importance weight of the target, or of its whole sequence.

        A sequence's weight is the product of its tokens': prod_t exp(old_t - sampler_t)."""
        if self.loss.is_level == "token" or self.loss.is_cap is None or pack.old_logp is None:  # None: supervised
            return pack.sampler_logp
        gap = (pack.old_logp - pack.sampler_logp).nan_to_num(0.0)
        total = gap.new_zeros(len(pack.conversations)).index_add(0, pack.conversation, gap)
        return pack.old_logp - total[pack.conversation]

    def full_weights(self, dtype: torch.dtype = torch.float32) -> Iterator[tuple[str, Tensor]]:
        """(name, whole tensor) of every parameter, in `dtype`, and of every persistent buffer, as it is; gathered one
        at a time, tied ones once. A collective under FSDP."""
        for name, tensor in cast_weights(self.model, dtype):
            yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    @property
    def tied_names(self) -> dict[str, str]:
        """Further name -> name in `full_weights`: of a head that is the embedding as well."""
        return tied_names(self.model)


def build_policy(model: PreTrainedModel, config: Config, mesh: DeviceMesh) -> Policy:
    """Shard `model` (FSDP2) and wrap it. Parameters, gradients and optimiser state stay fp32."""
    if config.model.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": recompute_all_but_attention})
    policy = Policy(model, config)
    # Without cast_forward_inputs=False FSDP2 would rebuild the pack and cast its fp32 log-probs.
    precision = MixedPrecisionPolicy(
        param_dtype=getattr(torch, config.model.dtype), reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    if not policy.tied_names:
        shard_head(policy, mesh, precision)
    fully_shard(policy, mesh=mesh, mp_policy=precision)
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            # The loss weights hold the global normalisers: gradients of ranks add up, they are not averaged.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other
    return policy


def shard_head(policy: Policy, mesh: DeviceMesh, precision: MixedPrecisionPolicy) -> None:
    """A group of its own for a head that is not the embedding: gathered while the last layer goes forward, its gradient
    reduced while the layers go backward. In the root's group both would wait, for the whole model's two ends."""
    head: Any = policy.model.get_output_embeddings()
    fully_shard(head, mesh=mesh, mp_policy=precision, reshard_after_forward=False)
    head.with_loss = policy.with_head  # never called as a module: FSDP2 takes a method's calls for its forward
    register_fsdp_forward_method(head, "with_loss")
    policy.with_head = head.with_loss  # type: ignore[method-assign]
    last: Any = decoder_layers(policy.model)[-1]
    last.set_modules_to_forward_prefetch([head])


def recompute_all_but_attention() -> tuple[AbstractContextManager, AbstractContextManager]:
    """How a checkpointed layer goes forward and is recomputed: tree attention runs once, its output and LSE are kept.

    That is one [T, Hq, D] a layer more than recomputing all. The `torch` back-end is no operator of ours: recomputed.
    """

    def keep_attention(_context: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op.name() in ATTENTION_OPS else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(keep_attention)


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    layers = getattr(model.base_model, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise UserError(f"model.path: {type(model).__name__} has no decoder layers where they are expected (.layers)")
    return layers


def refuse_unsupported(model: PreTrainedModel, longest: int) -> None:
    """UserError for a model whose numbers trees, or training mode, would silently change, as far as no short check
    can show it: `check_against_stock` looks at what the model computes. `longest`: tokens of the run's longest
    sequence."""
    name = type(model).__name__
    if model.config._attn_implementation != ATTENTION:
        raise ValueError(
            f"{name} runs {model.config._attn_implementation} attention; it must be loaded with {ATTENTION}"
        )
    refuse_shape(model.config, longest)
    decoder_layers(model)
    if any(m.p > 0 for m in model.modules() if isinstance(m, nn.Dropout)):
        raise UserError(f"model.path: {name} has dropout; set it to 0 in its config.json")


def refuse_shape(shape: PretrainedConfig, longest: int) -> None:
    """The part of `refuse_unsupported` that config.json tells."""
    text = shape.get_text_config()
    name = (shape.architectures or [shape.model_type])[0]
    kinds = set(getattr(text, "layer_types", None) or WINDOWS)  # without types, every layer has the window there is
    if other := kinds - {"full_attention", *WINDOWS}:
        raise UserError(
            f"model.path: {name} has {', '.join(sorted(other))} layers; only attention layers can share a prefix"
        )
    for key in (WINDOWS[kind] for kind in WINDOWS if kind in kinds):
        window = getattr(text, key, None)
        if window and window < longest:  # a token sees that many, itself included
            raise UserError(
                f"model.path: {name} has a sliding attention window ({key}={window}), and this run's longest sequence "
                f"has {longest} tokens; tree attention has no window: shorten the sequences (rollout.max_tokens, "
                "eval.max_tokens, data.max_prompt_tokens, correction.max_prompt_tokens)"
            )
    if getattr(text, "attn_logit_softcapping", None):
        raise UserError(f"model.path: {name} caps its attention logits; tree attention does not")
    if getattr(text, "attn_temperature_tuning", None):
        raise UserError(
            f"model.path: {name} scales its attention by a token's place in the stream (attn_temperature_tuning); in a "
            "tree that is not its place in the text"
        )
    for key, value in text.to_dict().items():
        harmless = key.startswith(("classifier", "summary"))  # of heads that a language model does not have
        if NOISE.search(key) and not harmless and isinstance(value, int | float) and value > 0:
            raise UserError(f"model.path: {name} has dropout or noise in training ({key}={value}); set it to 0")


def cost_model(config: PretrainedConfig, num_parameters: int) -> CostModel:
    """What a forward and backward pass takes on this device: `flops_model`, a pair by the rate of attention."""
    rates = [device_rates()]
    if dist.is_initialized():
        dist.broadcast_object_list(rates)  # with costs of their own, ranks would disagree on who has which trees
    flops = flops_model(config, num_parameters)
    return replace(flops, per_pair=flops.per_pair * rates[0].linear / rates[0].attention_rate)


def flops_model(config: PretrainedConfig, num_parameters: int) -> CostModel:
    """From the shape: 6 FLOPs a weight and token, 4 + 10 (D a head) a visible pair, forward and backward."""
    text = config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    head = text.vocab_size * text.hidden_size
    tables = head if text.tie_word_embeddings else 2 * head
    return CostModel(
        per_token=6.0 * (num_parameters - tables),
        per_pair=14.0 * text.num_hidden_layers * text.num_attention_heads * head_dim,
        per_target=6.0 * head,
    )
