"""The InfoSAM loss of a batch, from features to terms."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from renyi_kd.ops import gram_terms, relation_directions
from renyi_kd.ops.dispatch import Impl, implementation
from renyi_kd.ops.feature_terms import reference
from renyi_kd.ops.gram_terms.types import Distillation, RelationTerms
from renyi_kd.ops.relation_directions import RelationWeights
from renyi_kd.samples.samples import Join


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
    """Return what :func:`reference.feature_terms` defines.

    Where Triton runs all of it, one sample an image, at alpha = 2 and over the batch alone, it is one operator with few
    launches; elsewhere each of its operations runs by the implementation that ``impl`` names.
    """
    n_samples, n_channels = len(teacher_tokens), teacher_tokens.shape[-1]
    fits = (
        images is None
        and join is None
        and alpha == 2
        and n_samples <= gram_terms.MAX_SAMPLES
        and n_channels <= relation_directions.MAX_CHANNELS
    )
    tensors = teacher_map, student_map, teacher_tokens, student_tokens, *weights
    if fits and implementation(*tensors, impl=impl).name == "triton":
        from renyi_kd.ops.feature_terms import triton

        return triton.feature_terms(
            teacher_map,
            student_map,
            teacher_tokens,
            student_tokens,
            weights,
            token_eps=token_eps,
            feature_eps=feature_eps,
            lambda_r=lambda_r,
            lambda_d=lambda_d,
            distillation=distillation,
            detach_teacher=detach_teacher,
        )
    return reference.feature_terms(
        teacher_map,
        student_map,
        teacher_tokens,
        student_tokens,
        weights,
        images,
        token_eps=token_eps,
        feature_eps=feature_eps,
        lambda_r=lambda_r,
        lambda_d=lambda_d,
        alpha=alpha,
        distillation=distillation,
        detach_teacher=detach_teacher,
        join=join,
        impl=impl,
    )
