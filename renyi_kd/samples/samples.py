"""The samples that a loss is computed over, when it has their scores and not yet their Grams."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

from torch import Tensor


class Samples(NamedTuple):
    """What the Grams of a loss are made of.

    Attributes:
        image_features: ``[b, d, h, w]``: the teacher's, without gradient; some of their channels where ``image_gram``
            is given.
        images: the image of each of the s samples; None when sample i belongs to image i.
        mask_tokens: ``[s, n, d]``: the teacher's, without gradient.
        teacher_scores: ``[s, n, h * w]``: its relation maps, in any scale.
        student_scores: likewise of the student.
        weight: ``[s]``: of each in a mean over samples, in the dtype of the scores; None for ones.
        in_pairs: whether L_d compares the two maps of each sample, and no sample with another.
        image_gram: ``[b, b]`` in fp64: inner products of the teacher's image features over all channels, without
            gradient; None where ``image_features`` has them all.

    """

    image_features: Tensor
    images: Sequence[int] | None
    mask_tokens: Tensor
    teacher_scores: Tensor
    student_scores: Tensor
    weight: Tensor | None = None
    in_pairs: bool = False
    image_gram: Tensor | None = None


# From the samples of a batch to all that its loss goes over.
Join = Callable[[Samples], Samples]


def images_of_parts(images: Sequence[Sequence[int] | None], n_images: Sequence[int]) -> list[int] | None:
    """Return the image of each sample of all parts, of which each counts its images from 0."""
    if all(part is None for part in images):
        return None
    firsts = accumulate(n_images[:-1], initial=0)
    return [
        first + image
        for first, n, part in zip(firsts, n_images, images, strict=True)
        for image in (range(n) if part is None else part)
    ]
