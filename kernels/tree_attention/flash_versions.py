"""Which FlashAttention `impl="flash"` runs: torch brings version 2, and lets others take its place."""

import importlib.util

import torch

# version -> (the package it is in, compute capabilities it has kernels for), the fastest first
VERSIONS = {"FA3": ("flash_attn_interface", {9}), "FA4": ("flash_attn.cute", {9, 10})}


def installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ImportError:  # of what it is a part of
        return False


def newest_flash_attention(major: int) -> str:
    """The version for a GPU of compute capability `major`.x: "FA3" or "FA4" where installed, else torch's "FA2"."""
    return next((name for name, (package, on) in VERSIONS.items() if major in on and installed(package)), "FA2")


def activate_newest_flash_attention(device: torch.device) -> str:
    """Make it that of the whole process, `scaled_dot_product_attention` included; its name. Not run on a GPU."""
    version = newest_flash_attention(torch.cuda.get_device_capability(device)[0])
    if version != "FA2":
        torch.nn.attention.activate_flash_attention_impl(version)
    return version
