r"""Inner products of few, very long rows.

    G_ij = sum_k x_ik x_jk        dx_i = sum_j (dG_ij + dG_ji) x_j

The rows are features of any shape, and an inner product does not depend on the order in which both are flattened, so
a channel-last map is read as it lies. Products are summed in fp32 within a slice of the first dimension that varies
slowest (fp64 for fp64), slices in fp64: the error does not grow with the length of the rows.

Any float dtype, any strides, any sizes >= 1. First derivatives only.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from renyi_kd.ops.autograd import refuse_second_derivative

# 1 MiB in fp32: what is copied to change its dtype stays in a 2 MiB L2 cache.
BLOCK_ELEMENTS = 2**18
# Products with 16 rows or more take a path of the CPU's matrix library that is half as fast, and half of the matrix
# need not be computed.
_ROWS_AT_A_TIME = 12


def batch_gram(rows: Tensor) -> Tensor:
    """Return the inner product of every pair of rows, each flattened.

    Args:
        rows: ``[s, ...]`` with at least one more dimension, floating point, any strides.

    Returns:
        ``[s, s]`` in fp64, not normalised. First derivatives.

    Raises:
        NotImplementedError: a second derivative is asked for.

    Cost: one read of the rows for the value, one read and one write for the gradient; extra memory for one s x s matrix
    per slice, and one block where the dtype is not fp32 or fp64.

    """
    gram: Tensor = _BatchGram.apply(rows)  # type: ignore[no-untyped-call]
    return gram


class _BatchGram(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        gram = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
        with torch.autocast(rows.device.type, enabled=False):
            ordered = _by_stride(rows, rows)
            for block in _blocks(ordered, _sum_dtype(rows)):
                slices = ordered[:, block].transpose(0, 1).flatten(2).to(_sum_dtype(rows))
                for first in range(0, len(rows), _ROWS_AT_A_TIME):
                    upper = torch.bmm(slices[:, first : first + _ROWS_AT_A_TIME], slices[:, first:].mT)
                    gram[first : first + _ROWS_AT_A_TIME, first:] += upper.sum(0, dtype=torch.float64)
        return gram.triu() + gram.triu(1).mT

    @staticmethod
    def backward(ctx: Any, grad_gram: Tensor) -> Tensor:
        refuse_second_derivative("batch_gram", "use gram_matrix(features) instead")
        (rows,) = ctx.saved_tensors
        weights = (grad_gram + grad_gram.mT).to(_sum_dtype(rows))
        grad_rows = torch.empty_like(rows)
        ordered, grad_ordered = _by_stride(rows, rows), _by_stride(grad_rows, rows)
        with torch.autocast(rows.device.type, enabled=False):
            for block in _blocks(ordered, weights.dtype):
                x = ordered[:, block]
                grad_ordered[:, block] = (weights @ x.flatten(1).to(weights.dtype)).view(x.shape)
        return grad_rows


def _sum_dtype(rows: Tensor) -> torch.dtype:
    return torch.promote_types(rows.dtype, torch.float32)


def _by_stride(rows: Tensor, like: Tensor) -> Tensor:
    """Return the rows with the dimensions after the first from the widest stride of ``like`` to the narrowest.

    There are at least two of them: the slices, and what is summed within a slice.
    """
    ordered = rows.permute(0, *sorted(range(1, rows.ndim), key=like.stride, reverse=True))
    return ordered if rows.ndim > 2 else ordered.unsqueeze(1)


def _blocks(rows: Tensor, dtype: torch.dtype) -> Iterator[slice]:
    """Yield ranges of slices: all of them if they can be used as they lie, else so many that a copy is a block."""
    n_slices = rows.shape[1]
    merges = all(rows.stride(k) == rows.stride(k + 1) * rows.shape[k + 1] for k in range(2, rows.ndim - 1))
    step = n_slices if merges and rows.dtype == dtype else max(1, BLOCK_ELEMENTS * n_slices // rows.numel())
    return (slice(start, start + step) for start in range(0, n_slices, step))
