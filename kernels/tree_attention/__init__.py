"""Attention over token trees. `op.py` has the public function, `layout.py` what it is told of the stream."""

from .layout import TreeLayout
from .op import tree_attention, tree_attention_reference, tree_attention_torch

__all__ = ["TreeLayout", "tree_attention", "tree_attention_reference", "tree_attention_torch"]
