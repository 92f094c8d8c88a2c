"""Tight clusters far apart, on which squared distances lose their digits."""

from __future__ import annotations

import torch

from tests.support import randn


def clusters(apart: float, dtype: torch.dtype, tight: float = 1.0) -> torch.Tensor:
    """Return two clusters of four, of which two samples are one."""
    x = tight * randn(8, 3, dtype=torch.float64)
    x[1] = x[0]
    x[4:] += apart
    return x.to(dtype)


FAR = {
    "hundred": (1e2, torch.float32, 1.0),
    "ten thousand": (1e4, torch.float32, 1.0),
    "half precision": (1e3, torch.float16, 8.0),
    "fp64": (1e9, torch.float64, 1.0),
    "fp64, tiny": (1.0, torch.float64, 1e-9),
    "far from the origin": (1e-3, torch.float32, 1e-3),
}


def differences(x: torch.Tensor) -> torch.Tensor:
    """Return squared distances in fp64, each from its difference."""
    x = x.double()
    return (x[:, None] - x[None]).square().sum(-1)
