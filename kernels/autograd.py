"""What the operators' backwards share."""

import torch


def refuse_create_graph(op: str) -> None:
    """For a backward whose own gradient is not implemented; once_differentiable misses a constant incoming gradient."""
    if torch.is_grad_enabled():  # in a backward: create_graph=True
        raise RuntimeError(f"{op} can be differentiated once: backward with create_graph=True is not supported")
