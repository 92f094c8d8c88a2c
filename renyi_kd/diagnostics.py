"""What to watch in training: a relation that collapses takes the loss to its bounds while it teaches nothing."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from renyi_kd.entropy import mutual_information, renyi_entropy
from renyi_kd.gradient_share import GradientMeasurement


class RelationDiagnostics(NamedTuple):
    """State of one step: its relations, of all samples that its loss went over, each ``[]`` in fp64 without gradient.

    On the CPU where the device has no fp64.

    Attributes:
        teacher_entropy: S(R_T) in bits, from 0 (every sample has the same relation: no signal) to log2 s.
        student_entropy: S(R_S) in bits.
        mutual_information: I(R_T; R_S) in bits; the paper's L_d is its negative.
        teacher_similarity: mean squared cosine of two different samples' relations, from 0 (orthogonal, or a single
            sample) to 1 (alike).
        student_similarity: likewise for the student. Far from the teacher's, the student is driven away from it.
        image_features_share: norm of the gradient of the loss, with its weights, over that of the task at the student's
            image features, ``[]``; an estimate from some channels of a large map. What comes back to them through the
            mask tokens and the decoder counts as the task's. None before the backward, without gradient, of features
            given by a function that computed them, and under torch.compile; inf without a task.
        mask_tokens_share: likewise at the mask tokens, those that the loss does not read among them; exact.

    """

    teacher_entropy: Tensor
    student_entropy: Tensor
    mutual_information: Tensor
    teacher_similarity: Tensor
    student_similarity: Tensor
    image_features_share: Tensor | None = None
    mask_tokens_share: Tensor | None = None


class Relations(NamedTuple):
    """What a step leaves for its diagnostics.

    Attributes:
        teacher_gram: ``[s, s]`` in fp64 with unit diagonal: cosines of the teacher's relation maps, without gradient.
        student_gram: likewise of the student.
        alpha: order of the entropies.
        gradients: what its backward measures; None where nothing does.

    """

    teacher_gram: Tensor
    student_gram: Tensor
    alpha: float
    gradients: GradientMeasurement | None = None


def diagnose(relations: Relations) -> RelationDiagnostics:
    """Return the diagnostics of a step."""
    teacher_gram, student_gram, alpha, gradients = relations
    return RelationDiagnostics(
        renyi_entropy(teacher_gram, alpha),
        renyi_entropy(student_gram, alpha),
        mutual_information(teacher_gram, student_gram, alpha),
        _mean_squared_off_diagonal(teacher_gram),
        _mean_squared_off_diagonal(student_gram),
        *(() if gradients is None else gradients.share()),
    )


def _mean_squared_off_diagonal(gram: Tensor) -> Tensor:
    n = gram.shape[-1]
    return (gram.square().sum() - gram.diagonal().square().sum()) / max(n * (n - 1), 1)
