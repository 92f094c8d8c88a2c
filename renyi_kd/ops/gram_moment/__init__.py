"""Second moment of a Hadamard product of Gram matrices of many samples, without an n x n matrix."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from renyi_kd.gram import KnownKernel
from renyi_kd.ops.dispatch import Impl, resolve
from renyi_kd.ops.gram_moment import reference, ring
from renyi_kd.ops.gram_moment.shards import Shards

MAX_VARIABLES = 4


def gram_moment(
    features: Sequence[Tensor],
    kernels: Sequence[KnownKernel],
    *,
    impl: Impl = "auto",
    shards: Shards | None = None,
) -> Tensor:
    """Return what :func:`reference.gram_moment` defines, by the implementation that ``impl`` names.

    Of the samples of several processes, ``shards``, :func:`ring.gram_moment` does.
    """
    limits = []
    if len(features) > MAX_VARIABLES:
        limits.append(f"{len(features)} variables (the kernels take at most {MAX_VARIABLES})")
    if shards is not None:
        limits.append("samples of several processes (the kernels take those of one)")
    if resolve(impl, *features, limits=limits) == "triton":
        from renyi_kd.ops.gram_moment import triton

        return triton.gram_moment(features, kernels)
    return reference.gram_moment(features, kernels) if shards is None else ring.gram_moment(features, kernels, shards)
