"""Entropies of order 2 straight from features: for so many samples that their Gram matrix does not fit in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from renyi_kd.fp64 import fp64_device, out_of_fp64
from renyi_kd.gram import RBF, KernelName, KnownKernel, known_kernel
from renyi_kd.ops.dispatch import Impl, check_impl
from renyi_kd.ops.gram_moment import gram_moment

# The median distance of so many samples has an error of about 1 %, and takes 16 MiB.
_MEDIAN_SAMPLES = 2048
FeatureKernel = KernelName | KnownKernel


def feature_entropy(
    *features: Tensor, kernel: FeatureKernel | Sequence[FeatureKernel] = "linear", impl: Impl = "auto"
) -> Tensor:
    """Return the joint Rényi entropy of order 2 of variables given by their features, in bits.

    What ``joint_entropy(*[gram_matrix(x, kernel) for x in features])`` is, of one variable ``renyi_entropy``, without
    any n x n matrix: ``-log2(sum_ij prod_k K^k_ij^2 / n^2)`` with unit diagonals. Between 0 and log2 n, and not below
    the entropy of any one variable.

    Args:
        features: one to four variables, each ``[n, d_k]``, floating point, of the same n samples.
        kernel: of all variables, or one for each; see :func:`gram_matrix`. ``RBF("median")`` takes each variable's
            bandwidth from at most 2,048 samples at equal distances in their order, as a constant. Up to that number the
            value is that of :func:`gram_matrix`. No gradient flows through the median, and it waits for the device.
        impl: ``"auto"``, ``"reference"`` or ``"triton"``; an explicit choice never falls back.

    Returns:
        ``[]`` in bits, in fp32, or fp64 if any feature is. First derivatives only.

    Raises:
        TypeError: a feature is not a floating-point tensor.
        ValueError: shapes or devices do not fit, or there is no such kernel.
        NotImplementedError: a second derivative is asked for.

    Cost: O(n^2 sum_k d_k), three to four times that with gradients; memory O(n sum_k d_k), and a few
    MiB per variable.

    Source: Yu et al., IEEE Trans. PAMI 42 (2019): the joint entropy of several variables.

    >>> feature_entropy(torch.eye(4)).item()
    2.0

    """
    check_impl("feature_entropy", impl)
    kernels = _checked_kernels("feature_entropy", features, kernel)
    return _entropy(features, kernels, impl)


def feature_mutual_information(
    a: Tensor, b: Tensor, *, kernel: FeatureKernel | Sequence[FeatureKernel] = "linear", impl: Impl = "auto"
) -> Tensor:
    """Return the mutual information of order 2 of two variables given by their features, in bits.

    ``S(A) + S(B) - S(A, B)`` with the entropies of :func:`feature_entropy`. At most ``min(S(A), S(B))``; it can be a
    little below 0, as at every order but 1, and is not clamped.

    Args:
        a: ``[n, d_a]``.
        b: ``[n, d_b]``, of the same samples.
        kernel: of both variables, or one for each, as for :func:`feature_entropy`.
        impl: likewise.

    Returns:
        ``[]`` in bits; dtype and derivatives as :func:`feature_entropy`.

    Raises:
        TypeError: a feature is not a floating-point tensor.
        ValueError: as :func:`feature_entropy`.
        NotImplementedError: a second derivative is asked for.

    Cost: three entropies.

    Source: Yu et al., IEEE Trans. PAMI 42 (2019).

    >>> feature_mutual_information(torch.eye(4), torch.eye(4)).item()
    2.0

    """
    features = a, b
    check_impl("feature_mutual_information", impl)
    kernels = _checked_kernels("feature_mutual_information", features, kernel)
    apart = [_entropy([x], [k], impl) for x, k in zip(features, kernels, strict=True)]
    return apart[0] + apart[1] - _entropy(features, kernels, impl)


def _entropy(features: Sequence[Tensor], kernels: Sequence[KnownKernel], impl: Impl) -> Tensor:
    dtype = torch.float32
    for x in features:
        dtype = torch.promote_types(dtype, x.dtype)
    moment = gram_moment(features, kernels, impl=impl)
    return out_of_fp64(-(moment / len(features[0]) ** 2).log2(), features[0].device, dtype)


def _checked_kernels(
    function: str, features: Sequence[Tensor], kernel: FeatureKernel | Sequence[FeatureKernel]
) -> list[KnownKernel]:
    """Return each variable's kernel, medians as numbers, of features and kernels that fit."""
    _check(function, features)
    single = isinstance(kernel, str) or not isinstance(kernel, Sequence)
    given = [cast(FeatureKernel, kernel)] * len(features) if single else cast(Sequence[FeatureKernel], kernel)
    if len(given) != len(features):
        raise ValueError(
            f"{function}: kernel must be one or one per variable, got {len(given)} for {len(features)} variables; "
            "give as many as features"
        )
    way_out = "for any other kernel use joint_entropy(gram_matrix(features, kernel))"
    kernels = [known_kernel(function, one, way_out) for one in given]
    return [
        replace(one, bandwidth=median_distance(x)) if isinstance(one, RBF) and one.bandwidth == "median" else one
        for x, one in zip(features, kernels, strict=True)
    ]


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


def median_distance(x: Tensor) -> float:
    """Return the median distance of at most 2,048 samples at equal distances in their order; 1 if zero or NaN."""
    step = -(-len(x) // _MEDIAN_SAMPLES)
    # Devices without fp64 do not all have this operation either.
    some = x.detach()[::step].to(torch.promote_types(x.dtype, torch.float32)).to(fp64_device(x.device))
    distances = torch.pdist(some)
    median = distances.median().item() if len(distances) else 1.0
    # Of features that are not finite the entropy is NaN whatever the bandwidth.
    return median if median > 0 else 1.0
