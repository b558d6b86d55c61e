"""liger-kernel's RMSNorm, RoPE, SwiGLU and GEGLU in the trainer's model. The head and its loss are ours."""

from __future__ import annotations

import inspect
import os

from transformers import PreTrainedModel

from cipo_fast.config import Config
from cipo_fast.errors import UserError

LAYERS = {"rms_norm": "RMSNorm", "rope": "RoPE", "swiglu": "SwiGLU", "geglu": "GEGLU"}  # its keyword -> what it is


def use_liger(model: PreTrainedModel, config: Config, device: str) -> str | None:
    """Put liger-kernel's layers into `model`, in place, where `model.liger` and the machine allow it: a line that says
    so, or why not; None where nobody asks. Its RoPE goes into transformers' module, for all models of the architecture
    in this process. UserError where `model.liger=true` cannot be done."""
    asked = config.model.liger
    if asked is False or (asked == "auto" and device != "cuda"):
        return None
    why_not = _obstacle(model, device)
    if why_not is None:
        return f"liger-kernel: {', '.join(_put_in(model))}"
    if asked is True:
        raise UserError(f"model.liger=true: {why_not}; change: model.liger=auto")
    return f"layers are transformers' own: {why_not}"


def _obstacle(model: PreTrainedModel, device: str) -> str | None:
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as known
    except ImportError:
        return "liger-kernel is not installed (`pip install -e .[gpu]`)"
    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return "liger-kernel needs a GPU"
    kind = model.config.model_type
    return None if kind in known else f"liger-kernel has no layers of {kind}"


def _put_in(model: PreTrainedModel) -> list[str]:
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as known

    apply = known[model.config.model_type]
    taken = inspect.signature(apply).parameters
    wanted = dict.fromkeys(LAYERS, True) | {"cross_entropy": False, "fused_linear_cross_entropy": False}
    apply(model=model, **{name: value for name, value in wanted.items() if name in taken})
    return [name for key, name in LAYERS.items() if key in taken]
