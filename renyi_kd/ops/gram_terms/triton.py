"""Both terms of the loss as operators that autograd, torch.compile and autocast know, around the kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from renyi_kd.objective import Objective
from renyi_kd.ops.autograd import second_derivative_refusal
from renyi_kd.ops.gram_terms import launch
from renyi_kd.ops.gram_terms.types import RelationTerms


@torch.library.custom_op("renyi_kd::gram_terms", mutates_args=())
def _forward(
    image_gram: Tensor,
    token_gram: Tensor,
    teacher_scores: Tensor,
    student_scores: Tensor,
    lambda_r: float,
    lambda_d: float,
    distillation: str,
    detach_teacher_relation: bool,
    weight: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    image_parts = image_gram.contiguous().unsqueeze(0)
    # A schema's string is one of the forms by the time it gets here.
    objective = Objective(lambda_r, lambda_d, 2.0, distillation, detach_teacher_relation)  # type: ignore[arg-type]
    return launch.launch_forward(
        image_parts,
        token_gram.contiguous(),
        None,
        teacher_scores.contiguous(),
        student_scores.contiguous(),
        objective,
        weight,
    )


@_forward.register_fake
def _(
    _: Tensor, _token_gram: Tensor, teacher_scores: Tensor, *_rest: object
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return launch.empty_outputs(teacher_scores)


_backward = torch.library.custom_op("renyi_kd::gram_terms_backward", launch.launch_backward, mutates_args=())


@_backward.register_fake
def _(teacher_scores: Tensor, student_scores: Tensor, *_mix_and_gradients: object) -> tuple[Tensor, Tensor]:
    return teacher_scores.new_empty(teacher_scores.shape), student_scores.new_empty(student_scores.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, teacher_scores, student_scores, ctx.lambda_r, ctx.lambda_d, distillation, *_ = inputs
    ctx.compares_pairs = Objective(distillation=distillation).compares_pairs
    ctx.save_for_backward(teacher_scores, student_scores, output[-1])
    ctx.mark_non_differentiable(*output[3:])
    # A term that nobody differentiates costs no launch for its zero.
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any,
    grad_loss: Tensor | None,
    grad_compression: Tensor | None,
    grad_distillation: Tensor | None,
    *_: None,
) -> tuple[None, None, Tensor | None, Tensor | None, None, None, None, None, None]:
    grad_teacher, grad_student = torch.ops.renyi_kd.gram_terms_backward(
        *ctx.saved_tensors,
        grad_loss,
        grad_compression,
        grad_distillation,
        ctx.lambda_r,
        ctx.lambda_d,
        ctx.compares_pairs,
    )
    return None, None, grad_teacher, grad_student, None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)
_backward.register_autograd(
    second_derivative_refusal("gram_terms", "differentiate entropies of gram_matrix(scores) instead")
)


def gram_terms(
    image_gram: Tensor,
    token_gram: Tensor,
    teacher_scores: Tensor,
    student_scores: Tensor,
    objective: Objective,
    weight: Tensor | None = None,
) -> RelationTerms:
    """Return what the reference does at alpha = 2."""
    *terms, _ = torch.ops.renyi_kd.gram_terms(
        image_gram,
        token_gram,
        teacher_scores.flatten(1),
        student_scores.flatten(1),
        objective.lambda_r,
        objective.lambda_d,
        objective.distillation,
        objective.detach_teacher_relation,
        weight,
    )
    return RelationTerms(*terms)
