"""The two terms of InfoSAM as entropies: compression of the teacher's relation, distillation to the student's."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from renyi_kd.entropy import entropy_of_trace_one
from renyi_kd.fp64 import in_fp64, out_of_fp64
from renyi_kd.gram import unit_scale, with_unit_diagonal
from renyi_kd.objective import Objective
from renyi_kd.ops.autograd import refuse_second_derivative
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
    device, dtype = teacher_scores.device, teacher_scores.dtype
    # What L_d does not read of a Gram has no gradient.
    read = student_scores.detach() if objective.compares_pairs else student_scores
    inputs = in_fp64(image_gram) * in_fp64(token_gram)
    teacher, student, unit_inputs = _cosines(teacher_scores, read, inputs).unbind()
    target = teacher.detach() if objective.detach_teacher_relation else teacher
    # All entropies in one batch: the matrices are so small that each call costs as much as all of them.
    entropy_grams = [teacher, unit_inputs * teacher]
    if objective.distillation == "mutual_information":
        entropy_grams += [target, student, target * student]
    elif objective.distillation == "debiased":
        entropy_grams += [target * target, student * student, target * student]
    # Their diagonals are ones.
    normalised = torch.stack(entropy_grams) / len(teacher)
    marginal, joint, *bits = entropy_of_trace_one(normalised, objective.alpha).unbind()
    l_r = marginal - joint
    if objective.distillation == "cauchy_schwarz":
        l_d = _cauchy_schwarz_divergence(target, student)
    elif objective.distillation == "jensen_renyi":
        l_d = _mean_jensen_renyi_divergence(teacher_scores.detach(), student_scores, weight)
    elif objective.distillation == "debiased":
        teacher_bits, student_bits, both = bits
        l_d = both - teacher_bits / 2 - student_bits / 2
    else:
        teacher_bits, student_bits, both = bits
        l_d = both - teacher_bits - student_bits
    loss = objective.lambda_r * l_r + objective.lambda_d * l_d
    loss, l_r, l_d = (out_of_fp64(value, device, dtype) for value in (loss, l_r, l_d))
    return RelationTerms(loss, l_r, l_d, teacher.detach(), student.detach())


def _cauchy_schwarz_divergence(a: Tensor, b: Tensor) -> Tensor:
    product, least = (a * b).sum(), LEAST_PRODUCT * len(a)
    # One logarithm each: equal Grams give three equal sums, of which nothing is left.
    bits = a.square().sum().log2() + b.square().sum().log2() - 2 * product.clamp_min(least).log2()
    return bits + 2 / (least * math.log(2)) * (least - product).relu()


def _mean_jensen_renyi_divergence(teacher: Tensor, student: Tensor, weight: Tensor | None) -> Tensor:
    cosine = _cosines(teacher, student)[:, 0, 1]
    bits = 1 - (1 + cosine.square()).log2()
    return bits.mean() if weight is None else (in_fp64(weight) * bits).mean()


def _cosines(teacher: Tensor, student: Tensor, other: Tensor | None = None) -> Tensor:
    """Return the cosines of relation maps ``[s, ...]`` in fp64.

    Those of each sample's two maps, ``[s, 2, 2]``; or with ``other``, a Gram matrix that needs no gradient, those of
    all samples of each model and that matrix with a unit diagonal, ``[3, s, s]``. The maps are small beside the
    features: in fp64 the relations of nearly equal samples still differ by more than rounding.
    """
    cosines: Tensor = _Cosines.apply(teacher.flatten(1), student.flatten(1), other)  # type: ignore[no-untyped-call]
    return cosines


class _Cosines(torch.autograd.Function):
    """Cosines of rows, with one product of all rows for the gradient.

    With G the cosines, r_i = 1 / |x_i|, and W = dG + dG^T off the diagonal: ``dx = A x``, where ``A_ij = r_i W_ij r_j``
    off the diagonal and ``A_ii = -r_i^2 sum_j W_ij G_ij`` on it.
    """

    @staticmethod
    def forward(ctx: Any, teacher: Tensor, student: Tensor, other: Tensor | None) -> Tensor:
        dim = 1 if other is None else 0
        rows = in_fp64(torch.stack([teacher, student], dim))
        products = torch.bmm(rows, rows.mT)
        products = products if other is None else torch.cat([products, other[None]])
        scale = unit_scale(products)
        cosines = with_unit_diagonal(products, scale)
        ctx.save_for_backward(cosines, rows, scale)
        ctx.dim, ctx.device, ctx.dtype = dim, teacher.device, teacher.dtype
        return cosines

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("gram_terms", "differentiate entropies of gram_matrix(scores) instead")
        cosines, rows, scale = ctx.saved_tensors
        n = len(rows)
        weights = grad[:n] + grad[:n].mT
        weights.diagonal(dim1=-2, dim2=-1).zero_()
        own = (weights * cosines[:n]).sum(-1) * scale[:n].square()
        weights = weights * scale[:n, :, None] * scale[:n, None, :]
        weights.diagonal(dim1=-2, dim2=-1).copy_(-own)
        return *out_of_fp64(torch.bmm(weights, rows), ctx.device, ctx.dtype).unbind(ctx.dim), None
