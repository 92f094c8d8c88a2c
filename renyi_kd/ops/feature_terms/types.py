"""The features of teacher and student, as the loss takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Pair(NamedTuple):
    """What teacher and student made of the same samples.

    Attributes:
        teacher_map: ``[b, d, h, w]``, floating point, any strides; gets no gradient.
        teacher_tokens: ``[s, n, d]``; gets no gradient.
        student_map: as the teacher's, with a gradient.
        student_tokens: likewise.
        images: the image of each sample; None when sample i belongs to image i.
        sample_weight: ``[s]``: of each in a mean over samples, on the device of the features; None for ones.

    """

    teacher_map: Tensor
    teacher_tokens: Tensor
    student_map: Tensor
    student_tokens: Tensor
    images: Sequence[int] | None = None
    sample_weight: Tensor | None = None

    def constant_teacher(self) -> Pair:
        """Return the pair without the graphs of the teacher and of the weights, which may be a teacher's estimate."""
        teacher_map, teacher_tokens, student_map, student_tokens, images, weight = self
        return Pair(
            teacher_map.detach() if teacher_map.requires_grad else teacher_map,
            teacher_tokens.detach() if teacher_tokens.requires_grad else teacher_tokens,
            student_map,
            student_tokens,
            images,
            weight.detach() if weight is not None and weight.requires_grad else weight,
        )
