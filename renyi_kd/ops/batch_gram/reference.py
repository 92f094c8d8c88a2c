r"""Inner products of few, very long rows.

    G_ij = sum_k x_ik x_jk        dx_i = sum_j (dG_ij + dG_ji) x_j

The rows are features of any shape, and an inner product does not depend on the order in which both are flattened, so
a channel-last map is read as it lies. Products are summed in fp32 within a slice of the first dimension that varies
slowest (fp64 for fp64), slices in fp64: the error does not grow with the length of the rows.

On a CPU a block of slices at a time is multiplied, which stays in the cache. On any other device every call is a
launch: all slices are one block where they can be used as they lie, else a block is 96 MiB. On a device without fp64
the products of slices, ``s x s`` each, are summed on the CPU.

Any float dtype, any strides, any sizes >= 1. First derivatives only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from renyi_kd.fp64 import fp64_device
from renyi_kd.ops.autograd import refuse_second_derivative

# 1 MiB in fp32: what is copied to change its dtype stays in the cache. Elsewhere 96 MiB.
BLOCK_ELEMENTS, BLOCK_ELEMENTS_ELSEWHERE = 2**18, 3 * 2**23
# Products with 16 rows or more take a path of the CPU's matrix library that is half as fast, and half of the matrix
# need not be computed.
_ROWS_AT_A_TIME = 12


def batch_gram(rows: Tensor) -> Tensor:
    """Return the inner product of every pair of rows, each flattened.

    Args:
        rows: ``[s, ...]`` with at least one more dimension, floating point, any strides.

    Returns:
        ``[s, s]`` in fp64, not normalised, on the device of the rows or, if that has no fp64, on the CPU. First
        derivatives.

    Raises:
        NotImplementedError: a second derivative is asked for.

    Cost: one read of the rows for the value, one read and one write for the gradient; extra memory for one s x s matrix
    per slice, and a block.

    """
    gram: Tensor = _BatchGram.apply(rows)  # type: ignore[no-untyped-call]
    return gram


class _BatchGram(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        dtype = _sum_dtype(rows)
        ordered = _by_stride(rows, rows)
        blocks = _blocks(ordered, dtype)
        is_on_cpu, device = rows.device.type == "cpu", fp64_device(rows.device)
        step = _ROWS_AT_A_TIME if is_on_cpu else len(rows)
        sums = []
        with torch.autocast(rows.device.type, enabled=False):
            for part in blocks:
                slices = _slices(ordered[:, part], dtype)
                parts = []
                for first in range(0, len(rows), step):
                    upper = torch.bmm(slices[:, first : first + step], slices[:, first:].mT)
                    parts.append(upper.to(device).sum(0, dtype=torch.float64))
                sums.append(parts[0] if len(parts) == 1 else _from_upper(parts))
        return torch.stack(sums).sum(0) if len(sums) > 1 else sums[0]

    @staticmethod
    def backward(ctx: Any, grad_gram: Tensor) -> Tensor:
        refuse_second_derivative("batch_gram", "use gram_matrix(features) instead")
        (rows,) = ctx.saved_tensors
        weights = (grad_gram + grad_gram.mT).to(_sum_dtype(rows)).to(rows.device)
        grad_rows = torch.empty_like(rows)
        ordered, grad_ordered = _by_stride(rows, rows), _by_stride(grad_rows, rows)
        with torch.autocast(rows.device.type, enabled=False):
            for part in _blocks(ordered, weights.dtype):
                x = ordered[:, part]
                grad_ordered[:, part] = (weights @ x.flatten(1).to(weights.dtype)).view(x.shape)
        return grad_rows


def _sum_dtype(rows: Tensor) -> torch.dtype:
    return torch.promote_types(rows.dtype, torch.float32)


def _by_stride(rows: Tensor, like: Tensor) -> Tensor:
    """Return the rows with the dimensions after the first from the widest stride of ``like`` to the narrowest.

    There are at least two of them: the slices, and what is summed within a slice.
    """
    ordered = rows.permute(0, *sorted(range(1, rows.ndim), key=like.stride, reverse=True))
    return ordered if rows.ndim > 2 else ordered.unsqueeze(1)


def _from_upper(parts: list[Tensor]) -> Tensor:
    """Return a symmetric matrix from some rows at a time, which begin at the diagonal."""
    n = parts[0].shape[1]
    gram = torch.cat([torch.nn.functional.pad(part, (n - part.shape[1], 0)) for part in parts])
    return gram.triu() + gram.triu(1).mT


def _slices(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the slices ``[k, s, ...]`` flattened and in ``dtype``, copied once if at all."""
    slices = rows.transpose(0, 1)
    return (slices if slices.dtype == dtype else slices.new_empty(slices.shape, dtype=dtype).copy_(slices)).flatten(2)


def _blocks(rows: Tensor, dtype: torch.dtype) -> list[slice]:
    """Return ranges of slices: where a copy is needed as many as make a block, else all on a CPU.

    Elsewhere the products of a range are no more than a block either.
    """
    n_slices = rows.shape[1]
    merges = all(rows.stride(k) == rows.stride(k + 1) * rows.shape[k + 1] for k in range(2, rows.ndim - 1))
    is_copied = rows.dtype != dtype or not merges
    if rows.device.type == "cpu":
        step = BLOCK_ELEMENTS * n_slices // rows.numel() if is_copied else n_slices
    else:
        step = BLOCK_ELEMENTS_ELSEWHERE // max(rows.numel() // n_slices if is_copied else 0, len(rows) ** 2)
    step = max(1, step)
    return [slice(start, start + step) for start in range(0, n_slices, step)]
