"""Gram matrix of few, very long rows."""

from __future__ import annotations

from torch import Tensor

from renyi_kd.ops.batch_gram import reference
from renyi_kd.ops.dispatch import Impl, resolve


def batch_gram(rows: Tensor, *, impl: Impl = "auto") -> Tensor:
    """Return what :func:`reference.batch_gram` defines, by the implementation that ``impl`` names."""
    if resolve(impl, rows) == "triton":
        from renyi_kd.ops.batch_gram import triton

        return triton.batch_gram(rows)
    return reference.batch_gram(rows)
