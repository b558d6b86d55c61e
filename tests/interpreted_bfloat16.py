"""The bf16 of a GPU for Triton's interpreter, which multiplies bit patterns, and cuts where a GPU rounds."""

import numpy as np
import pytest
import torch


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of bf16 are exact and added up in fp32; fp32 becomes bf16 by rounding to nearest, ties to even."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    dot, cast = builder.create_dot, builder.cast_impl

    def widened(x):
        bits = np.left_shift(x.data, 16, dtype=np.uint32)
        return handle(bits.view(np.float32), tl.float32)

    def rounded(x):
        bits = torch.from_numpy(np.ascontiguousarray(x.data)).bfloat16().view(torch.int16)
        return handle(bits.numpy().view(np.uint16), tl.bfloat16)

    def create_dot(self, a, b, *rest):
        a, b = (widened(x) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, *rest)

    def converted(self, x, dtype):
        types = x.dtype.scalar, dtype.scalar
        if types == (tl.bfloat16, tl.float32):
            return widened(x)
        return rounded(x) if types == (tl.float32, tl.bfloat16) else cast(self, x, dtype)

    monkeypatch.setattr(builder, "create_dot", create_dot)
    monkeypatch.setattr(builder, "create_fp_ext", converted)
    monkeypatch.setattr(builder, "create_fp_trunc", converted)
