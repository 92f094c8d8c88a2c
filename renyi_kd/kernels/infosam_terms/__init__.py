"""Both terms of the InfoSAM loss from the Gram matrices of a batch."""

from __future__ import annotations

from torch import Tensor

from renyi_kd.kernels.dispatch import Impl, resolve
from renyi_kd.kernels.infosam_terms import reference


def infosam_terms(
    image_gram: Tensor,
    token_gram: Tensor,
    teacher_gram: Tensor,
    student_gram: Tensor,
    *,
    alpha: float = 2.0,
    detach_teacher: bool = False,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Return what :func:`reference.infosam_terms` defines, by the implementation that ``impl`` names."""
    resolve(impl)
    return reference.infosam_terms(
        image_gram, token_gram, teacher_gram, student_gram, alpha=alpha, detach_teacher=detach_teacher
    )
