"""Gram matrices with a unit diagonal: features in, one kernel value per pair of samples out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Kernel = Literal["linear", "rbf", "polynomial"] | Callable[[Tensor], Tensor]


def gram_matrix(
    features: Tensor,
    kernel: Kernel = "linear",
    *,
    bandwidth: float | str = "median",
    degree: int = 2,
    offset: float = 1.0,
) -> Tensor:
    r"""Return the Gram matrix of n samples, normalised to a unit diagonal.

    ``K_ij / sqrt(K_ii K_jj)`` with K one of

    - ``"linear"``: ``x_i . x_j``, so that the result is the cosine similarity;
    - ``"rbf"``: ``exp(-||x_i - x_j||^2 / (2 bandwidth^2))``;
    - ``"polynomial"``: ``(x_i . x_j + offset)^degree``;
    - a callable from ``[..., n, d]`` to ``[..., n, n]``.

    A sample with ``K_ii = 0`` (under the linear kernel: a zero feature) has no direction: it is taken as orthogonal
    to every other, so the diagonal is 1 throughout and the laws of the joint entropy hold.

    Args:
        features: ``[..., n, d]``, floating point.
        kernel: as above.
        bandwidth: of the RBF kernel, in the unit of the features. ``"median"``: the square root of the median
            squared distance over the pairs i < j (the lower of the two middle values of an even number);
            differentiable, and 1 where that is zero.
        degree: of the polynomial kernel, at least 1.
        offset: of the polynomial kernel, at least 0.

    Returns:
        ``[..., n, n]`` in the dtype of ``features``, but at least fp32. Differentiable any number of times.

    Raises:
        TypeError: ``features`` is not a floating-point tensor.
        ValueError: a shape, ``kernel``, ``bandwidth``, ``degree`` or ``offset`` is out of its range.

    Cost: O(n^2 d) time, O(n^2) memory.

    >>> gram_matrix(torch.tensor([[3.0, 0.0], [5.0, 0.0], [0.0, 1.0]])).tolist()
    [[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]

    """
    if not isinstance(features, Tensor) or not features.is_floating_point():
        fact = features.dtype if isinstance(features, Tensor) else type(features).__name__
        raise TypeError(f"gram_matrix: features must be a floating-point tensor, got {fact}; convert with .float()")
    if features.ndim < 2 or 0 in features.shape[-2:]:
        raise ValueError(
            f"gram_matrix: features must have shape [..., n, d] with n, d >= 1, got {tuple(features.shape)}; "
            "flatten each sample to one row"
        )
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    with torch.autocast(features.device.type, enabled=False):
        if callable(kernel):
            raw = kernel(features)
            expected = (*features.shape[:-1], features.shape[-2])
            if raw.shape != expected:
                raise ValueError(
                    f"gram_matrix: kernel must return shape {expected}, got {tuple(raw.shape)}; "
                    "it is called with features [..., n, d] and gives one value per pair of samples"
                )
        elif kernel == "linear":
            raw = features @ features.mT
        elif kernel == "rbf":
            raw = _rbf(features, bandwidth)
        elif kernel == "polynomial":
            if degree != int(degree) or degree < 1 or offset < 0:
                raise ValueError(
                    "gram_matrix: degree must be a whole number of at least 1 and offset at least 0, got "
                    f"{degree} and {offset}; other values give a kernel that is not positive semidefinite"
                )
            raw = (features @ features.mT + offset) ** degree
        else:
            raise ValueError(
                f"gram_matrix: kernel must be 'linear', 'rbf', 'polynomial' or a callable, got {kernel!r}; "
                "pass a function of the features for any other kernel"
            )
        return unit_diagonal(raw)


def unit_diagonal(gram: Tensor) -> Tensor:
    """Return ``gram`` with every sample scaled to ``K_ii = 1``; a sample with ``K_ii = 0`` becomes orthogonal to all.

    Args:
        gram: ``[..., n, n]``, floating point, with a diagonal that is not negative.

    Returns:
        ``[..., n, n]`` in the same dtype, the diagonal exactly 1 (NaN where it was). Differentiable; a sample
        without direction gets the gradient 0.

    Cost: O(n^2).

    """
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    scale = torch.where(diagonal == 0, torch.zeros_like(diagonal), diagonal.masked_fill(diagonal == 0, 1.0).rsqrt())
    normalised = gram * scale[..., :, None] * scale[..., None, :]
    identity = torch.eye(gram.shape[-1], dtype=torch.bool, device=gram.device)
    # Rounding leaves K_ii / K_ii a little off 1, and a zero sample leaves 0: the laws want the constant.
    return torch.where(identity & ~normalised.isnan(), torch.ones_like(normalised), normalised)


def _rbf(features: Tensor, bandwidth: float | str) -> Tensor:
    n = features.shape[-2]
    # Distances do not depend on the origin; near the mean of the samples the squares cancel least.
    centred = features - features.mean(-2, keepdim=True)
    squared_norms = centred.square().sum(-1)
    squared = squared_norms[..., :, None] + squared_norms[..., None, :] - 2 * centred @ centred.mT
    off_diagonal = ~torch.eye(n, dtype=torch.bool, device=features.device)
    squared = squared.clamp_min(0) * off_diagonal
    if bandwidth == "median":
        upper = torch.ones(n, n, dtype=torch.bool, device=features.device).triu(1)
        scale = squared[..., upper].median(-1).values if n > 1 else squared.new_ones(squared.shape[:-2])
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)[..., None, None]
        return (-squared / (2 * scale)).exp()
    if not isinstance(bandwidth, float | int) or not bandwidth > 0:
        raise ValueError(
            f"gram_matrix: bandwidth must be above 0 or 'median', got {bandwidth!r}; "
            "'median' takes it from the distances of the samples"
        )
    return (-squared / (2 * bandwidth**2)).exp()
