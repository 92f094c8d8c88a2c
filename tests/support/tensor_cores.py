"""The interpreter's ``tl.dot`` as tensor cores compute it, which is less exactly than a processor does.

A tensor core adds a few products to the accumulator at a time. Addends are cut off some bits below the largest of them,
and the sum is cut, not rounded, to fp32. TF32 has 10 bits of a mantissa; ``tf32x3`` makes three products of parts. The
interpreter of Triton 3.9 multiplies the bit patterns of bfloat16; here its values are multiplied.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton._C.libtriton import ir
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

# Products that are added at a time, by the bytes of a factor.
_PRODUCTS = {2: 16, 4: 8}
# Bits that addends keep beside those of fp32, below the last of the largest.
_MORE_BITS = 2


def allowance(length: int) -> float:
    """Return the error of a dot product of ``length`` terms, by the sum of their magnitudes.

    In units of 2^-24: of 8 products and the accumulator each loses at most 1/2, and their sum 2. That is 6.5 a turn,
    less than the length in all. Splitting costs each factor of tf32x3 2^-22, and the product of their lower parts is
    left out, 2^-22 too: 12. The rest is for the sum of the parts.
    """
    return (length + 16) * 2.0**-24


def multiply(left: Tensor, right: Tensor) -> Tensor:
    """Return the products ``[m, n]`` of ``[m, k]`` and ``[k, n]`` from zero: as fp32 by tf32x3, others as they are."""
    values = [value.float().numpy() for value in (left, right)]
    zeros = np.zeros((len(left), right.shape[1]), np.float32)
    return torch.from_numpy(_product(*values, zeros, left.element_size(), ir.INPUT_PRECISION.TF32x3))


def _product(a: np.ndarray, b: np.ndarray, sums: np.ndarray, n_bytes: int, precision: Any) -> np.ndarray:
    if n_bytes == 2:
        return _added(a, b, sums, n_bytes)
    if precision == ir.INPUT_PRECISION.IEEE:
        # Not on tensor cores.
        return np.matmul(a, b, dtype=np.float32) + sums
    (high_a, low_a), (high_b, low_b) = _split(a), _split(b)
    if precision == ir.INPUT_PRECISION.TF32:
        return _added(high_a, high_b, sums, n_bytes)
    # As Triton does it: the small products first, and what is not finite is left to the large one.
    small = _added(high_a, low_b, _added(low_a, high_b, np.zeros_like(sums), n_bytes), n_bytes)
    return _added(high_a, high_b, np.where(np.isnan(small), np.float32(0), small), n_bytes) + sums


def _added(a: np.ndarray, b: np.ndarray, sums: np.ndarray, n_bytes: int) -> np.ndarray:
    step = _PRODUCTS[n_bytes]
    for first in range(0, a.shape[1], step):
        places = slice(first, first + step)
        products = a[:, places, None].astype(np.float64) * b[None, places].astype(np.float64)
        addends = np.concatenate([sums[:, None].astype(np.float64), products], 1)
        largest = np.abs(addends).max(1, keepdims=True)
        unit = np.exp2(np.floor(np.log2(np.where(largest > 0, largest, 1.0))) - 23 - _MORE_BITS)
        cut = np.where(np.isfinite(unit) & np.isfinite(addends), np.trunc(addends / unit) * unit, addends)
        sums = _towards_zero(cut.sum(1))
    return sums


def _towards_zero(x: np.ndarray) -> np.ndarray:
    rounded = x.astype(np.float32)
    return np.where(np.abs(rounded.astype(np.float64)) > np.abs(x), np.nextafter(rounded, np.float32(0)), rounded)


def _split(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return what TF32 keeps of fp32, and what it keeps of the rest."""
    high = _tf32(x)
    return high, _tf32(x - high)


def _tf32(x: np.ndarray) -> np.ndarray:
    bits = (np.ascontiguousarray(x).view(np.uint32).astype(np.uint64) + 0x1000) & 0xFFFFE000
    return np.where(np.isfinite(x), bits.astype(np.uint32).view(np.float32), x).astype(np.float32)


@contextmanager
def tensor_cores(precision: Any = None) -> Iterator[list[int]]:
    """Compute ``tl.dot`` as tensor cores do; yields the lengths of the sums.

    Args:
        precision: in place of the one that a kernel asks for.

    """
    lengths: list[int] = []

    def create_dot(_builder: Any, a: Any, b: Any, sums: Any, asked: Any, _imprecise: int) -> TensorHandle:
        left, right = (_values(factor) for factor in (a, b))
        lengths.append(left.shape[-1])
        n_bytes, used = a.data.dtype.itemsize, asked if precision is None else precision
        with np.errstate(all="ignore"):
            if left.ndim == 2:
                product = _product(left, right, sums.data, n_bytes, used)
            else:
                # A batch of matrices, each with warps of its own.
                each = zip(left, right, sums.data, strict=True)
                product = np.stack([_product(*matrices, n_bytes, used) for matrices in each])
        return TensorHandle(product.astype(sums.data.dtype), sums.dtype.scalar)

    with mock.patch.object(InterpreterBuilder, "create_dot", create_dot):
        yield lengths


def _values(factor: Any) -> np.ndarray:
    if factor.dtype.scalar == tl.bfloat16:
        return (factor.data.astype(np.uint32) << 16).view(np.float32)
    return factor.data.astype(np.float32)
