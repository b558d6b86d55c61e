"""Attention over a stream of token trees: each token sees its root path, and every shared token is stored once."""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from ..dispatch import attention_implementation
from .flash import tree_attention_flash
from .layout import QueryBlock, TreeLayout

# Blocks with more keys than this are recomputed in the backward: saved for it, their gathered keys and masks would
# grow with the square of a tree's length. Below it they cost a bounded number of bytes a token.
MAX_SAVED_KEYS = 1024


def tree_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tree: TreeLayout,
    *,
    scale: float | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """o[q] = sum_k softmax_k(scale <q, k>) v[k] over the keys with k <= q < subtree_end[k].

    Args:
        q: [T, Hq, D], any float dtype.
        k, v: [T, Hkv, D]; GQA: Hq is a multiple of Hkv, query head h reads key head h // (Hq / Hkv).
        tree: the layout of the T tokens, on q's device.
        scale: factor of the scores, 1 / sqrt(D) if None.
        impl: reference, torch, triton or flash; auto is dispatch.py's choice.

    Returns: o [T, Hq, D] in q's dtype, differentiable in q, k and v.

    Raises ValueError for shapes that do not fit, a layout on another device, or what the Triton kernels do not take:
    head dims above 128 or no multiples of 8, mixed dtypes, a scale that is not positive. Ours.
    """
    _check(q, k, v, tree)
    name = attention_implementation(q) if impl == "auto" else impl
    if name == "flash":
        return tree_attention_flash(q, k, v, tree, scale=scale)
    if name == "reference":
        return tree_attention_reference(q, k, v, tree, scale=scale)
    if name == "triton" and q.dtype != torch.float64:  # fp64 is for tests, and has no kernel
        from .launch import tree_attention_triton  # CPU installations may lack Triton

        return tree_attention_triton(q, k, v, tree, scale=scale)
    return tree_attention_torch(q, k, v, tree, scale=scale)


def tree_attention_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tree: TreeLayout, *, scale: float | None = None
) -> torch.Tensor:
    """The definition: softmax, in at least fp32, over the dense [T, T] mask. Arguments as `tree_attention`."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dtype = torch.promote_types(q.dtype, torch.float32)
    q_THGD = q.unflatten(1, (k.shape[1], -1)).to(dtype)
    scores_HGTT = scale * torch.einsum("qhgd,khd->hgqk", q_THGD, k.to(dtype))
    p_HGTT = scores_HGTT.masked_fill(~tree.dense_mask(), float("-inf")).softmax(-1)
    return torch.einsum("hgqk,khd->qhgd", p_HGTT, v.to(dtype)).flatten(1, 2).to(q.dtype)


def tree_attention_torch(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tree: TreeLayout, *, scale: float | None = None
) -> torch.Tensor:
    """Runs of queries with their visible keys, padded into a few batches of SDPA. Arguments as `tree_attention`."""
    outputs = [
        # preserve_rng_state: nothing here is random
        checkpoint(_attend_block, q, k, v, block, scale, use_reentrant=False, preserve_rng_state=False)
        if block.key.shape[1] > MAX_SAVED_KEYS
        else _attend_block(q, k, v, block, scale)
        for block in tree.query_blocks
    ]
    return torch.cat(outputs).index_select(0, tree.block_slot_of_token)


def _attend_block(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: QueryBlock, scale: float | None
) -> torch.Tensor:
    """The block's outputs, padding included: [n * Lq, Hq, D]."""
    o_nHqD = F.scaled_dot_product_attention(
        _gather(q, block.query),
        _gather(k, block.key),
        _gather(v, block.key),
        attn_mask=block.mask()[:, None],  # [n, 1, Lq, Lk]
        scale=scale,
        enable_gqa=True,
    )
    return o_nHqD.transpose(1, 2).flatten(0, 1)


def _gather(x_THD: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows of x at index [n, L], as [n, H, L, D]. index_select: on CPU its backward is faster than x[index]'s."""
    return x_THD.index_select(0, index.flatten()).unflatten(0, index.shape).transpose(1, 2)


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tree: TreeLayout) -> None:
    T, Hq, D = q.shape
    if k.shape != v.shape or k.shape[0] != T or k.shape[2] != D or Hq % k.shape[1]:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise ValueError(f"{shapes}: expected [T, Hq, D] and twice [T, Hkv, D], Hq a multiple of Hkv")
    if tree.num_tokens != T:
        raise ValueError(f"the layout has {tree.num_tokens} tokens, q has {T}")
    if tree.device != q.device:
        raise ValueError(f"the layout is on {tree.device}, q on {q.device}: move it with tree.to(q.device)")
