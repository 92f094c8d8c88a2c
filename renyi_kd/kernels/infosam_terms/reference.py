"""The two terms of InfoSAM as entropies: compression of the teacher's relation, distillation to the student's."""

from __future__ import annotations

import torch
from torch import Tensor

from renyi_kd.entropy import renyi_entropy
from renyi_kd.gram import unit_diagonal
from renyi_kd.kernels.infosam_terms.terms import RelationTerms


def infosam_terms(
    image_gram: Tensor,
    token_gram: Tensor,
    teacher_scores: Tensor,
    student_scores: Tensor,
    *,
    lambda_r: float = 1.0,
    lambda_d: float = 0.5,
    alpha: float = 2.0,
    detach_teacher: bool = False,
) -> RelationTerms:
    """Return the compression term L_r, the distillation term L_d and their weighted sum, in bits.

    With the Grams of image features Z_I, mask tokens Z_M and relation maps R, each scaled to a unit diagonal:
    ``L_r = S(R_T) - S(Z_I, Z_M, R_T)``: what the teacher's relation says of its inputs, less S(Z_I, Z_M), which does
    not depend on the relation; ``L_d = -I(R_T; R_S)``. For n samples ``-log2 n <= L_r <= 0`` and
    ``L_d >= -min(S(R_T), S(R_S))``. L_d is not smallest where the student equals the teacher, but where the
    student's relations are orthogonal to each other.

    Args:
        image_gram: ``[s, s]`` in fp64: inner products of the teacher's image features.
        token_gram: ``[s, s]`` in fp64: of the teacher's mask tokens.
        teacher_scores: ``[s, ...]``: the teacher's relation maps, in any scale.
        student_scores: the student's, of the same shape.
        lambda_r: weight of L_r.
        lambda_d: weight of L_d.
        alpha: order of the entropies, in (0, inf].
        detach_teacher: whether L_d takes the teacher's Gram as a constant.

    Returns:
        :class:`RelationTerms`, the loss and terms in the dtype of the scores. First derivatives for the scores.

    Cost: O(s^2) products of score maps in fp64; then O(s^2) at alpha = 2, O(s^3) elsewhere.

    Source: Zhang et al., InfoSAM, ICML 2025: the compression loss L_r and the distillation loss L_d.

    """
    # Small beside the features: in fp64 the relations of nearly equal samples still differ by more than rounding.
    relations = torch.stack([teacher_scores.double(), student_scores.double()]).flatten(2)
    grams = torch.cat([torch.stack([image_gram, token_gram]), relations @ relations.mT])
    image, token, teacher, student = unit_diagonal(grams).unbind()
    target = teacher.detach() if detach_teacher else teacher
    # All entropies in one batch: the matrices are so small that each call costs as much as all of them.
    marginal, joint, fixed, of_student, both = renyi_entropy(
        torch.stack([teacher, image * token * teacher, target, student, target * student]), alpha
    )
    compression, distillation = marginal - joint, both - fixed - of_student
    loss = lambda_r * compression + lambda_d * distillation
    dtype = teacher_scores.dtype
    return RelationTerms(
        loss.to(dtype), compression.to(dtype), distillation.to(dtype), teacher.detach(), student.detach()
    )
