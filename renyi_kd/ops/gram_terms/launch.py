"""Launches of the kernels of both terms, with their block sizes: two forward and one backward."""

from __future__ import annotations

import torch
from torch import Tensor

from renyi_kd.objective import Objective
from renyi_kd.ops.gram_terms import kernels
from renyi_kd.ops.launches import launcher
from renyi_kd.ops.tiles import cdiv

# Samples of a block, and places of a stretch of relation maps in the forward and in the backward.
BLOCK_S, BLOCK_L, BACKWARD_BLOCK_L = 16, 32, 64
# Programs of each Gram, at least where there are as many stretches: few enough for one program to sum what they find.
# Not measured on a GPU yet.
PROGRAMS = 64
NUM_WARPS = 4


def gram_blocks(n_samples: int) -> dict[str, int]:
    """Return the sizes of a block of rows of the Grams, and of one of their parts and entries."""
    # One of two sizes that has room for all samples: every size is compiled anew.
    block_s, num_warps = (64, 2 * NUM_WARPS) if n_samples <= 64 else (256, 4 * NUM_WARPS)
    return {"BLOCK_R": 4, "BLOCK_S": block_s, "BLOCK_K": 8, "BLOCK_E": 512, "num_warps": num_warps}


def launch_forward(
    image_parts: Tensor,
    token_gram: Tensor | None,
    teacher_tokens: Tensor | None,
    teacher_scores: Tensor,
    student_scores: Tensor,
    objective: Objective,
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return loss, L_r, L_d, both unit Grams, and what the backward mixes the maps by, by two launches.

    Grams are fp32 or fp64, that of the images in parts ``[parts, s, s]``; in place of the tokens' there may be the
    tokens ``[s, k]``. The samples have weights where the form has them.
    """
    n_samples, n_scores = teacher_scores.shape
    n_image_parts, pairs, n_token_columns, token_stride = len(image_parts), objective.compares_pairs, 0, 0
    if teacher_tokens is not None:
        teacher_tokens = teacher_tokens if teacher_tokens.stride(1) == 1 else teacher_tokens.contiguous()
        n_token_columns, token_stride = teacher_tokens.shape[1], teacher_tokens.stride(0)
    # Grams that are made, and at last the sum of the images'.
    n_matrices = 4 if n_image_parts > 1 else 2 if teacher_tokens is None else 3
    n_blocks = cdiv(n_samples, BLOCK_S)
    n_stretches = cdiv(max(n_scores, n_token_columns), BLOCK_L)
    n_steps = cdiv(n_stretches, max(1, 2 * PROGRAMS // (n_blocks * (n_blocks + 1))))
    n_rows = n_samples + 1 if pairs else n_samples
    parts = teacher_scores.new_empty(3, cdiv(n_stretches, n_steps), n_rows, n_samples, dtype=torch.float64)
    # The Gram of the images; those of tokens and of both relations, products of pairs, the product of the first two at
    # unit diagonal, and the scales of all four.
    image_gram = parts.new_empty(n_samples, n_samples) if n_image_parts > 1 else image_parts
    grams = parts.new_empty(4 * n_samples + 1 + 4, n_samples)
    blocks = gram_blocks(n_samples)
    n_token_parts = 1 if teacher_tokens is None else cdiv(n_token_columns, n_steps * BLOCK_L)
    outputs = empty_outputs(teacher_scores)
    with torch.cuda.device_of(teacher_scores):
        launcher(kernels._relation_grams_kernel, (parts.shape[1], n_blocks**2, n_matrices))(
            teacher_scores, student_scores, teacher_tokens, image_parts if n_image_parts > 1 else None, parts,
            image_gram, n_samples, n_scores, n_token_columns, token_stride, n_image_parts, n_steps,
            n_rows * n_samples, BLOCK_S=BLOCK_S, BLOCK_L=BLOCK_L, BLOCK_K=32, BLOCK_E=64, PAIRS=pairs,
            num_warps=2 * NUM_WARPS,
        )  # fmt: skip
        launcher(kernels._gram_terms_fwd_kernel, (1,))(
            image_gram, token_gram, parts, None if weight is None else weight.contiguous(), grams,
            *outputs, n_samples, n_token_parts, cdiv(n_scores, n_steps * BLOCK_L), n_rows * n_samples,
            parts.stride(0), objective.lambda_r, objective.lambda_d, **blocks,
            FORM=objective.distillation, DETACH=objective.detach_teacher_relation and not pairs,
        )  # fmt: skip
    return outputs


def empty_outputs(scores: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return room for what the forward returns."""
    loss, compression, distillation = (scores.new_empty(()) for _ in range(3))
    mix = scores.new_empty(3, len(scores), len(scores), dtype=torch.float64)
    return loss, compression, distillation, torch.empty_like(mix[0]), torch.empty_like(mix[0]), mix


def launch_backward(
    teacher_scores: Tensor,
    student_scores: Tensor,
    mix: Tensor,
    grad_loss: Tensor | None,
    grad_compression: Tensor | None,
    grad_distillation: Tensor | None,
    lambda_r: float,
    lambda_d: float,
    compares_pairs: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of both maps, by one launch."""
    teacher_scores, student_scores = teacher_scores.contiguous(), student_scores.contiguous()
    n_samples, n_scores = teacher_scores.shape
    grad_teacher, grad_student = torch.empty_like(teacher_scores), torch.empty_like(student_scores)
    grid = cdiv(n_scores, BACKWARD_BLOCK_L), cdiv(n_samples, BLOCK_S), 2
    with torch.cuda.device_of(teacher_scores):
        launcher(kernels._gram_terms_bwd_kernel, grid)(
            teacher_scores, student_scores, mix, grad_loss, grad_compression, grad_distillation,
            grad_teacher, grad_student, n_samples, n_scores, lambda_r, lambda_d,
            BLOCK_S=BLOCK_S, BLOCK_L=BACKWARD_BLOCK_L, PAIRS=compares_pairs, num_warps=NUM_WARPS,
        )  # fmt: skip
    return grad_teacher, grad_student
