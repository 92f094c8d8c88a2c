"""The InfoSAM loss as its four operations: directions of the tokens, scores of the pixels, Grams, terms."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from renyi_kd.objective import Objective
from renyi_kd.ops.batch_gram import batch_gram
from renyi_kd.ops.dispatch import Impl
from renyi_kd.ops.feature_terms.types import Pair
from renyi_kd.ops.gram_terms import gram_terms
from renyi_kd.ops.gram_terms.types import RelationTerms
from renyi_kd.ops.prompts import gram_of_samples
from renyi_kd.ops.relation_directions import Relation, RelationWeights, relation_directions
from renyi_kd.ops.relation_scores import relation_scores
from renyi_kd.samples.samples import Join, Samples


def feature_terms(
    pair: Pair, relation: Relation, objective: Objective, *, join: Join | None = None, impl: Impl = "auto"
) -> RelationTerms:
    """Return the InfoSAM loss and its terms from the features of teacher and student.

    Args:
        pair: the features, with gradients for the student's.
        relation: the relation module's values, with gradients for its weights.
        objective: weights, order and form of the loss.
        join: adds samples from elsewhere to those of the batch; None for the batch alone.
        impl: implementation of each operation.

    Returns:
        :class:`RelationTerms`; loss and terms in fp32, or fp64 if any feature is. First derivatives.

    Cost: that of the four operations: at most four reads of each map, and one write of the student's gradient.

    Source: Zhang et al., InfoSAM, ICML 2025.

    """
    pair = pair.constant_teacher()
    teacher_map, teacher_tokens, _, _, images, weight = pair
    dtype = torch.float32
    for value in pair[:4]:
        dtype = torch.promote_types(dtype, value.dtype)
    if len(teacher_tokens):
        teacher_scores, student_scores = _scores_of_both(pair, relation, objective, dtype, impl)
    else:
        teacher_scores, student_scores = _no_scores(pair, relation, dtype)
    if weight is not None:
        # Processes can only exchange what they have in one dtype.
        weight = weight.to(teacher_scores.dtype)
    samples = Samples(
        teacher_map, images, teacher_tokens, teacher_scores, student_scores, weight, objective.compares_pairs
    )
    if join is not None:
        # Autocast refuses to concatenate the half precision that is not its own.
        with torch.autocast(teacher_map.device.type, enabled=False):
            samples = join(samples)
    image_gram = samples.image_gram
    if image_gram is None:
        image_gram = batch_gram(samples.image_features, impl=impl)
    if samples.images is not None:
        image_gram = gram_of_samples(image_gram, samples.images)
    terms = gram_terms(
        image_gram,
        batch_gram(samples.mask_tokens, impl=impl),
        samples.teacher_scores,
        samples.student_scores,
        objective,
        weight=samples.weight,
        impl=impl,
    )
    return terms._replace(
        loss=terms.loss.to(dtype), compression=terms.compression.to(dtype), distillation=terms.distillation.to(dtype)
    )


def _scores_of_both(
    pair: Pair, relation: Relation, objective: Objective, dtype: torch.dtype, impl: Impl
) -> tuple[Tensor, Tensor]:
    """Return the relation maps of teacher and student before normalisation, ``[s, n, h * w]``."""
    both_tokens = pair.teacher_tokens.to(dtype), pair.student_tokens.to(dtype)
    directions = partial(relation_directions, eps=relation.token_eps, impl=impl)
    if objective.compares_pairs:
        # The module could make two maps alike by forgetting the features: L_d takes it as a constant.
        constant = RelationWeights(*(value.detach() for value in relation.weights))
        lines = directions(both_tokens[0], relation.weights), directions(both_tokens[1], constant)
    else:
        # Teacher and student have as many samples; chunks have one gradient, slices one each.
        w, c = (value.chunk(2) for value in directions(torch.cat(both_tokens), relation.weights))
        lines = (w[0], c[0]), (w[1], c[1])
    teacher_scores, student_scores = (
        relation_scores(image_features, w, pair.images, offsets=c, eps=relation.feature_eps, impl=impl)
        for image_features, (w, c) in zip((pair.teacher_map, pair.student_map), lines, strict=True)
    )
    return teacher_scores, student_scores


def _no_scores(pair: Pair, relation: Relation, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the scores of no samples, whose gradients are zeros: a wrapper waits for those of every parameter."""
    for weight in relation.weights:
        dtype = torch.promote_types(dtype, weight.dtype)
    shape = 0, pair.teacher_tokens.shape[1], pair.teacher_map.shape[2:].numel()
    of_module = torch.stack([weight.to(dtype).sum() for weight in relation.weights]).sum()
    of_student = of_module + pair.student_map.to(dtype).sum() + pair.student_tokens.to(dtype).sum()
    return of_module.expand(shape), of_student.expand(shape)
