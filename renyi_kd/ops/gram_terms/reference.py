"""The two terms of InfoSAM as entropies: compression of the teacher's relation, distillation to the student's."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from renyi_kd.entropy import renyi_entropy
from renyi_kd.gram import unit_diagonal
from renyi_kd.objective import Objective
from renyi_kd.ops.gram_terms.types import LEAST_PRODUCT, RelationTerms


def gram_terms(
    image_gram: Tensor,
    token_gram: Tensor,
    teacher_scores: Tensor,
    student_scores: Tensor,
    objective: Objective,
    weight: Tensor | None = None,
) -> RelationTerms:
    r"""Return the compression term L_r, the distillation term L_d and their weighted sum, in bits.

    With the Grams of image features Z_I, mask tokens Z_M and relation maps R, each scaled to a unit diagonal:
    ``L_r = S(R_T) - S(Z_I, Z_M, R_T)``: what the teacher's relation says of its inputs, less S(Z_I, Z_M), which does
    not depend on the relation; ``L_d = -I(R_T; R_S)``. For n samples ``-log2 n <= L_r <= 0`` and
    ``L_d >= -min(S(R_T), S(R_S))``. L_d is not smallest where the student equals the teacher, but where the
    student's relations are orthogonal to each other.

    Under ``distillation="cauchy_schwarz"`` L_d is instead the Cauchy-Schwarz divergence of the Grams of R_T and R_S,
    ``-log2(<G_T, G_S>^2 / (||G_T||_F^2 ||G_S||_F^2))``: symmetric, not negative but for rounding, zero exactly where
    the Grams are equal, not blind to signs, and independent of alpha. It would be infinite where the Grams are
    orthogonal, as those of (1, 1) and (1, -1) are; where ``<G_T, G_S> < 2^-20 s``, which is nowhere below 40 bits, the
    logarithm goes on along its tangent, so that ``L_d < 43 + 2 log2 s`` and every gradient is finite.

    Under ``"debiased"`` it is ``S(R_T, R_S) - S(R_T, R_T) / 2 - S(R_S, R_S) / 2``: zero, without gradient, exactly
    where the cosines agree but for their signs; at alpha = 2 in [0, log2(s) / 2].

    Under ``"jensen_renyi"`` it is the weighted mean over samples of ``1 - log2(1 + <r_T, r_S>^2)``, r the unit maps of
    a sample: the entropy of order 2 of the pair's 2 x 2 Gram. The teacher's maps are constants in it. A map that is
    all zero is orthogonal to every other.

    Args:
        image_gram: ``[s, s]`` in fp64: inner products of the teacher's image features.
        token_gram: ``[s, s]`` in fp64: of the teacher's mask tokens.
        teacher_scores: ``[s, ...]``: the teacher's relation maps, in any scale.
        student_scores: the student's, of the same shape.
        objective: weights, order and form; whether L_d takes the teacher's Gram as a constant.
        weight: ``[s]``: of the samples in ``"jensen_renyi"``; None for ones, and in the other forms.

    Returns:
        :class:`RelationTerms`, the loss and terms in the dtype of the scores. First derivatives for the scores.

    Cost: O(s^2) products of score maps in fp64; then O(s^2) at alpha = 2, O(s^3) elsewhere.

    Source: Zhang et al., InfoSAM, ICML 2025: the compression loss L_r and, by default, the distillation loss L_d. The
    debiasing is that of Feydy et al., AISTATS 2019; the divergence of a pair Hoyos-Osorio & Sanchez-Giraldo's (arXiv
    2112.01583).

    """
    # Small beside the features: in fp64 the relations of nearly equal samples still differ by more than rounding.
    teacher_maps, student_maps = teacher_scores.flatten(1).double(), student_scores.flatten(1).double()
    # What L_d does not read of a Gram has no gradient.
    relations = torch.stack([teacher_maps, student_maps.detach() if objective.compares_pairs else student_maps])
    grams = torch.cat([torch.stack([image_gram, token_gram]), relations @ relations.mT])
    image, token, teacher, student = unit_diagonal(grams).unbind()
    target = teacher.detach() if objective.detach_teacher_relation else teacher
    # All entropies in one batch: the matrices are so small that each call costs as much as all of them.
    entropy_grams = [teacher, image * token * teacher]
    if objective.distillation == "mutual_information":
        entropy_grams += [target, student, target * student]
    elif objective.distillation == "debiased":
        entropy_grams += [target * target, student * student, target * student]
    marginal, joint, *bits = renyi_entropy(torch.stack(entropy_grams), objective.alpha)
    l_r = marginal - joint
    if objective.distillation == "cauchy_schwarz":
        l_d = _cauchy_schwarz_divergence(target, student)
    elif objective.distillation == "jensen_renyi":
        l_d = _mean_jensen_renyi_divergence(teacher_maps.detach(), student_maps, weight)
    elif objective.distillation == "debiased":
        teacher_bits, student_bits, both = bits
        l_d = both - teacher_bits / 2 - student_bits / 2
    else:
        teacher_bits, student_bits, both = bits
        l_d = both - teacher_bits - student_bits
    loss = objective.lambda_r * l_r + objective.lambda_d * l_d
    dtype = teacher_scores.dtype
    return RelationTerms(loss.to(dtype), l_r.to(dtype), l_d.to(dtype), teacher.detach(), student.detach())


def _cauchy_schwarz_divergence(a: Tensor, b: Tensor) -> Tensor:
    product, least = (a * b).sum(), LEAST_PRODUCT * len(a)
    # One logarithm each: equal Grams give three equal sums, of which nothing is left.
    bits = a.square().sum().log2() + b.square().sum().log2() - 2 * product.clamp_min(least).log2()
    return bits + 2 / (least * math.log(2)) * (least - product).relu()


def _mean_jensen_renyi_divergence(a: Tensor, b: Tensor, weight: Tensor | None) -> Tensor:
    pairs = torch.stack([a, b], 1)
    bits = renyi_entropy(unit_diagonal(pairs @ pairs.mT), 2.0)
    return bits.mean() if weight is None else (weight * bits).mean()
