"""The InfoSAM loss as its four operations: directions of the tokens, scores of the pixels, Grams, terms."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from renyi_kd.ops.batch_gram import batch_gram
from renyi_kd.ops.dispatch import Impl
from renyi_kd.ops.gram_terms import gram_terms
from renyi_kd.ops.gram_terms.types import Distillation, RelationTerms
from renyi_kd.ops.relation_directions import RelationWeights, relation_directions
from renyi_kd.ops.relation_scores import relation_scores
from renyi_kd.samples.samples import Join, Samples


def feature_terms(
    teacher_map: Tensor,
    student_map: Tensor,
    teacher_tokens: Tensor,
    student_tokens: Tensor,
    weights: RelationWeights,
    images: Sequence[int] | None = None,
    *,
    token_eps: float = 1e-5,
    feature_eps: float = 1e-5,
    lambda_r: float = 1.0,
    lambda_d: float = 0.5,
    alpha: float = 2.0,
    distillation: Distillation = "mutual_information",
    detach_teacher: bool = False,
    join: Join | None = None,
    impl: Impl = "auto",
) -> RelationTerms:
    """Return the InfoSAM loss and its terms from the features of teacher and student.

    Args:
        teacher_map: ``[b, d, h, w]``, floating point, any strides; gets no gradient.
        student_map: likewise, with one.
        teacher_tokens: ``[s, n, d]``; gets no gradient.
        student_tokens: likewise, with one.
        weights: those of the relation module, with gradients.
        images: the image of each sample; None when sample i belongs to image i.
        token_eps: added to the variance of tokens.
        feature_eps: added to the variance of pixels.
        lambda_r: weight of L_r.
        lambda_d: weight of L_d.
        alpha: order of the entropies.
        distillation: the form of L_d.
        detach_teacher: whether L_d takes the teacher's relation as a constant.
        join: adds samples from elsewhere to those of the batch; None for the batch alone.
        impl: implementation of each operation.

    Returns:
        :class:`RelationTerms`; loss and terms in fp32, or fp64 if any feature is. First derivatives.

    Cost: that of the four operations: four reads of each map in PyTorch, and one write of the student's gradient.

    Source: Zhang et al., InfoSAM, ICML 2025.

    """
    teacher_map, teacher_tokens = teacher_map.detach(), teacher_tokens.detach()
    dtype = torch.float32
    for value in (teacher_map, student_map, teacher_tokens, student_tokens):
        dtype = torch.promote_types(dtype, value.dtype)
    tokens = torch.cat([teacher_tokens.to(dtype), student_tokens.to(dtype)])
    # Teacher and student have as many samples; chunks have one gradient, slices one each.
    of_both = relation_directions(tokens, weights, eps=token_eps, impl=impl)
    directions, offsets = (value.chunk(2) for value in of_both)
    teacher_scores, student_scores = (
        relation_scores(image_features, w, images, offsets=c, eps=feature_eps, impl=impl)
        for image_features, w, c in zip((teacher_map, student_map), directions, offsets, strict=True)
    )
    samples = Samples(teacher_map, images, teacher_tokens, teacher_scores, student_scores)
    if join is not None:
        # Autocast refuses to concatenate the half precision that is not its own.
        with torch.autocast(teacher_map.device.type, enabled=False):
            samples = join(samples)
    image_gram = batch_gram(samples.image_features, impl=impl)
    if samples.images is not None:
        index = torch.tensor(samples.images, device=image_gram.device)
        image_gram = image_gram[index[:, None], index]
    terms = gram_terms(
        image_gram,
        batch_gram(samples.mask_tokens, impl=impl),
        samples.teacher_scores,
        samples.student_scores,
        lambda_r=lambda_r,
        lambda_d=lambda_d,
        alpha=alpha,
        distillation=distillation,
        detach_teacher=detach_teacher,
        impl=impl,
    )
    return terms._replace(
        loss=terms.loss.to(dtype), compression=terms.compression.to(dtype), distillation=terms.distillation.to(dtype)
    )
