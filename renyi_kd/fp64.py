"""Where what must be in fp64 is computed: on the device of its operands or, if that has no fp64, on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor


def has_fp64(device: torch.device) -> bool:
    """Return whether a device computes in fp64, which those of Apple (MPS) do not."""
    return device.type != "mps"


def fp64_device(device: torch.device) -> torch.device:
    """Return where the fp64 part of a computation on ``device`` runs."""
    return device if has_fp64(device) else torch.device("cpu")


def in_fp64(x: Tensor) -> Tensor:
    """Return ``x`` in fp64 on :func:`fp64_device`; differentiable, and for a device without fp64 the host waits."""
    # One after the other, as a copy between devices may convert on the one that cannot.
    return x.to(fp64_device(x.device)).double()


def out_of_fp64(x: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return a result of :func:`in_fp64` on ``device`` again, in a ``dtype`` that the device has; differentiable."""
    return x.to(dtype).to(device)


def no_numbers(x: object) -> str | None:
    """Return what a value is that is no dense tensor of floating point, as an error says it; None if it is one.

    Of the dtypes of one byte there is no arithmetic.
    """
    if not isinstance(x, Tensor):
        return type(x).__name__
    if not x.is_floating_point() or x.dtype.itemsize < 2:
        return str(x.dtype)
    return None if x.layout == torch.strided and not x.is_nested else f"one in {x.layout}, which .to_dense() changes"
