r"""Second moment of a Hadamard product of Gram matrices with unit diagonal, in blocks of rows.

    M = sum_ij prod_k K^k_ij^2          K^k_ij = f_k(x_i . x_j) r_i r_j,  K^k_ii = 1

f is the identity (linear), (. + offset)^degree (polynomial) or exp(-||x_i - x_j||^2 / (2 bandwidth^2)) (RBF, r = 1).
With P_ij = prod_k K^k_ij^2 for i != j, C_ij = P_ij / K^k_ij (as a product), s_i = sum_j P_ij, for each variable k:

    dx_i = 4 (sum_j A_ij x_j - s_i b_i x_i)
    linear:      A_ij = C_ij r_i r_j                                                b_i = 1 / |x_i|^2
    polynomial:  A_ij = C_ij degree (x_i . x_j + offset)^(degree - 1) r_i r_j       b_i = degree / (|x_i|^2 + offset)
    RBF:         A_ij = P_ij / bandwidth^2                                          b_i = 1 / bandwidth^2

Blocks of rows meet all rows up to their own, as the rest is the same by symmetry, so that no n x n matrix is made; the
gradient computes the blocks again. Products are summed in fp32 (fp64 for fp64 and for RBF, whose distances are small
differences of large numbers), the blocks of the value in fp64. First derivatives only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from renyi_kd.fp64 import fp64_device, has_fp64, in_fp64, out_of_fp64
from renyi_kd.gram import RBF, KnownKernel, Linear, Polynomial, pair_distances
from renyi_kd.ops.autograd import refuse_second_derivative

# 1 MiB in fp32 per matrix of kernel values: a few of them stay in the cache of a CPU. Elsewhere 64 MiB, since a block
# takes dozens of launches.
BLOCK_ELEMENTS, BLOCK_ELEMENTS_ELSEWHERE = 2**18, 2**24


def gram_moment(features: Sequence[Tensor], kernels: Sequence[KnownKernel]) -> Tensor:
    """Return the sum of the squared entries of the Hadamard product of the variables' Grams.

    Args:
        features: one ``[n, d_k]`` per variable, floating point.
        kernels: one per variable; the bandwidth of an RBF is a number here.

    Returns:
        ``[]`` in fp64: n where all samples are orthogonal, n^2 where all are alike. First derivatives.

    Raises:
        NotImplementedError: a second derivative is asked for.

    Cost: O(n^2 sum_k d_k) products, four times that with the gradient; extra memory for a few blocks and 2 n numbers
    per variable, and the gradient in fp32.

    """
    if not has_fp64(features[0].device) and any(isinstance(kernel, RBF) for kernel in kernels):
        # Distances need fp64 for every pair of samples.
        features = [x.to(fp64_device(x.device)) for x in features]
    moment: Tensor = _GramMoment.apply(tuple(kernels), *features)  # type: ignore[no-untyped-call]
    return moment


class _GramMoment(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: tuple[KnownKernel, ...], *features: Tensor) -> Tensor:
        ctx.kernels = kernels
        ctx.save_for_backward(*features)
        n_samples = len(features[0])
        with torch.autocast(features[0].device.type, enabled=False):
            variables = [prepare(x, kernel) for x, kernel in zip(features, kernels, strict=True)]
            moment = torch.full((), n_samples, dtype=torch.float64, device=fp64_device(features[0].device))
            for block in _blocks(features[0]):
                # The rest is the same by symmetry.
                squares = _off_diagonal_squares(_values(variables, block, block.stop), block)
                moment += _sum(squares[:, : block.start]) + _sum(squares)
        return moment

    @staticmethod
    def backward(ctx: Any, grad_moment: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("gram_moment", "use renyi_entropy(gram_matrix(features)) instead")
        features = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:]
        with torch.autocast(features[0].device.type, enabled=False):
            variables = [prepare(x, kernel) for x, kernel in zip(features, ctx.kernels, strict=True)]
            grads = [torch.zeros_like(v.rows) if need else None for v, need in zip(variables, needed, strict=True)]
            row_sums = torch.zeros(len(features[0]), dtype=torch.float64, device=grad_moment.device)
            for block in _blocks(features[0]):
                before = slice(block.start)
                values = _values(variables, block, block.stop)
                squares = _off_diagonal_squares(values, block)
                row_sums[block] += squares.sum(1).to(row_sums.device)
                row_sums[before] += squares[:, before].sum(0).to(row_sums.device)
                for k, (variable, grad) in enumerate(zip(variables, grads, strict=True)):
                    if grad is not None:
                        others = [value for index, value in enumerate(values) if index != k]
                        weights = _without_diagonal(variable.slope(values[k], block, block.stop), block)
                        for other in others:
                            weights *= other.square()
                        grad[block].addmm_(weights, variable.rows[: block.stop])
                        grad[before].addmm_(weights[:, before].mT, variable.rows[block])
            for variable, grad in zip(variables, grads, strict=True):
                if grad is not None:
                    own = row_sums[:, None] * variable.self_slope().to(row_sums.device)
                    grad.addcmul_(out_of_fp64(own, grad.device, grad.dtype), variable.rows, value=-1)
                    grad.mul_(out_of_fp64(4 * grad_moment, grad.device, grad.dtype))
        return None, *(None if grad is None else grad.to(x.dtype) for x, grad in zip(features, grads, strict=True))


class Variable(NamedTuple):
    """A variable's rows as its kernel multiplies them, and what of them the kernel needs.

    Attributes:
        kernel: between its samples.
        rows: ``[n, d]`` in at least fp32; for RBF, whose distances do not depend on the origin, centred and in fp64.
        norms: ``[n]``: squared norms of the rows.
        inverse: ``[n]``: r, which scales the diagonal to 1; 0 for a sample without direction.
        is_fp64: whether the features were, so that nothing wider hides what an expanded distance loses.

    """

    kernel: KnownKernel
    rows: Tensor
    norms: Tensor
    inverse: Tensor
    is_fp64: bool

    def values(self, block: slice, stop: int) -> Tensor:
        """Return the kernel between a block of rows and the first ``stop`` rows."""
        if isinstance(self.kernel, RBF):
            return self._distances(block, stop).mul_(-_slope(self.kernel) / 2).exp_()
        values = self.rows[block] @ self.rows[:stop].mT
        if isinstance(self.kernel, Polynomial):
            values = (values + self.kernel.offset) ** self.kernel.degree
        return values * self.inverse[block, None] * self.inverse[:stop]

    def slope(self, values: Tensor, block: slice, stop: int) -> Tensor:
        """Return K dK/d(x_i . x_j), up to the parts that :meth:`self_slope` has."""
        if isinstance(self.kernel, RBF):
            return values.square() * _slope(self.kernel)
        values = values * (self.inverse[block, None] * self.inverse[:stop])
        if isinstance(self.kernel, Linear):
            return values
        offset, degree = self.kernel.offset, self.kernel.degree
        return degree * values * (self.rows[block] @ self.rows[:stop].mT + offset) ** (degree - 1)

    def self_slope(self) -> Tensor:
        """Return what its row sum of squares takes from a row itself, ``[n, 1]``."""
        if isinstance(self.kernel, RBF):
            return torch.full_like(self.norms[:, None], _slope(self.kernel))
        degree = self.kernel.degree if isinstance(self.kernel, Polynomial) else 1
        return degree * (self.inverse[:, None] ** (2 / degree))

    def _distances(self, block: slice, stop: int) -> Tensor:
        if self.is_fp64:
            return pair_distances(self.rows[block], self.rows[:stop])
        products = self.rows[block] @ self.rows[:stop].mT
        return products.mul_(-2).add_(self.norms[block, None]).add_(self.norms[:stop]).clamp_min_(0)


def prepare(x: Tensor, kernel: KnownKernel) -> Variable:
    """Return a variable; its rows are a copy only where they must be centred or widened."""
    rows = x.to(torch.float64 if isinstance(kernel, RBF) else torch.promote_types(x.dtype, torch.float32))
    if isinstance(kernel, RBF):
        rows = rows - rows.mean(0)
    norms = torch.linalg.vector_norm(rows, dim=1).square()
    diagonal = (norms + kernel.offset) ** kernel.degree if isinstance(kernel, Polynomial) else norms
    inverse = torch.where(diagonal == 0, 0.0, diagonal.rsqrt())
    return Variable(kernel, rows, norms, inverse, x.dtype == torch.float64)


def _sum(squares: Tensor) -> Tensor:
    """Return the sum in fp64; where the device has none, of sums of rows."""
    return squares.sum(dtype=torch.float64) if has_fp64(squares.device) else in_fp64(squares.sum(1)).sum()


def _slope(kernel: RBF) -> float:
    return float(kernel.bandwidth) ** -2


def _blocks(x: Tensor) -> Iterator[slice]:
    n_samples, elements = len(x), BLOCK_ELEMENTS if x.device.type == "cpu" else BLOCK_ELEMENTS_ELSEWHERE
    step = max(1, elements // n_samples)
    return (slice(start, min(start + step, n_samples)) for start in range(0, n_samples, step))


def _values(variables: list[Variable], block: slice, stop: int) -> list[Tensor]:
    return [variable.values(block, stop) for variable in variables]


def _off_diagonal_squares(values: list[Tensor], block: slice) -> Tensor:
    squares = values[0].square()
    for value in values[1:]:
        squares = squares * value.square()
    return _without_diagonal(squares, block)


def _without_diagonal(matrix: Tensor, block: slice) -> Tensor:
    """Set the entries of every sample with itself to 0, in place."""
    matrix.diagonal(block.start).zero_()
    return matrix
