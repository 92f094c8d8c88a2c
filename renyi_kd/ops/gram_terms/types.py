"""What every implementation of the terms takes and returns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

# Of <G_T, G_S> / s, to which the diagonal alone adds 1: below, the Cauchy-Schwarz divergence goes on along its tangent.
# It has 40 bits or more there, and what fp64 rounds off a sum of s^2 cosines is still far less.
LEAST_PRODUCT = 2.0**-20


class RelationTerms(NamedTuple):
    """What a step's relations come to.

    Attributes:
        loss: ``lambda_r * compression + lambda_d * distillation``, ``[]`` in bits, as the terms.
        compression: L_r.
        distillation: L_d, of the form that was asked for.
        teacher_gram: ``[s, s]`` in fp64 with unit diagonal: cosines of the teacher's relation maps; no gradient. On the
            CPU where the device has no fp64.
        student_gram: likewise of the student.

    """

    loss: Tensor
    compression: Tensor
    distillation: Tensor
    teacher_gram: Tensor
    student_gram: Tensor
