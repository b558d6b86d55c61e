"""cipo_kernels: the fused ops CIPO trains with. Needs torch and triton only.

Each op has a `reference` (eager torch, any dtype: the definition), a chunked `torch` implementation and, where
it exists, a Triton one; `dispatch.py` says which runs.
"""

from cipo_kernels.device_rates import DeviceRates, device_rates
from cipo_kernels.fused_linear_cipo_loss import LossOutput, fused_linear_cipo_loss, k3
from cipo_kernels.fused_linear_logprob import fused_linear_logprob
from cipo_kernels.tree_attention import tree_attention
from cipo_kernels.tree_attention.layout import TreeLayout

__all__ = [
    "DeviceRates",
    "LossOutput",
    "TreeLayout",
    "device_rates",
    "fused_linear_cipo_loss",
    "fused_linear_logprob",
    "k3",
    "tree_attention",
]
