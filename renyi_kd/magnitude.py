"""Numbers of any magnitude, brought to where neither their squares nor sums of these leave the range of their dtype."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Beyond it a factor is not 1; within it nothing changes, bit for bit.
_ORDINARY = 2.0**40


def near_one(x: Tensor, dims: int | tuple[int, ...]) -> Tensor:
    """Return ``x`` times a power of two for each part of it that ``dims`` go over, where it is huge or tiny.

    For what does not depend on the scale of a part. Differentiable; NaN where anything of a part is not finite and the
    part is scaled.
    """
    # A norm makes no magnitudes of the size of x, as abs() would.
    largest = torch.linalg.vector_norm(x.detach(), math.inf, dims, keepdim=True)
    ordinary = (largest > 1 / _ORDINARY) & (largest < _ORDINARY)
    exponent = largest.clamp_min(torch.finfo(x.dtype).tiny).log2().floor()
    return x * torch.where(ordinary, torch.ones_like(largest), (-exponent).exp2())
