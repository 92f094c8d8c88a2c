r"""The whole loss as one operator: six launches forward, six backward, and five passes over the maps in place of four.

    forward     tokens of both; directions; teacher's scores and image Gram; student's scores; partial Grams; terms
    backward    gradient of the scores; teacher's sums; student's map and sums; all sums; tokens; weights

The formulas are those of the operations, whose kernels these are. The teacher's map is read once forward, which is the
Gram and the scores in one, and once backward, for the gradient of its directions. That second read could be avoided:
the gradient is linear in that of the scores, which mixes the score maps of all samples, so the sums of pixels times
score map, of every pair of samples, would do. They are b^2 d numbers a program, which outgrow its tile from a few
samples on; and a batch of so few takes the time of its launches, not that of its reads.

In the form that compares pairs of maps the relation module is a constant in L_d. L_r has no gradient for the student's
maps, and L_d none for the teacher's, so the sums of the weights' gradients stop at the teacher's rows.

Partial Grams of more than a few samples are summed by a launch of their own. With more than one token a sample, or more
than 64, scores and Gram are two reads, and a map that is not dense is copied for the Gram. Extra memory: the scores of
both maps and their gradients, 4 n / d of a map in fp32 for n tokens a sample; partial Grams; some 2,000 n rows of d + 1
sums. fp16, bf16, fp32; any strides. First derivatives, not of the teacher's features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from renyi_kd.objective import Objective
from renyi_kd.ops.autograd import second_derivative_refusal
from renyi_kd.ops.batch_gram import triton as batch_gram
from renyi_kd.ops.feature_terms import teacher_kernel
from renyi_kd.ops.feature_terms.types import Pair
from renyi_kd.ops.gram_terms import launch as gram_terms
from renyi_kd.ops.gram_terms.types import RelationTerms
from renyi_kd.ops.relation_directions import Relation, RelationWeights
from renyi_kd.ops.relation_directions import triton as relation_directions
from renyi_kd.ops.relation_scores import triton as relation_scores


@torch.library.custom_op("renyi_kd::feature_terms", mutates_args=())
def _forward(
    teacher_map: Tensor,
    teacher_tokens: Tensor,
    student_map: Tensor,
    student_tokens: Tensor,
    weights: Sequence[Tensor],
    token_eps: float,
    feature_eps: float,
    lambda_r: float,
    lambda_d: float,
    distillation: str,
    detach_teacher_relation: bool,
    sample_weight: Tensor | None,
) -> list[Tensor]:
    """Return loss, L_r, L_d, both unit Grams, and for the backward scores, their mix, and directions with parts."""
    n_samples, n_tokens, n_channels = teacher_tokens.shape
    # Autocast is still on in here, and would refuse another half precision than its own.
    with torch.autocast(teacher_tokens.device.type, enabled=False):
        tokens = torch.cat([teacher_tokens, student_tokens])
    directions, offsets, *kept = relation_directions.launch_forward(tokens.flatten(0, 1), weights, token_eps)
    teacher, student = zip(
        directions.view(2, n_samples, n_tokens, n_channels), offsets.view(2, n_samples, n_tokens), strict=True
    )
    if n_tokens == 1 and n_samples <= teacher_kernel.MAX_IMAGES:
        teacher_scores, image_parts = teacher_kernel.launch(teacher_map, *teacher, feature_eps)
    else:
        teacher_scores = relation_scores.launch_forward(teacher_map, *teacher, feature_eps).flatten(1)
        image_parts = batch_gram.launch_forward(batch_gram.flat(teacher_map))
    student_scores = relation_scores.launch_forward(student_map, *student, feature_eps).flatten(1)
    # A schema's string is one of the forms by the time it gets here.
    objective = Objective(lambda_r, lambda_d, 2.0, distillation, detach_teacher_relation)  # type: ignore[arg-type]
    *terms, mix = gram_terms.launch_forward(
        image_parts, None, tokens[:n_samples].flatten(1), teacher_scores, student_scores, objective, sample_weight
    )
    return [*terms, teacher_scores, student_scores, mix, directions, *kept]


@_forward.register_fake
def _(teacher_map: Tensor, teacher_tokens: Tensor, *_rest: object) -> list[Tensor]:
    n_samples, n_tokens, n_channels = teacher_tokens.shape
    _, _, height, width = teacher_map.shape
    scores = teacher_map.new_empty(n_samples, n_tokens * height * width, dtype=torch.float32)
    *terms, mix = gram_terms.empty_outputs(scores)
    directions, _, *kept = relation_directions.empty_outputs(scores.new_empty(2 * n_samples * n_tokens, n_channels))
    return [*terms, scores, torch.empty_like(scores), mix, directions, *kept]


@torch.library.custom_op("renyi_kd::feature_terms_backward", mutates_args=())
def _backward(
    teacher_map: Tensor,
    student_map: Tensor,
    student_tokens: Tensor,
    weights: Sequence[Tensor],
    saved: Sequence[Tensor],
    grad_loss: Tensor | None,
    grad_compression: Tensor | None,
    grad_distillation: Tensor | None,
    feature_eps: float,
    lambda_r: float,
    lambda_d: float,
    compares_pairs: bool,
    needs_map: bool,
    needs_module: bool,
) -> list[Tensor]:
    """Return the gradients of the student's map (empty if not needed), of its tokens and of the weights (or none)."""
    teacher_scores, student_scores, mix, directions, *kept = saved
    n_rows, n_tokens = student_tokens.shape[:2].numel(), student_tokens.shape[1]
    upstream = grad_loss, grad_compression, grad_distillation
    grad_teacher, grad_student = (
        grad.unflatten(1, (n_tokens, -1))
        for grad in gram_terms.launch_backward(
            teacher_scores, student_scores, mix, *upstream, lambda_r, lambda_d, compares_pairs
        )
    )
    teacher_directions, student_directions = directions.view(2, *student_tokens.shape)
    grad_map = torch.empty_like(student_map) if needs_map else None
    sums = relation_scores.empty_sums(student_map, 2 * n_rows) if needs_module else None
    if sums is not None:
        relation_scores.launch_backward(teacher_map, teacher_directions, grad_teacher, feature_eps, None, sums[:n_rows])
    student_sums = None if sums is None else sums[n_rows:]
    relation_scores.launch_backward(student_map, student_directions, grad_student, feature_eps, grad_map, student_sums)
    gradients = [student_map.new_empty(0, 0, 0, 0) if grad_map is None else grad_map]
    if sums is None:
        return gradients
    total = sums.sum(1)
    grad_tokens = student_tokens.new_empty(2 * n_rows, student_tokens.shape[2])
    grad_weights = relation_directions.launch_backward(
        weights,
        kept,
        total[:, :-1],
        total[:, -1],
        grad_tokens,
        n_weight_rows=n_rows if compares_pairs else None,
    )
    return [*gradients, grad_tokens, *grad_weights]


@_backward.register_fake
def _(_: Tensor, student_map: Tensor, student_tokens: Tensor, weights: Sequence[Tensor], *rest: object) -> list[Tensor]:
    *_rest, needs_map, needs_module = rest
    gradients = [torch.empty_like(student_map) if needs_map else student_map.new_empty(0, 0, 0, 0)]
    if not needs_module:
        return gradients
    n_samples, n_tokens, n_channels = student_tokens.shape
    grad_tokens = student_tokens.new_empty(2 * n_samples * n_tokens, n_channels)
    return [*gradients, grad_tokens, *(weight.new_empty(weight.shape) for weight in weights)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    teacher_map, _, student_map, student_tokens, weights, _, ctx.feature_eps, *settings = inputs
    ctx.lambda_r, ctx.lambda_d, distillation, *_ = settings
    ctx.compares_pairs = Objective(distillation=distillation).compares_pairs
    ctx.save_for_backward(teacher_map, student_map, student_tokens, *weights, *output[5:])
    ctx.mark_non_differentiable(*output[3:])
    # A term that nobody differentiates costs no launch for its zero.
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    teacher_map, student_map, student_tokens, *values = ctx.saved_tensors
    n_weights = len(RelationWeights._fields)
    _, _, needs_map, needs_tokens, needs_weights, *_ = ctx.needs_input_grad
    grad_map, *rest = torch.ops.renyi_kd.feature_terms_backward(
        teacher_map,
        student_map,
        student_tokens,
        values[:n_weights],
        values[n_weights:],
        *grads[:3],
        ctx.feature_eps,
        ctx.lambda_r,
        ctx.lambda_d,
        ctx.compares_pairs,
        needs_map,
        needs_tokens or any(needs_weights),
    )
    grad_tokens, *grad_weights = rest or [None] * (1 + n_weights)
    if grad_tokens is not None:
        grad_tokens = grad_tokens.view(2, *student_tokens.shape)[1]
    return None, None, grad_map if needs_map else None, grad_tokens, grad_weights, *[None] * 7


_forward.register_autograd(_differentiate, setup_context=_setup_context)
_backward.register_autograd(second_derivative_refusal("feature_terms", "use a textbook implementation instead"))


def feature_terms(pair: Pair, relation: Relation, objective: Objective) -> RelationTerms:
    """Return what the operations one by one do, one sample an image, at alpha = 2."""
    pair = pair.constant_teacher()
    terms = torch.ops.renyi_kd.feature_terms(
        *pair[:4],
        [weight.contiguous() for weight in relation.weights],
        relation.token_eps,
        relation.feature_eps,
        objective.lambda_r,
        objective.lambda_d,
        objective.distillation,
        objective.detach_teacher_relation,
        pair.sample_weight,
    )
    return RelationTerms(*terms[:5])
