r"""The whole loss in one: five launches forward, three backward, and five passes over the maps, not four.

    forward     directions; teacher's scores and image Gram; student's scores; partial Grams; terms
    backward    mix of scores, student's map, sums of both; tokens; weights

The formulas are those of the operations, whose kernels these are. The teacher's map is read once forward, which is the
Gram and the scores in one, and once backward, for the gradient of its directions. That second read could be avoided:
the gradient is linear in that of the scores, which mixes the score maps of all samples, so the sums of pixels times
score map, of every pair of samples, would do. They are b^2 d numbers a program, which outgrow its tile from a few
samples on; and a batch of so few takes the time of its launches, not that of its reads.

In the form that compares pairs of maps the relation module is a constant in L_d. L_r has no gradient for the student's
maps, and L_d none for the teacher's, so the sums of the weights' gradients stop at the teacher's rows.

With more than one token a sample, or more than 64 samples, scores and Gram are two reads, a map that is not dense is
copied for the Gram, and the backward takes launches of its own for the mix and for each map. Extra memory: the scores
of both maps, 2 n / d of a map in fp32 for n tokens a sample, and there their gradients; mean and rstd of their pixels,
4 / d; partial Grams; some 2,000 n rows of d + 1 sums. fp16, bf16, fp32; any strides. First derivatives, not of the
teacher's features.

Launches are repeated from plans (``ops/launches.py``). Run eagerly, the loss is an autograd function; where something
traces it, such as torch.compile, it is an operator, which costs more on the host than all of its launches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from renyi_kd.objective import Distillation, Objective
from renyi_kd.ops.autograd import is_traced, refuse_second_derivative, second_derivative_refusal
from renyi_kd.ops.batch_gram import triton as batch_gram
from renyi_kd.ops.feature_terms import backward_kernel, teacher_kernel
from renyi_kd.ops.feature_terms.types import Pair
from renyi_kd.ops.gram_terms import launch as gram_terms
from renyi_kd.ops.gram_terms.types import RelationTerms
from renyi_kd.ops.launches import empty_packed, run, unpacked
from renyi_kd.ops.prompts import image_index_on
from renyi_kd.ops.relation_directions import Relation, RelationWeights
from renyi_kd.ops.relation_directions import triton as relation_directions
from renyi_kd.ops.relation_scores import triton as relation_scores

_WAY_OUT = "use a textbook implementation instead"
_N_WEIGHTS = len(RelationWeights._fields)


def _forward_launches(
    tensors: Sequence[Any], numbers: Sequence[Any], distillation: Distillation, detach_teacher_relation: bool
) -> list[Any]:
    """Return loss, L_r, L_d, both unit Grams, and for the backward scores, their mix, and directions with parts."""
    teacher_map, teacher_tokens, student_map, student_tokens, sample_weight, image_index, *weights = tensors
    token_eps, feature_eps, lambda_r, lambda_d = numbers
    n_samples, n_tokens, n_channels = teacher_tokens.shape
    directions, offsets, *kept = relation_directions.launch_forward(teacher_tokens, student_tokens, weights, token_eps)
    teacher, student = zip(
        directions.view(2, n_samples, n_tokens, n_channels), offsets.view(2, n_samples, n_tokens), strict=True
    )
    # Of teacher and student.
    statistics = relation_scores.empty_statistics(student_map, 2 * n_samples).unflatten(0, (2, n_samples))
    if n_tokens == 1 and n_samples <= teacher_kernel.MAX_IMAGES:
        teacher_scores, image_parts = teacher_kernel.launch(
            teacher_map, *teacher, feature_eps, statistics[0], image_index
        )
    else:
        teacher_scores = relation_scores.launch_forward(
            teacher_map, *teacher, feature_eps, statistics[0], image_index
        ).flatten(1)
        image_parts = batch_gram.launch_forward(batch_gram.flat(teacher_map))
        if image_index is not None:
            image_parts = image_parts.index_select(1, image_index).index_select(2, image_index)
    student_scores = relation_scores.launch_forward(
        student_map, *student, feature_eps, statistics[1], image_index
    ).flatten(1)
    objective = Objective(lambda_r, lambda_d, 2.0, distillation, detach_teacher_relation)
    *terms, mix = gram_terms.launch_forward(
        image_parts, None, teacher_tokens.flatten(1), teacher_scores, student_scores, objective, sample_weight
    )
    return [*terms, [teacher_scores, student_scores, mix, statistics, directions, offsets, *kept]]


def _empty_outputs(teacher_map: Tensor, teacher_tokens: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Return room for the terms with both Grams, and for what the backward needs."""
    n_samples, n_tokens, n_channels = teacher_tokens.shape
    _, _, height, width = teacher_map.shape
    scores = teacher_map.new_empty(n_samples, n_tokens * height * width, dtype=torch.float32)
    *terms, mix = gram_terms.empty_outputs(scores)
    lines = relation_directions.empty_outputs(scores.new_empty(n_channels), 2 * n_samples * n_tokens)
    statistics = scores.new_empty(2, n_samples, 2, height * width)
    return terms, [scores, torch.empty_like(scores), mix, statistics, *lines]


def _backward_launches(
    tensors: Sequence[Any], numbers: Sequence[Any], compares_pairs: bool, needs_map: bool, needs_module: bool
) -> list[Any]:
    """Return the gradients of the student's map, if needed, and of all tokens and the weights, if these are."""
    teacher_map, student_map, student_tokens, image_index, *_ = tensors
    upstream, (*weights, packed) = (tensors[4], tensors[5], tensors[6]), tensors[7:]
    lambda_r, lambda_d = numbers
    teacher_scores, student_scores, mix, statistics, directions, offsets, *kept = unpacked(
        packed, _empty_outputs(teacher_map, student_tokens)[1]
    )
    n_rows, n_tokens = student_tokens.shape[:2].numel(), student_tokens.shape[1]
    n_weight_rows = n_rows if compares_pairs else None
    if needs_module and n_tokens == 1 and n_rows <= backward_kernel.MAX_SAMPLES:
        grad_map = torch.empty_like(student_map) if needs_map else None
        parts = backward_kernel.launch_backward_of_both(
            (teacher_map, student_map), grad_map, directions, offsets, (teacher_scores, student_scores), statistics,
            mix, upstream, lambda_r, lambda_d, compares_pairs, image_index,
        )  # fmt: skip
        grad_tokens = student_tokens.new_empty(2 * n_rows, student_tokens.shape[2])
        grad_weights = relation_directions.launch_backward(
            weights, kept, *parts, grad_tokens, n_weight_rows=n_weight_rows
        )
        return [grad_map, grad_tokens, *grad_weights]
    grad_teacher, grad_student = (
        grad.unflatten(1, (n_tokens, -1))
        for grad in gram_terms.launch_backward(
            teacher_scores, student_scores, mix, *upstream, lambda_r, lambda_d, compares_pairs
        )
    )
    directions, offsets = directions.view(2, *student_tokens.shape), offsets.view(2, *student_tokens.shape[:2])
    teacher, student = (
        (directions[k], offsets[k], scores, statistics[k], grad)
        for k, (scores, grad) in enumerate(((teacher_scores, grad_teacher), (student_scores, grad_student)))
    )
    grad_map = torch.empty_like(student_map) if needs_map else None
    sums = relation_scores.empty_sums(student_map, 2 * n_rows) if needs_module else None
    if sums is not None:
        relation_scores.launch_backward(teacher_map, *teacher, None, sums[:n_rows], image_index)
    student_sums = None if sums is None else sums[n_rows:]
    relation_scores.launch_backward(student_map, *student, grad_map, student_sums, image_index)
    if sums is None:
        return [grad_map]
    grad_tokens = student_tokens.new_empty(2 * n_rows, student_tokens.shape[2])
    grad_weights = relation_directions.launch_backward(
        weights,
        kept,
        sums[..., :-1],
        sums[..., -1],
        grad_tokens,
        n_weight_rows=n_weight_rows,
    )
    return [grad_map, grad_tokens, *grad_weights]


class _FeatureTerms(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, numbers: tuple[float, ...], distillation: Distillation, detach: bool, *tensors: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        outputs = run(_forward_launches, tensors, numbers, distillation, detach)
        teacher_map, _, student_map, student_tokens, _, image_index, *weights = tensors
        ctx.save_for_backward(teacher_map, student_map, student_tokens, image_index, *weights, outputs[5])
        ctx.numbers, ctx.compares_pairs = numbers[2:], Objective(distillation=distillation).compares_pairs
        ctx.mark_non_differentiable(*outputs[3:5])
        # A term that nobody differentiates costs no launch for its zero.
        ctx.set_materialize_grads(False)
        return tuple(outputs[:5])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("feature_terms", _WAY_OUT)
        teacher_map, student_map, student_tokens, image_index, *saved = ctx.saved_tensors
        *_, needs_map, needs_tokens, _, _ = ctx.needs_input_grad[:-_N_WEIGHTS]
        needs_module = needs_tokens or any(ctx.needs_input_grad[-_N_WEIGHTS:])
        tensors = teacher_map, student_map, student_tokens, image_index, *grads[:3], *saved
        grad_map, *rest = run(_backward_launches, tensors, ctx.numbers, ctx.compares_pairs, needs_map, needs_module)
        grad_tokens, *grad_weights = rest or [None] * (1 + _N_WEIGHTS)
        return *[None] * 5, grad_map, _of_student(grad_tokens, student_tokens), None, None, *grad_weights


def _of_student(grad_tokens: Tensor | None, student_tokens: Tensor) -> Tensor | None:
    """Return the gradient of the student's tokens out of that of all, the teacher's first."""
    return None if grad_tokens is None else grad_tokens.view(2, *student_tokens.shape)[1]


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
    image_index: Tensor | None,
) -> list[Tensor]:
    tensors = teacher_map, teacher_tokens, student_map, student_tokens, sample_weight, image_index, *weights
    numbers = token_eps, feature_eps, lambda_r, lambda_d
    return run(_forward_launches, tensors, numbers, distillation, detach_teacher_relation)  # type: ignore[return-value]


@_forward.register_fake
def _(teacher_map: Tensor, teacher_tokens: Tensor, *_rest: object) -> list[Tensor]:
    terms, kept = _empty_outputs(teacher_map, teacher_tokens)
    return [*terms, empty_packed(kept)]


@torch.library.custom_op("renyi_kd::feature_terms_backward", mutates_args=())
def _backward(
    teacher_map: Tensor,
    student_map: Tensor,
    student_tokens: Tensor,
    weights: Sequence[Tensor],
    packed: Tensor,
    image_index: Tensor | None,
    grad_loss: Tensor | None,
    grad_compression: Tensor | None,
    grad_distillation: Tensor | None,
    lambda_r: float,
    lambda_d: float,
    compares_pairs: bool,
    needs_map: bool,
    needs_module: bool,
) -> list[Tensor]:
    """Return the gradients of the student's map (empty if not needed), of all tokens and of the weights (or none)."""
    upstream = grad_loss, grad_compression, grad_distillation
    tensors = teacher_map, student_map, student_tokens, image_index, *upstream, *weights, packed
    gradients = run(_backward_launches, tensors, (lambda_r, lambda_d), compares_pairs, needs_map, needs_module)
    return [student_map.new_empty(0, 0, 0, 0) if gradient is None else gradient for gradient in gradients]


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
    teacher_map, _, student_map, student_tokens, weights, _, _, *settings, image_index = inputs
    ctx.lambda_r, ctx.lambda_d, distillation, *_ = settings
    ctx.compares_pairs = Objective(distillation=distillation).compares_pairs
    ctx.save_for_backward(teacher_map, student_map, student_tokens, image_index, *weights, *output[5:])
    ctx.mark_non_differentiable(*output[3:])
    # A term that nobody differentiates costs no launch for its zero.
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    teacher_map, student_map, student_tokens, image_index, *weights, packed = ctx.saved_tensors
    _, _, needs_map, needs_tokens, needs_weights, *_ = ctx.needs_input_grad
    grad_map, *rest = torch.ops.renyi_kd.feature_terms_backward(
        teacher_map,
        student_map,
        student_tokens,
        weights,
        packed,
        image_index,
        *grads[:3],
        ctx.lambda_r,
        ctx.lambda_d,
        ctx.compares_pairs,
        needs_map,
        needs_tokens or any(needs_weights),
    )
    grad_tokens, *grad_weights = rest or [None] * (1 + _N_WEIGHTS)
    of_student = grad_map if needs_map else None, _of_student(grad_tokens, student_tokens)
    return None, None, *of_student, grad_weights, *[None] * 8


_forward.register_autograd(_differentiate, setup_context=_setup_context)
_backward.register_autograd(second_derivative_refusal("feature_terms", _WAY_OUT))


def feature_terms(pair: Pair, relation: Relation, objective: Objective) -> RelationTerms:
    """Return what the operations one by one do at alpha = 2."""
    pair = pair.constant_teacher()
    index = None if pair.images is None else image_index_on(pair.teacher_map.device, tuple(pair.images))
    features, weights = pair[:4], [weight.contiguous() for weight in relation.weights]
    numbers = relation.token_eps, relation.feature_eps, objective.lambda_r, objective.lambda_d
    form = objective.distillation, objective.detach_teacher_relation
    if is_traced(*features, *weights):
        terms = torch.ops.renyi_kd.feature_terms(*features, weights, *numbers, *form, pair.sample_weight, index)
    else:
        # An integer would be compiled in.
        floats = tuple(map(float, numbers))
        terms = _FeatureTerms.apply(floats, *form, *features, pair.sample_weight, index, *weights)
    return RelationTerms(*terms[:5])
