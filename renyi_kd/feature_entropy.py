"""Entropies of order 2 straight from features: for so many samples that their Gram matrix does not fit in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from renyi_kd.ops.dispatch import Impl
from renyi_kd.ops.gram_moment import SampleKernel, gram_moment

KernelName = Literal["linear", "rbf", "polynomial"]

# The median distance of so many samples has an error of about 1 %, and takes 16 MiB.
_MEDIAN_SAMPLES = 2048


def renyi_entropy_of(
    *features: Tensor,
    kernel: KernelName | Sequence[KernelName] = "linear",
    bandwidth: float | Literal["median"] = "median",
    degree: int = 2,
    offset: float = 1.0,
    impl: Impl = "auto",
) -> Tensor:
    """Return the joint Rényi entropy of order 2 of variables given by their features, in bits.

    What ``joint_entropy(*[gram_matrix(x, kernel) for x in features])`` is, of one variable ``renyi_entropy``, without
    any n x n matrix: ``-log2(sum_ij prod_k K^k_ij^2 / n^2)`` with unit diagonals. Between 0 and log2 n, and not below
    the entropy of any one variable.

    Args:
        features: one to four variables, each ``[n, d_k]``, floating point, of the same n samples.
        kernel: of all variables, or one name for each; see :func:`gram_matrix`.
        bandwidth: of RBF kernels. ``"median"`` takes each variable's from at most 2,048 samples at equal distances in
            their order, as a constant: up to that number the value is that of :func:`gram_matrix`, but no gradient
            flows through the median, and it waits for the device.
        degree: of polynomial kernels, at least 1.
        offset: of polynomial kernels, at least 0.
        impl: ``"auto"``, ``"reference"`` or ``"triton"``; an explicit choice never falls back.

    Returns:
        ``[]`` in bits, in fp32, or fp64 if any feature is. First derivatives only.

    Raises:
        TypeError: a feature is not a floating-point tensor.
        ValueError: shapes or devices do not fit, or an option is out of its range.
        NotImplementedError: a second derivative is asked for.

    Cost: O(n^2 sum_k d_k), three to four times that with gradients; memory O(n sum_k d_k), and a few
    MiB per variable.

    Source: Yu et al., IEEE Trans. PAMI 42 (2019): the joint entropy of several variables.

    >>> renyi_entropy_of(torch.eye(4)).item()
    2.0

    """
    _check("renyi_entropy_of", features)
    names = [kernel] * len(features) if isinstance(kernel, str) else list(kernel)
    if len(names) != len(features):
        raise ValueError(
            f"renyi_entropy_of: kernel must be one name or one per variable, got {len(names)} for {len(features)} "
            "variables; give as many as features"
        )
    kernels = [_kernel(x, name, bandwidth, degree, offset) for x, name in zip(features, names, strict=True)]
    dtype = torch.float32
    for x in features:
        dtype = torch.promote_types(dtype, x.dtype)
    moment = gram_moment(features, kernels, impl=impl)
    return -(moment / len(features[0]) ** 2).log2().to(dtype)


def mutual_information_of(
    a: Tensor,
    b: Tensor,
    *,
    kernel: KernelName | Sequence[KernelName] = "linear",
    bandwidth: float | Literal["median"] = "median",
    degree: int = 2,
    offset: float = 1.0,
    impl: Impl = "auto",
) -> Tensor:
    """Return the mutual information of order 2 of two variables given by their features, in bits.

    ``S(A) + S(B) - S(A, B)`` with the entropies of :func:`renyi_entropy_of`. At most ``min(S(A), S(B))``; it can be a
    little below 0, as at every order but 1, and is not clamped.

    Args:
        a: ``[n, d_a]``.
        b: ``[n, d_b]``, of the same samples.
        kernel: of both variables, or one name for each.
        bandwidth: as for :func:`renyi_entropy_of`.
        degree: likewise.
        offset: likewise.
        impl: likewise.

    Returns:
        ``[]`` in bits; dtype and derivatives as :func:`renyi_entropy_of`.

    Raises:
        TypeError: a feature is not a floating-point tensor.
        ValueError: as :func:`renyi_entropy_of`.
        NotImplementedError: a second derivative is asked for.

    Cost: three entropies.

    Source: Yu et al., IEEE Trans. PAMI 42 (2019).

    >>> mutual_information_of(torch.eye(4), torch.eye(4)).item()
    2.0

    """
    _check("mutual_information_of", (a, b))
    names = [kernel] * 2 if isinstance(kernel, str) else list(kernel)
    of_a = renyi_entropy_of(a, kernel=names[:1], bandwidth=bandwidth, degree=degree, offset=offset, impl=impl)
    of_b = renyi_entropy_of(b, kernel=names[1:], bandwidth=bandwidth, degree=degree, offset=offset, impl=impl)
    both = renyi_entropy_of(a, b, kernel=names, bandwidth=bandwidth, degree=degree, offset=offset, impl=impl)
    return of_a + of_b - both


def _check(function: str, features: Sequence[Tensor]) -> None:
    if not features:
        raise ValueError(
            f"{function}: features must hold at least one variable, got none; pass one tensor per variable"
        )
    for index, x in enumerate(features):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            fact = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(
                f"{function}: features[{index}] must be a floating-point tensor, got {fact}; convert with .float()"
            )
        if x.ndim != 2 or 0 in x.shape:
            raise ValueError(
                f"{function}: features[{index}] must have shape [n, d] with n, d >= 1, got {tuple(x.shape)}; "
                "flatten each sample to one row"
            )
        if len(x) != len(features[0]) or x.device != features[0].device:
            raise ValueError(
                f"{function}: features must share samples and device, got {len(x)} on {x.device} beside "
                f"{len(features[0])} on {features[0].device}; pass every variable of the same samples in the same order"
            )


def _kernel(x: Tensor, name: str, bandwidth: float | str, degree: int, offset: float) -> SampleKernel:
    if name == "linear":
        return SampleKernel("linear")
    if name == "polynomial":
        if isinstance(degree, bool) or degree != int(degree) or degree < 1 or not offset >= 0:
            raise ValueError(
                "renyi_entropy_of: degree must be a whole number of at least 1 and offset at least 0, got "
                f"{degree} and {offset}; other values give a kernel that is not positive semidefinite"
            )
        return SampleKernel("polynomial", float(offset), int(degree))
    if name != "rbf":
        raise ValueError(
            f"renyi_entropy_of: kernel must be 'linear', 'rbf' or 'polynomial', got {name!r}; "
            "for any other kernel use joint_entropy(gram_matrix(features, kernel))"
        )
    if bandwidth == "median":
        return SampleKernel("rbf", median_distance(x))
    if not isinstance(bandwidth, float | int) or not bandwidth > 0:
        raise ValueError(
            f"renyi_entropy_of: bandwidth must be above 0 or 'median', got {bandwidth!r}; "
            "'median' takes it from the distances of the samples"
        )
    return SampleKernel("rbf", float(bandwidth))


def median_distance(x: Tensor) -> float:
    """Return the median distance of at most 2,048 samples at equal distances in their order; 1 where it is zero."""
    step = -(-len(x) // _MEDIAN_SAMPLES)
    some = x.detach()[::step].to(torch.promote_types(x.dtype, torch.float32))
    distances = torch.pdist(some - some.mean(0))
    median = distances.median().item() if len(distances) else 1.0
    return median or 1.0
