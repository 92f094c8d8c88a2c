"""Score of every pixel for every token and prompt of its image, in one pass over the feature map."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from renyi_kd.kernels.dispatch import Impl, resolve
from renyi_kd.kernels.relation_scores import reference


def relation_scores(
    image_features: Tensor,
    directions: Tensor,
    image_index: Sequence[int] | None = None,
    *,
    eps: float = 1e-5,
    impl: Impl = "auto",
) -> Tensor:
    """Return what :func:`reference.relation_scores` defines, by the implementation that ``impl`` names."""
    resolve(impl)
    return reference.relation_scores(image_features, directions, image_index, eps=eps)
