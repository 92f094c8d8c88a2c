"""Entropies of order 2 straight from features: for so many samples that their Gram matrix does not fit in memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, distributed

from renyi_kd.fp64 import fp64_device, no_numbers, out_of_fp64
from renyi_kd.gram import RBF, KernelName, KnownKernel, known_kernel, reads_directions
from renyi_kd.magnitude import near_one
from renyi_kd.ops.dispatch import Impl, check_impl
from renyi_kd.ops.gram_moment import gram_moment
from renyi_kd.ops.gram_moment.shards import Header, Shards, agreed_shards

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# The median distance of so many samples has an error of about 1 %, and takes 16 MiB.
_MEDIAN_SAMPLES = 2048
FeatureKernel = KernelName | KnownKernel


def feature_entropy(
    *features: Tensor,
    kernel: FeatureKernel | Sequence[FeatureKernel] = "linear",
    impl: Impl = "auto",
    process_group: ProcessGroup | None = None,
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
        impl: ``"auto"``, ``"reference"`` or ``"triton"``; an explicit choice never falls back. The kernels take samples
            of one process only.
        process_group: whose processes hold the samples together, in the order of ranks: each gives its own rows, of
            which there may be none. ``torch.distributed.group.WORLD`` is all processes; None is this one alone. All
            processes of the group call alike, forward and backward.

    Returns:
        ``[]`` in bits, in fp32, or fp64 if any feature is. First derivatives only. Of a group, the value of all its
        samples, bit for bit the same in each process. Each process gets the gradient of its own rows, times the number
        of processes. So the average over processes, which DDP and FSDP take, is the gradient of the value, as under
        ``global_batch``.

    Raises:
        TypeError: a feature is not a floating-point tensor, or ``process_group`` is none of this process.
        ValueError: shapes or devices do not fit, or there is no such kernel; in all processes of a group, if one of
            them refuses its features, or they do not call alike.
        NotImplementedError: a second derivative is asked for.
        RuntimeError: ``impl`` cannot do it, or another process of the group has stopped.

    Cost: O(n^2 sum_k d_k), three to four times that with gradients; memory O(n sum_k d_k), and a few
    MiB per variable. With P processes, each does 1 / P of the work and needs memory for its share of the rows three
    times, with gradients six. It receives ``P // 2`` shares of features, with gradients as many again and their
    gradients. The host waits for one exchange of a few numbers.

    Source: Yu et al., IEEE Trans. PAMI 42 (2019): the joint entropy of several variables.

    >>> feature_entropy(torch.eye(4)).item()
    2.0

    """
    (joint,) = _entropies("feature_entropy", features, [slice(None)], kernel, impl, process_group)
    return joint


def feature_mutual_information(
    a: Tensor,
    b: Tensor,
    *,
    kernel: FeatureKernel | Sequence[FeatureKernel] = "linear",
    impl: Impl = "auto",
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """Return the mutual information of order 2 of two variables given by their features, in bits.

    ``S(A) + S(B) - S(A, B)`` with the entropies of :func:`feature_entropy`. At most ``min(S(A), S(B))``; it can be a
    little below 0, as at every order but 1, and is not clamped.

    Args:
        a: ``[n, d_a]``.
        b: ``[n, d_b]``, of the same samples.
        kernel: of both variables, or one for each, as for :func:`feature_entropy`.
        impl: likewise.
        process_group: likewise.

    Returns:
        ``[]`` in bits; dtype and derivatives as :func:`feature_entropy`.

    Raises:
        TypeError: as :func:`feature_entropy`.
        ValueError: likewise.
        NotImplementedError: a second derivative is asked for.
        RuntimeError: as :func:`feature_entropy`.

    Cost: three entropies.

    Source: Yu et al., IEEE Trans. PAMI 42 (2019).

    >>> feature_mutual_information(torch.eye(4), torch.eye(4)).item()
    2.0

    """
    parts = [slice(0, 1), slice(1, 2), slice(0, 2)]
    of_a, of_b, joint = _entropies("feature_mutual_information", (a, b), parts, kernel, impl, process_group)
    return of_a + of_b - joint


def _entropies(
    function: str,
    features: Sequence[Tensor],
    parts: Sequence[slice],
    kernel: FeatureKernel | Sequence[FeatureKernel],
    impl: Impl,
    group: ProcessGroup | None,
) -> list[Tensor]:
    """Return the joint entropy of each part of the variables."""
    if group is not None and torch.compiler.is_compiling():
        # No compiler traces what processes tell one another.
        eager = torch.compiler.disable(_entropies)  # type: ignore[no-untyped-call]
        return cast(list[Tensor], eager(function, features, parts, kernel, impl, group))
    kernels, shards = _checked(function, features, kernel, impl, group)
    features = [near_one(x, -1) if reads_directions(one) else x for x, one in zip(features, kernels, strict=True)]
    return [_entropy(features[part], kernels[part], impl, shards) for part in parts]


def _entropy(features: Sequence[Tensor], kernels: Sequence[KnownKernel], impl: Impl, shards: Shards | None) -> Tensor:
    dtype = torch.float32
    for x in features:
        dtype = torch.promote_types(dtype, x.dtype)
    moment = gram_moment(features, kernels, impl=impl, shards=shards)
    n_samples = len(features[0]) if shards is None else shards.n_samples
    return out_of_fp64(-(moment / n_samples**2).log2(), features[0].device, dtype)


def _checked(
    function: str,
    features: Sequence[Tensor],
    kernel: FeatureKernel | Sequence[FeatureKernel],
    impl: Impl,
    group: ProcessGroup | None,
) -> tuple[list[KnownKernel], Shards | None]:
    """Return each variable's kernel, medians as numbers, of features that fit, and whose samples they are."""
    if group is None:
        kernels, shards = _checked_kernels(function, features, kernel, impl, least=1), None
    else:
        if not (distributed.is_available() and isinstance(group, distributed.ProcessGroup)):
            raise TypeError(
                f"{function}: process_group must be a process group that has this process, or None, got {group!r}; "
                "torch.distributed.group.WORLD is all processes, and those outside a group do not call"
            )
        kernels, shards = _agreed(function, features, kernel, impl, group)
    return [
        replace(one, bandwidth=median_distance(x, shards))
        if isinstance(one, RBF) and one.bandwidth == "median"
        else one
        for x, one in zip(features, kernels, strict=True)
    ], shards


def _agreed(
    function: str,
    features: Sequence[Tensor],
    kernel: FeatureKernel | Sequence[FeatureKernel],
    impl: Impl,
    group: ProcessGroup,
) -> tuple[list[KnownKernel], Shards]:
    """Return what all processes of a group have found of their features."""
    try:
        kernels = _checked_kernels(function, features, kernel, impl, least=0)
    except (TypeError, ValueError) as error:
        tensors = [x for x in features if isinstance(x, Tensor)] or [torch.empty(0)]
        agreed_shards(function, group, Header(0, "", refusal=str(error)), tensors[0].device)
        raise
    enabled = torch.is_grad_enabled()
    kinds = [
        f"[n, {x.shape[1]}] {x.dtype} {'with' if enabled and x.requires_grad else 'without'} gradient under {one}"
        for x, one in zip(features, kernels, strict=True)
    ]
    header = Header(len(features[0]), f"{function} of {', '.join(kinds)}, impl={impl!r}")
    return kernels, agreed_shards(function, group, header, features[0].device)


def _checked_kernels(
    function: str,
    features: Sequence[Tensor],
    kernel: FeatureKernel | Sequence[FeatureKernel],
    impl: Impl,
    least: int,
) -> list[KnownKernel]:
    """Return each variable's kernel, of features that fit and have at least as many samples."""
    check_impl(function, impl)
    _check(function, features, least)
    single = isinstance(kernel, str) or not isinstance(kernel, Sequence)
    given = [cast(FeatureKernel, kernel)] * len(features) if single else cast(Sequence[FeatureKernel], kernel)
    if len(given) != len(features):
        raise ValueError(
            f"{function}: kernel must be one or one per variable, got {len(given)} for {len(features)} variables; "
            "give as many as features"
        )
    way_out = "for any other kernel use joint_entropy(gram_matrix(features, kernel))"
    return [known_kernel(function, one, way_out) for one in given]


def _check(function: str, features: Sequence[Tensor], least: int) -> None:
    if not features:
        raise ValueError(
            f"{function}: features must hold at least one variable, got none; pass one tensor per variable"
        )
    for index, x in enumerate(features):
        fact = no_numbers(x)
        if fact is not None:
            raise TypeError(
                f"{function}: features[{index}] must be a floating-point tensor, got {fact}; convert with .float()"
            )
        if x.ndim != 2 or len(x) < least or x.shape[1] == 0:
            sizes = "n, d >= 1" if least else "d >= 1"
            raise ValueError(
                f"{function}: features[{index}] must have shape [n, d] with {sizes}, got {tuple(x.shape)}; "
                "flatten each sample to one row"
            )
        if len(x) != len(features[0]) or x.device != features[0].device:
            raise ValueError(
                f"{function}: features must share samples and device, got {len(x)} on {x.device} beside "
                f"{len(features[0])} on {features[0].device}; pass every variable of the same samples in the same order"
            )


def median_distance(x: Tensor, shards: Shards | None = None) -> float:
    """Return the median distance of at most 2,048 samples at equal distances in their order; 1 if zero or NaN.

    Those of ``shards`` are taken as if they were one process's, and the median is the same in all processes.
    """
    n_samples = len(x) if shards is None else shards.n_samples
    step = -(-n_samples // _MEDIAN_SAMPLES)
    some = x.detach()[::step] if shards is None else shards.every(step, x.detach())
    # Devices without fp64 do not all have this operation either.
    some = some.to(torch.promote_types(x.dtype, torch.float32)).to(fp64_device(x.device))
    distances = torch.pdist(some)
    median = distances.median().item() if len(distances) else 1.0
    if not 1e-15 < median < 1e15:
        # Squares may have left the range of the dtype.
        largest = some.abs().amax().item() if some.numel() else 0.0
        some = some.double() / largest
        median = torch.pdist(some).median().item() * largest if 0 < largest < math.inf else 0.0
    # Of features that are not finite the entropy is NaN whatever the bandwidth.
    return median if median > 0 else 1.0
