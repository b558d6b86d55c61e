"""Which implementation of an op runs: `reference` (the definition), `torch` (chunked) or `triton`."""

import os

import torch

from .rates import fastest_attention

IMPLEMENTATIONS = ("reference", "torch", "triton")


def implementation(x: torch.Tensor) -> str:
    """The implementation for a tensor on `x.device`: Triton on CUDA, chunked torch elsewhere.

    `CIPO_KERNELS=reference|torch|triton` overrides. Triton on a CPU tensor needs its interpreter
    (`TRITON_INTERPRET=1`); without it a ValueError says so.
    """
    name = os.environ.get("CIPO_KERNELS") or ("triton" if x.is_cuda else "torch")
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"CIPO_KERNELS={name}: expected one of {', '.join(IMPLEMENTATIONS)}")
    if name == "triton" and not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("CIPO_KERNELS=triton on a CPU tensor: set TRITON_INTERPRET=1 to run Triton's interpreter")
    return name


def attention_implementation(q: torch.Tensor) -> str:
    """As `implementation`; but bf16 and fp16 on CUDA run what was measured to be fastest there, `flash` included."""
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and not os.environ.get("CIPO_KERNELS"):
        return fastest_attention(q.device)
    return implementation(q)
