"""The two terms of InfoSAM as entropies: compression of the teacher's relation, distillation to the student's."""

from __future__ import annotations

import torch
from torch import Tensor

from renyi_kd.entropy import renyi_entropy


def infosam_terms(
    image_gram: Tensor,
    token_gram: Tensor,
    teacher_gram: Tensor,
    student_gram: Tensor,
    *,
    alpha: float = 2.0,
    detach_teacher: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the compression term L_r and the distillation term L_d, in bits.

    ``L_r = S(R_T) - S(Z_I, Z_M, R_T)``: what the teacher's relation says of its inputs, less S(Z_I, Z_M), which does
    not depend on the relation; ``L_d = -I(R_T; R_S)``. For n samples ``-log2 n <= L_r <= 0`` and
    ``L_d >= -min(S(R_T), S(R_S))``. L_d is not smallest where the student equals the teacher, but where the
    student's relations are orthogonal to each other.

    Args:
        image_gram: ``[s, s]`` of the teacher's image features; fp64, unit diagonal, as all four.
        token_gram: ``[s, s]`` of the teacher's mask tokens.
        teacher_gram: ``[s, s]`` of the teacher's relation maps.
        student_gram: ``[s, s]`` of the student's relation maps.
        alpha: order of the entropies, in (0, inf].
        detach_teacher: whether L_d takes the teacher's Gram as a constant.

    Returns:
        ``(compression, distillation)``, each ``[]`` in fp64. Differentiable.

    Cost: O(s^2) at alpha = 2, O(s^3) elsewhere.

    Source: Zhang et al., InfoSAM, ICML 2025: the compression loss L_r and the distillation loss L_d.

    """
    target = teacher_gram.detach() if detach_teacher else teacher_gram
    # All entropies in one batch: the matrices are so small that each call costs as much as all of them.
    teacher, joint, fixed, student, both = renyi_entropy(
        torch.stack(
            [teacher_gram, image_gram * token_gram * teacher_gram, target, student_gram, target * student_gram]
        ),
        alpha,
    )
    return teacher - joint, both - fixed - student
