"""What differs between GPUs, and decides how kernels are launched; of a CPU, what most GPUs have."""

from __future__ import annotations

import functools

import torch


@functools.cache
def has_tensor_cores(device: torch.device) -> bool:
    """Return whether a device multiplies matrices of bf16, and of fp32 rounded to 11 bits, in units of their own."""
    if torch.version.hip is not None:
        return False
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def warp_size(device: torch.device) -> int:
    """Return the threads of a warp: 64 on AMD's chips for data centres, 32 on all others."""
    return int(torch.cuda.get_device_properties(device).warp_size) if device.type == "cuda" else 32
