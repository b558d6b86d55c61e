"""cipo_kernels: the fused ops CIPO trains with. Needs torch and triton only.

Each op has a `reference` (eager torch, any dtype: the definition), a chunked `torch` implementation and, where
it exists, a Triton one; `dispatch.py` says which runs. `cipo_kernels.tree_attention` is a package, and so is not what
it holds: `from cipo_kernels.tree_attention import tree_attention`.
"""

from cipo_kernels.lm_head import LossOutput, fused_linear_cipo_loss, fused_linear_logprob, k3
from cipo_kernels.rates import DeviceRates, device_rates
from cipo_kernels.tree_attention import TreeLayout

__all__ = [
    "DeviceRates",
    "LossOutput",
    "TreeLayout",
    "device_rates",
    "fused_linear_cipo_loss",
    "fused_linear_logprob",
    "k3",
]
