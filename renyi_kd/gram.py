"""Gram matrices with a unit diagonal: features in, one kernel value per pair of samples out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from renyi_kd.fp64 import in_fp64, no_numbers, out_of_fp64
from renyi_kd.magnitude import near_one

KernelName = Literal["linear", "rbf", "polynomial"]


@dataclass(frozen=True)
class Linear:
    """The kernel ``x_i . x_j``, of which a unit diagonal makes the cosine similarity."""

    def __call__(self, features: Tensor) -> Tensor:
        """Return the values between all samples of ``[..., n, d]``, ``[..., n, n]``."""
        return features @ features.mT


@dataclass(frozen=True)
class RBF:
    """The kernel ``exp(-||x_i - x_j||^2 / (2 bandwidth^2))``.

    Samples may lie any number of bandwidths apart. Distances of fp64 features are those of their differences; those of
    others are expanded in fp64, which has more digits than they can lose. The Triton kernel of :func:`feature_entropy`
    expands them in fp32. Where features reach R > 3 bandwidths from their mean, it is off by up to ``1e-7 R^2`` bits.
    Take ``impl="reference"`` for R above a hundred.

    Args:
        bandwidth: in the unit of the features, between 1e-150 and 1e150. ``"median"``: the square root of the median
            squared distance over the pairs i < j, and 1 where that is zero. Of an even number of pairs, the lower
            middle value counts.

    Raises:
        ValueError: ``bandwidth`` is neither.

    """

    bandwidth: float | Literal["median"] = "median"

    def __post_init__(self) -> None:
        if self.bandwidth == "median":
            return
        # Its square must be a number too.
        if not isinstance(self.bandwidth, float | int) or not 1e-150 < self.bandwidth < 1e150:
            raise ValueError(
                f"RBF: bandwidth must be above 0 or 'median', got {self.bandwidth!r:.50}; "
                "'median' takes it from the distances of the samples, and others lie between 1e-150 and 1e150"
            )

    def __call__(self, features: Tensor) -> Tensor:
        """Return the values between all samples of ``[..., n, d]``, ``[..., n, n]``; differentiable in the median."""
        if self.bandwidth == "median":
            squared = _squared_distances(near_one(features, (-2, -1)))
            scale = _median_off_diagonal(squared)[..., None, None]
        else:
            squared = _squared_distances(features)
            scale = squared.new_tensor(self.bandwidth).square()
        return out_of_fp64((-squared / (2 * scale)).exp(), features.device, features.dtype)


@dataclass(frozen=True)
class Polynomial:
    """The kernel ``(x_i . x_j + offset)^degree``.

    Args:
        degree: a whole number of at least 1.
        offset: at least 0.

    Raises:
        ValueError: one of them is out of its range, where the kernel would not be positive semidefinite.

    """

    degree: int = 2
    offset: float = 1.0

    def __post_init__(self) -> None:
        whole = isinstance(self.degree, int) and not isinstance(self.degree, bool)
        if not whole or self.degree < 1 or not self.offset >= 0:
            raise ValueError(
                "Polynomial: degree must be a whole number of at least 1 and offset at least 0, got "
                f"{self.degree} and {self.offset}; other values give a kernel that is not positive semidefinite"
            )

    def __call__(self, features: Tensor) -> Tensor:
        """Return the values between all samples of ``[..., n, d]``, ``[..., n, n]``."""
        return (features @ features.mT + self.offset) ** self.degree


# Which know enough of themselves to do without a matrix of all pairs.
KnownKernel = Linear | RBF | Polynomial
Kernel = KernelName | KnownKernel | Callable[[Tensor], Tensor]


def known_kernel(function: str, kernel: KernelName | KnownKernel, way_out: str) -> KnownKernel:
    """Return the kernel that ``kernel`` is or, with its defaults, names; ``function`` begins the message.

    Raises:
        ValueError: it is neither.

    """
    if isinstance(kernel, KnownKernel):
        return kernel
    if kernel == "linear":
        return Linear()
    if kernel == "rbf":
        return RBF()
    if kernel == "polynomial":
        return Polynomial()
    raise ValueError(
        f"{function}: kernel must be 'linear', 'rbf' or 'polynomial', or one of Linear(), RBF() and Polynomial(), got "
        f"{kernel!r}; {way_out}"
    )


def gram_matrix(features: Tensor, kernel: Kernel = "linear") -> Tensor:
    r"""Return the Gram matrix of n samples, normalised to a unit diagonal.

    ``K_ij / sqrt(K_ii K_jj)``. A sample with ``K_ii = 0``, such as a zero feature under the linear kernel, has no
    direction. It is taken as orthogonal to every other. So the diagonal is 1 throughout, and the laws of the joint
    entropy hold.

    Args:
        features: ``[..., n, d]``, floating point.
        kernel: :class:`Linear`, :class:`RBF` or :class:`Polynomial`; ``"linear"``, ``"rbf"`` or ``"polynomial"`` for
            these with their defaults; or a callable from ``[..., n, d]`` to ``[..., n, n]``.

    Returns:
        ``[..., n, n]`` in the dtype of ``features``, but at least fp32. Differentiable any number of times.

    Raises:
        TypeError: ``features`` is not a floating-point tensor.
        ValueError: a shape is out of its range, or ``kernel`` is none.

    Cost: O(n^2 d) time, O(n^2) memory; RBF kernels in fp64.

    >>> gram_matrix(torch.tensor([[3.0, 0.0], [5.0, 0.0], [0.0, 1.0]])).tolist()
    [[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    >>> gram_matrix(torch.tensor([[0.0], [2.0]]), RBF(bandwidth=1.0))[0, 1].log().item()
    -2.0

    """
    fact = no_numbers(features)
    if fact is not None:
        raise TypeError(f"gram_matrix: features must be a floating-point tensor, got {fact}; convert with .float()")
    if features.ndim < 2 or 0 in features.shape[-2:]:
        raise ValueError(
            f"gram_matrix: features must have shape [..., n, d] with n, d >= 1, got {tuple(features.shape)}; "
            "flatten each sample to one row"
        )
    if not callable(kernel):
        kernel = known_kernel("gram_matrix", kernel, "pass a function of the features for any other kernel")
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    with torch.autocast(features.device.type, enabled=False):
        if reads_directions(kernel):
            features = near_one(features, -1)
        # A power of numbers that are not near one would leave the range of their dtype, or its gradient would.
        degree, base = (kernel.degree, replace(kernel, degree=1)) if isinstance(kernel, Polynomial) else (1, kernel)
        raw = base(features)
        expected = (*features.shape[:-1], features.shape[-2])
        if raw.shape != expected:
            raise ValueError(
                f"gram_matrix: kernel must return shape {expected}, got {tuple(raw.shape)}; "
                "it is called with features [..., n, d] and gives one value per pair of samples"
            )
        unit = unit_diagonal(raw)
        return unit if degree == 1 else unit**degree


def reads_directions(kernel: Kernel) -> bool:
    """Return whether nothing but the directions of samples remains under a unit diagonal, however long these are."""
    return isinstance(kernel, Linear) or (isinstance(kernel, Polynomial) and kernel.offset == 0)


def unit_diagonal(gram: Tensor) -> Tensor:
    """Return ``gram`` with every sample scaled to ``K_ii = 1``; a sample with ``K_ii = 0`` becomes orthogonal to all.

    Args:
        gram: ``[..., n, n]``, floating point, with a diagonal that is not negative.

    Returns:
        ``[..., n, n]`` in the same dtype, the diagonal exactly 1 (NaN where it was). Differentiable; a sample
        without direction gets the gradient 0.

    Cost: O(n^2).

    """
    return with_unit_diagonal(gram, unit_scale(gram))


def unit_scale(gram: Tensor) -> Tensor:
    """Return what scales every sample to ``K_ii = 1``, ``[..., n]``; 0 where ``K_ii = 0``."""
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    # 1 / sqrt(inf) is 0, and so is its gradient.
    return diagonal.masked_fill(diagonal == 0, math.inf).rsqrt()


def with_unit_diagonal(gram: Tensor, scale: Tensor) -> Tensor:
    """Return :func:`unit_diagonal` of a Gram matrix by its :func:`unit_scale`."""
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    # Rounding leaves K_ii / K_ii a little off 1, and a zero sample leaves 0: the laws want the constant.
    return torch.addcmul(identity, gram * scale[..., :, None] * scale[..., None, :], 1 - identity)


def pair_distances(rows: Tensor, others: Tensor) -> Tensor:
    """Return squared distances of fp64 rows, each from its difference; without gradient.

    Where two clusters lie far apart, ``|x|^2 + |y|^2 - 2 x . y`` of rows within one is rounding alone.
    """
    # By matrix products, which is the default, cdist does just that.
    return torch.cdist(rows.detach(), others.detach(), compute_mode="donot_use_mm_for_euclid_dist").square()


def _squared_distances(features: Tensor) -> Tensor:
    """Return ``[..., n, n]`` in fp64, where that is; differentiable any number of times."""
    # Distances do not depend on the origin; near the mean of the samples the squares cancel least.
    rows = in_fp64(features)
    rows = rows - rows.mean(-2, keepdim=True)
    norms = rows.square().sum(-1)
    expanded = norms[..., :, None] + norms[..., None, :] - 2 * rows @ rows.mT
    # fp64 has the digits that the expansion of fp32 features loses; those of fp64 features have nowhere to go.
    exact = pair_distances(rows, rows) if features.dtype == torch.float64 else expanded.detach().clamp_min(0)
    # The value of the one, and the gradient 2 (x_i - x_j) of the other, which needs no distance to divide by.
    squared = expanded + (exact - expanded).detach()
    return squared * ~torch.eye(features.shape[-2], dtype=torch.bool, device=squared.device)


def _median_off_diagonal(squared: Tensor) -> Tensor:
    """Return the median over the pairs i < j, 1 where it is zero or there is none."""
    n = squared.shape[-1]
    upper = torch.ones(n, n, dtype=torch.bool, device=squared.device).triu(1)
    median = squared[..., upper].median(-1).values if n > 1 else squared.new_ones(squared.shape[:-2])
    return torch.where(median == 0, torch.ones_like(median), median)
