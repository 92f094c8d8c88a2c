"""What every implementation of the terms returns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class RelationTerms(NamedTuple):
    """What a step's relations come to.

    Attributes:
        loss: ``lambda_r * compression + lambda_d * distillation``, ``[]`` in bits, as the terms.
        compression: L_r.
        distillation: L_d.
        teacher_gram: ``[s, s]`` in fp64 with unit diagonal: cosines of the teacher's relation maps; no gradient.
        student_gram: likewise of the student.

    """

    loss: Tensor
    compression: Tensor
    distillation: Tensor
    teacher_gram: Tensor
    student_gram: Tensor
