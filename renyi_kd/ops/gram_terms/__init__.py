"""Both terms of the InfoSAM loss from the relation maps of a batch."""

from __future__ import annotations

from torch import Tensor

from renyi_kd.objective import Objective
from renyi_kd.ops.dispatch import Impl, resolve
from renyi_kd.ops.gram_terms import reference
from renyi_kd.ops.gram_terms.types import RelationTerms

# A row of each Gram must fit in the registers of one program.
MAX_SAMPLES = 256


def gram_terms(
    image_gram: Tensor,
    token_gram: Tensor,
    teacher_scores: Tensor,
    student_scores: Tensor,
    objective: Objective,
    *,
    weight: Tensor | None = None,
    impl: Impl = "auto",
) -> RelationTerms:
    """Return what :func:`reference.gram_terms` defines, by the implementation that ``impl`` names."""
    limits = []
    if objective.alpha != 2:
        limits.append(f"alpha = {objective.alpha} (the kernels know the closed form of 2)")
    if len(teacher_scores) > MAX_SAMPLES:
        limits.append(f"{len(teacher_scores)} samples (the kernels take at most {MAX_SAMPLES})")
    if resolve(impl, teacher_scores, student_scores, limits=limits) == "triton":
        from renyi_kd.ops.gram_terms import triton

        return triton.gram_terms(image_gram, token_gram, teacher_scores, student_scores, objective, weight)
    return reference.gram_terms(image_gram, token_gram, teacher_scores, student_scores, objective, weight)
