"""What to watch in training: a relation that collapses takes the loss to its bounds while it teaches nothing."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from renyi_kd.entropy import mutual_information, renyi_entropy


class RelationDiagnostics(NamedTuple):
    """State of the relations of one step, of all samples that its loss went over; each ``[]`` in fp64, no gradient.

    Attributes:
        teacher_entropy: S(R_T) in bits, from 0 (every sample has the same relation: no signal) to log2 s.
        student_entropy: S(R_S) in bits.
        mutual_information: I(R_T; R_S) in bits; the paper's L_d is its negative.
        teacher_similarity: mean squared cosine of two different samples' relations, from 0 (orthogonal, or a single
            sample) to 1 (alike).
        student_similarity: likewise for the student. Far from the teacher's, the student is driven away from it.

    """

    teacher_entropy: Tensor
    student_entropy: Tensor
    mutual_information: Tensor
    teacher_similarity: Tensor
    student_similarity: Tensor


def diagnose(teacher_gram: Tensor, student_gram: Tensor, alpha: float = 2.0) -> RelationDiagnostics:
    """Return the diagnostics of the relations' Gram matrices, ``[s, s]`` with unit diagonal."""
    return RelationDiagnostics(
        renyi_entropy(teacher_gram, alpha),
        renyi_entropy(student_gram, alpha),
        mutual_information(teacher_gram, student_gram, alpha),
        _mean_squared_off_diagonal(teacher_gram),
        _mean_squared_off_diagonal(student_gram),
    )


def _mean_squared_off_diagonal(gram: Tensor) -> Tensor:
    n = gram.shape[-1]
    return (gram.square().sum() - gram.diagonal().square().sum()) / max(n * (n - 1), 1)
