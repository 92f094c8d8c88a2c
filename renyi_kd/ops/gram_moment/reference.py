r"""Second moment of a Hadamard product of Gram matrices with unit diagonal, in blocks of rows.

    M = sum_ij prod_k K^k_ij^2          K^k_ii = 1
    linear:      K_ij = x_i . x_j r_i r_j                                           r_i = 1 / |x_i|
    polynomial:  K_ij = c_ij^degree,  c_ij = (x_i . x_j + offset) r_i r_j           r_i = (|x_i|^2 + offset)^(-1/2)
    RBF:         K_ij = exp(-||x_i - x_j||^2 / (2 bandwidth^2))

With P_ij = prod_k K^k_ij^2 for i != j, C_ij = P_ij / K^k_ij (as a product), s_i = sum_j P_ij, for each variable k:

    dx_i = 4 (sum_j A_ij x_j - s_i b_i x_i)
    linear:      A_ij = C_ij r_i r_j                                                b_i = 1 / |x_i|^2
    polynomial:  A_ij = C_ij degree c_ij^(degree - 1) r_i r_j                       b_i = degree / (|x_i|^2 + offset)
    RBF:         A_ij = P_ij / bandwidth^2                                          b_i = 1 / bandwidth^2

Square tiles on and below the diagonal are computed, as the rest is the same by symmetry, so that no n x n matrix is
made; the gradient computes the tiles again. Products are summed in fp32 (fp64 for fp64 and for RBF, whose distances are
small differences of large numbers), the tiles of the value in fp64. First derivatives only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from renyi_kd.fp64 import fp64_device, has_fp64, in_fp64, out_of_fp64
from renyi_kd.gram import RBF, KnownKernel, Linear, Polynomial, pair_distances
from renyi_kd.ops.autograd import refuse_second_derivative

# 1 MiB in fp32 per tile of kernel values: a few of them stay in the cache of a CPU. Elsewhere 64 MiB, since a tile
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

    Cost: O(n^2 sum_k d_k) products, four times that with the gradient; extra memory for a few tiles and 2 n numbers
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
        with torch.autocast(features[0].device.type, enabled=False):
            variables = [prepare(x, kernel) for x, kernel in zip(features, kernels, strict=True)]
            return moment_of_pairs(variables, variables) + len(features[0])

    @staticmethod
    def backward(ctx: Any, grad_moment: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("gram_moment", "use renyi_entropy(gram_matrix(features)) instead")
        features = ctx.saved_tensors
        with torch.autocast(features[0].device.type, enabled=False):
            variables = [prepare(x, kernel) for x, kernel in zip(features, ctx.kernels, strict=True)]
            gradients = no_gradients(variables, ctx.needs_input_grad[1:])
            add_gradients_of_pairs(variables, gradients, variables, gradients)
            return None, *features_gradients(take_own_parts(variables, gradients), grad_moment, features)


class Variable(NamedTuple):
    """A variable's rows as its kernel multiplies them, and what of them the kernel needs.

    Attributes:
        kernel: between its samples.
        rows: ``[n, d]`` in at least fp32; for RBF, whose distances do not depend on the origin, centred and in fp64.
        norms: ``[n]``: squared norms of the rows.
        inverse: ``[n]``: r, which brings the diagonal to 1; 0 for a sample without direction.
        is_fp64: whether the features were, so that nothing wider hides what an expanded distance loses.

    """

    kernel: KnownKernel
    rows: Tensor
    norms: Tensor
    inverse: Tensor
    is_fp64: bool

    def part(self, samples: slice) -> Variable:
        """Return some of the samples."""
        rows, norms, inverse = self.rows[samples], self.norms[samples], self.inverse[samples]
        return self._replace(rows=rows, norms=norms, inverse=inverse)

    def values(self, others: Variable) -> Tensor:
        """Return the kernel between all rows and those of the same variable of other samples."""
        if isinstance(self.kernel, RBF):
            return self._distances(others).mul_(-_slope(self.kernel) / 2).exp_()
        if isinstance(self.kernel, Polynomial):
            return self._cosines(self.kernel, others) ** self.kernel.degree
        return (self.rows @ others.rows.mT) * self.inverse[:, None] * others.inverse

    def slope(self, values: Tensor, others: Variable) -> Tensor:
        """Return K dK/d(x_i . x_j), up to the parts that :meth:`self_slope` has."""
        if isinstance(self.kernel, RBF):
            return values.square() * _slope(self.kernel)
        values = values * (self.inverse[:, None] * others.inverse)
        if isinstance(self.kernel, Linear):
            return values
        degree = self.kernel.degree
        return degree * values * self._cosines(self.kernel, others) ** (degree - 1)

    def self_slope(self) -> Tensor:
        """Return what its row sum of squares takes from a row itself, ``[n, 1]``."""
        if isinstance(self.kernel, RBF):
            return torch.full_like(self.norms[:, None], _slope(self.kernel))
        degree = self.kernel.degree if isinstance(self.kernel, Polynomial) else 1
        return degree * self.inverse[:, None].square()

    def _cosines(self, kernel: Polynomial, others: Variable) -> Tensor:
        """Return what is raised to a power: scaled first, so that it is near one whatever the features are."""
        return (self.rows @ others.rows.mT + kernel.offset) * self.inverse[:, None] * others.inverse

    def _distances(self, others: Variable) -> Tensor:
        if self.is_fp64:
            return pair_distances(self.rows, others.rows)
        products = self.rows @ others.rows.mT
        return products.mul_(-2).add_(self.norms[:, None]).add_(others.norms).clamp_min_(0)


def prepare(x: Tensor, kernel: KnownKernel, centre: Tensor | None = None) -> Variable:
    """Return a variable; its rows are a copy only where they must be centred or widened.

    Args:
        x: ``[n, d]``.
        kernel: of the variable.
        centre: of RBF, ``[d]`` in fp64: the mean of all samples, where ``x`` are some of them.

    """
    rows = x.to(torch.float64 if isinstance(kernel, RBF) else torch.promote_types(x.dtype, torch.float32))
    if isinstance(kernel, RBF):
        rows = rows - (rows.mean(0) if centre is None else centre)
    norms = torch.linalg.vector_norm(rows, dim=1).square()
    diagonal = norms + kernel.offset if isinstance(kernel, Polynomial) else norms
    inverse = torch.where(diagonal == 0, 0.0, diagonal.rsqrt())
    return Variable(kernel, rows, norms, inverse, x.dtype == torch.float64)


class Gradients(NamedTuple):
    """What the samples of some variables get.

    Attributes:
        of_rows: per variable ``[n, d_k]`` in the dtype of its rows; None where no gradient is needed.
        row_sums: s, ``[n]`` in fp64, which :func:`take_own_parts` takes from the former.

    """

    of_rows: list[Tensor | None]
    row_sums: Tensor

    def part(self, samples: slice) -> Gradients:
        """Return a view of those of some samples."""
        return Gradients([None if grad is None else grad[samples] for grad in self.of_rows], self.row_sums[samples])


def no_gradients(variables: Sequence[Variable], needed: Sequence[bool]) -> Gradients:
    """Return zeros to add to."""
    rows = variables[0].rows
    of_rows = [torch.zeros_like(v.rows) if need else None for v, need in zip(variables, needed, strict=True)]
    return Gradients(of_rows, torch.zeros(len(rows), dtype=torch.float64, device=fp64_device(rows.device)))


def moment_of_pairs(variables: Sequence[Variable], others: Sequence[Variable]) -> Tensor:
    """Return the sum of ``P_ij + P_ji`` over all pairs of two different samples, ``[]`` in fp64.

    Args:
        variables: one sample of each pair.
        others: the same variables of other samples, for the other; or ``variables`` itself, where each pair counts
            once.

    """
    device = variables[0].rows.device
    moment = torch.zeros((), dtype=torch.float64, device=fp64_device(device))
    for tile in _tiles(variables, others):
        squares = _off_diagonal_product([value.square_() for value in _values(variables, others, tile)], tile)
        moment.add_(_sum(squares), alpha=1 if tile.on_diagonal else 2)
    return moment


def add_gradients_of_pairs(
    variables: Sequence[Variable], gradients: Gradients, others: Sequence[Variable], other_gradients: Gradients
) -> None:
    """Add a fourth of the gradient of :func:`moment_of_pairs` to that of each sample, without its own part."""
    for tile in _tiles(variables, others):
        values = _values(variables, others, tile)
        own, mirrored = gradients.part(tile.rows), other_gradients.part(tile.cols)
        of_variables = [value.square() for value in values]
        squares = _off_diagonal_product(of_variables, tile)
        own.row_sums.add_(squares.sum(1).to(own.row_sums.device))
        if not tile.on_diagonal:
            mirrored.row_sums.add_(squares.sum(0).to(own.row_sums.device))
        for k, (grad, mirrored_grad) in enumerate(zip(own.of_rows, mirrored.of_rows, strict=True)):
            if grad is None or mirrored_grad is None:
                continue
            rows, cols = variables[k].part(tile.rows), others[k].part(tile.cols)
            weights = _without_diagonal(rows.slope(values[k], cols), tile)
            for square in (*of_variables[:k], *of_variables[k + 1 :]):
                weights *= square
            grad.addmm_(weights, cols.rows)
            if not tile.on_diagonal:
                mirrored_grad.addmm_(weights.mT, rows.rows)


def take_own_parts(variables: Sequence[Variable], gradients: Gradients) -> list[Tensor | None]:
    """Return the gradients of the rows less what their sums take from the rows themselves, in place."""
    for variable, grad in zip(variables, gradients.of_rows, strict=True):
        if grad is not None:
            own = gradients.row_sums[:, None] * variable.self_slope().to(gradients.row_sums.device)
            grad.addcmul_(out_of_fp64(own, grad.device, grad.dtype), variable.rows, value=-1)
    return gradients.of_rows


def features_gradients(
    of_rows: Sequence[Tensor | None], grad_moment: Tensor, features: Sequence[Tensor]
) -> list[Tensor | None]:
    """Return the gradients of the features, for the fourths and the upstream gradient; in place."""
    return [
        None if grad is None else grad.mul_(out_of_fp64(4 * grad_moment, grad.device, grad.dtype)).to(x.dtype)
        for x, grad in zip(features, of_rows, strict=True)
    ]


class _Tile(NamedTuple):
    """Some rows and some columns; on the diagonal they are the same samples."""

    rows: slice
    cols: slice
    on_diagonal: bool


def _tiles(variables: Sequence[Variable], others: Sequence[Variable]) -> Iterator[_Tile]:
    """Yield tiles of all pairs; of a sample's own pairs those on and below the diagonal."""
    rows = variables[0].rows
    is_own = others is variables
    side = math.isqrt(BLOCK_ELEMENTS if rows.device.type == "cpu" else BLOCK_ELEMENTS_ELSEWHERE)
    for top in range(0, len(rows), side):
        bottom = min(top + side, len(rows))
        n_cols = bottom if is_own else len(others[0].rows)
        for left in range(0, n_cols, side):
            yield _Tile(slice(top, bottom), slice(left, min(left + side, n_cols)), is_own and left == top)


def _values(variables: Sequence[Variable], others: Sequence[Variable], tile: _Tile) -> list[Tensor]:
    return [v.part(tile.rows).values(o.part(tile.cols)) for v, o in zip(variables, others, strict=True)]


def _off_diagonal_product(factors: list[Tensor], tile: _Tile) -> Tensor:
    product = factors[0]
    for factor in factors[1:]:
        product = product * factor
    return _without_diagonal(product, tile)


def _without_diagonal(matrix: Tensor, tile: _Tile) -> Tensor:
    """Set the entries of every sample with itself to 0, in place."""
    if tile.on_diagonal:
        matrix.diagonal().zero_()
    return matrix


def _sum(squares: Tensor) -> Tensor:
    """Return the sum in fp64; where the device has none, of sums of rows."""
    return squares.sum(dtype=torch.float64) if has_fp64(squares.device) else in_fp64(squares.sum(1)).sum()


def _slope(kernel: RBF) -> float:
    return float(kernel.bandwidth) ** -2
