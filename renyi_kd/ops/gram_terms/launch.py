"""Launches of the kernels of both terms, with their block sizes: two forward, or some more, and one backward."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from renyi_kd.objective import Objective
from renyi_kd.ops.gram_terms import kernels

# Elements of a tile of fp64 numbers; not measured on a GPU yet.
_TILE_ELEMENTS = 2048
# 8 MiB of partial Grams.
PARTIAL_ELEMENTS = 2**20
# Of one set of partial Grams, that one program sums in about the time of a launch; not measured on a GPU yet.
PART_ELEMENTS = 2**14
NUM_WARPS = 4


def map_blocks(n_samples: int) -> dict[str, int]:
    """Return the sizes of a tile of relation maps."""
    block_s = triton.next_power_of_2(n_samples)
    return {"BLOCK_S": block_s, "BLOCK_L": min(128, max(8, _TILE_ELEMENTS // block_s))}


def gram_blocks(n_samples: int) -> dict[str, int]:
    """Return the sizes of a block of rows of the Grams, and of one of their parts and entries."""
    block_s = triton.next_power_of_2(n_samples)
    block_e = min(_TILE_ELEMENTS, block_s**2)
    return {
        "BLOCK_R": max(1, min(block_s, _TILE_ELEMENTS // (4 * block_s))), "BLOCK_S": block_s,
        "BLOCK_K": _TILE_ELEMENTS // block_e, "BLOCK_E": block_e,
        "num_warps": NUM_WARPS if block_s < 64 else 2 * NUM_WARPS,
    }  # fmt: skip


def launch_forward(
    image_parts: Tensor,
    token_gram: Tensor | None,
    teacher_tokens: Tensor | None,
    teacher_scores: Tensor,
    student_scores: Tensor,
    objective: Objective,
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return loss, L_r, L_d, both unit Grams, and what the backward mixes the maps by, by two launches or some more.

    Grams are fp32 or fp64, that of the images in parts ``[parts, s, s]``; in place of the tokens' there may be the
    tokens ``[s, k]``. The samples have weights where the form has them.
    """
    n_samples, n_scores = teacher_scores.shape
    n_token_columns = 0 if teacher_tokens is None else teacher_tokens.shape[1]
    blocks = map_blocks(n_samples)
    n_matrices = 2 if teacher_tokens is None else 3
    n_stretches = triton.cdiv(max(n_scores, n_token_columns), blocks["BLOCK_L"])
    pairs = objective.compares_pairs
    n_rows = n_samples + 1 if pairs else n_samples
    n_steps = triton.cdiv(n_stretches, max(1, PARTIAL_ELEMENTS // (n_matrices * n_rows * n_samples)))
    n_programs = triton.cdiv(n_stretches, n_steps)
    parts = teacher_scores.new_empty(n_matrices, n_programs, n_rows, n_samples, dtype=torch.float64)
    with torch.cuda.device_of(teacher_scores):
        kernels._relation_grams_kernel[(n_programs, n_matrices)](
            teacher_scores, student_scores, teacher_tokens, parts,
            n_samples, n_scores, n_token_columns, n_steps, n_rows * n_samples,
            **blocks, PAIRS=pairs, num_warps=NUM_WARPS,
        )  # fmt: skip
        relation_parts = _few(parts, 1)
        token_parts = relation_parts[2] if token_gram is None else token_gram.unsqueeze(0)
        image_parts = _few(image_parts, 0)
        # Four Grams, the products of pairs, and the scales of the Grams.
        grams = parts.new_empty(4 * n_samples + 1 + 4, n_samples)
        outputs = empty_outputs(teacher_scores)
        kernels._gram_terms_fwd_kernel[(1,)](
            image_parts, token_parts, relation_parts[0], relation_parts[1],
            None if weight is None else weight.contiguous(), grams, *outputs,
            n_samples, len(image_parts), len(token_parts), relation_parts.shape[1],
            objective.lambda_r, objective.lambda_d, **gram_blocks(n_samples),
            FORM=objective.distillation, DETACH=objective.detach_teacher_relation and not pairs,
        )  # fmt: skip
    return outputs


def _few(parts: Tensor, dim: int) -> Tensor:
    """Return the parts, or their sum as the only one where one program would sum them for too long."""
    n_parts, n_entries = parts.shape[dim], parts.shape[-2:].numel()
    few = n_parts == 1 or n_parts * n_entries <= PART_ELEMENTS
    return parts if few else parts.sum(dim, keepdim=True, dtype=torch.float64)


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
    blocks = map_blocks(n_samples)
    with torch.cuda.device_of(teacher_scores):
        kernels._gram_terms_bwd_kernel[(triton.cdiv(n_scores, blocks["BLOCK_L"]), 2)](
            teacher_scores, student_scores, mix, grad_loss, grad_compression, grad_distillation,
            grad_teacher, grad_student, n_samples, n_scores, lambda_r, lambda_d,
            **blocks, PAIRS=compares_pairs, num_warps=NUM_WARPS,
        )  # fmt: skip
    return grad_teacher, grad_student
