"""Both terms of the InfoSAM loss from the relation maps of a batch."""

from __future__ import annotations

from torch import Tensor

from renyi_kd.ops.dispatch import Impl, resolve
from renyi_kd.ops.gram_terms import reference
from renyi_kd.ops.gram_terms.types import Distillation, RelationTerms

# A row of each Gram must fit in the registers of one program.
MAX_SAMPLES = 256


def gram_terms(
    image_gram: Tensor,
    token_gram: Tensor,
    teacher_scores: Tensor,
    student_scores: Tensor,
    *,
    lambda_r: float = 1.0,
    lambda_d: float = 0.5,
    alpha: float = 2.0,
    distillation: Distillation = "mutual_information",
    detach_teacher: bool = False,
    impl: Impl = "auto",
) -> RelationTerms:
    """Return what :func:`reference.gram_terms` defines, by the implementation that ``impl`` names."""
    limits = []
    if alpha != 2:
        limits.append(f"alpha = {alpha} (the kernels know the closed form of 2)")
    if len(teacher_scores) > MAX_SAMPLES:
        limits.append(f"{len(teacher_scores)} samples (the kernels take at most {MAX_SAMPLES})")
    if resolve(impl, teacher_scores, student_scores, limits=limits) == "triton":
        from renyi_kd.ops.gram_terms import triton

        return triton.gram_terms(
            image_gram,
            token_gram,
            teacher_scores,
            student_scores,
            lambda_r=lambda_r,
            lambda_d=lambda_d,
            distillation=distillation,
            detach_teacher=detach_teacher,
        )
    return reference.gram_terms(
        image_gram,
        token_gram,
        teacher_scores,
        student_scores,
        lambda_r=lambda_r,
        lambda_d=lambda_d,
        alpha=alpha,
        distillation=distillation,
        detach_teacher=detach_teacher,
    )
