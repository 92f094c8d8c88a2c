"""What a loss is asked to be, and what it comes to: weights, order and form; the terms."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, get_args

from torch import Tensor

from renyi_kd.diagnostics import RelationDiagnostics, Relations, diagnose
from renyi_kd.entropy import check_alpha

Distillation = Literal["mutual_information", "cauchy_schwarz", "debiased", "jensen_renyi"]
_FORMS = get_args(Distillation)
# Made once: a union is an object, and the check runs every step.
_NUMBER = float | int


class Objective(NamedTuple):
    """The weights of the loss, the order of its entropies and the form of its distillation term.

    ``infosam_loss.objective`` is that of a loss; a schedule sets another one between two steps:
    ``infosam_loss.objective = infosam_loss.objective._replace(lambda_d=0.1)``.

    Attributes:
        lambda_r: weight of the compression term L_r; any finite number.
        lambda_d: weight of the distillation term L_d; likewise.
        alpha: order of the entropies, in (0, inf].
        distillation: the form of L_d: ``"mutual_information"``, the paper's, ``"cauchy_schwarz"``, ``"debiased"`` or
            ``"jensen_renyi"``; see :func:`infosam_terms`.
        detach_teacher_relation: whether L_d takes the teacher's relation as a constant, as ``"jensen_renyi"`` always
            does.

    >>> Objective()._replace(lambda_d=0.1).lambda_d
    0.1

    """

    lambda_r: float = 1.0
    lambda_d: float = 0.5
    alpha: float = 2.0
    distillation: Distillation = "mutual_information"
    detach_teacher_relation: bool = False

    @property
    def compares_pairs(self) -> bool:
        """Whether L_d is a mean over samples, each compared with itself: one sample will do, and may have a weight."""
        return self.distillation == "jensen_renyi"


class _Terms(NamedTuple):
    loss: Tensor
    compression: Tensor
    distillation: Tensor


class InfoSAMTerms(_Terms):
    """The loss and its two terms, each ``[]`` in bits; all three are attached to the graph. A tuple of them.

    Attributes:
        loss: ``lambda_r * compression + lambda_d * distillation``, times the weight that ``gradient_share`` asks for.
        compression: L_r, of the teacher alone, in [-log2 s, 0] for s samples.
        distillation: L_d: the negative mutual information of the two relations or, where it was asked for, a form that
            is 0 where they are equal and positive elsewhere.
        relations: what :meth:`diagnostics` reads; None for terms that were put together elsewhere.

    """

    relations: Relations | None = None

    # No field of the tuple, so that the three can still be unpacked.
    def __new__(
        cls, loss: Tensor, compression: Tensor, distillation: Tensor, relations: Relations | None = None
    ) -> InfoSAMTerms:
        """Return the terms of a step, which its relations belong to."""
        terms = super().__new__(cls, loss, compression, distillation)
        terms.relations = relations
        return terms

    def _replace(self, **fields: Any) -> InfoSAMTerms:
        """Return other values of the same step."""
        return InfoSAMTerms(*super()._replace(**fields), self.relations)

    def diagnostics(self) -> RelationDiagnostics:
        """Return the state of the relations in this step and, after its backward, the loss's share of the gradient.

        Raises:
            RuntimeError: the terms hold no relations.

        """
        if self.relations is None:
            raise RuntimeError(
                "InfoSAMTerms: diagnostics must have the relations of a step, got terms without them; keep the terms "
                "that infosam_terms or infosam_loss.terms returned"
            )
        return diagnose(self.relations)


def check_objective(function: str, objective: Objective) -> None:
    """Raise unless a loss can be computed for ``objective``; ``function`` begins the message.

    Raises:
        TypeError: it is no :class:`Objective`.
        ValueError: a setting is out of its range.

    """
    if not isinstance(objective, Objective):
        raise TypeError(
            f"{function}: objective must be an Objective, got {type(objective).__name__}; "
            "change the one that is there: objective._replace(lambda_d=0.1)"
        )
    for name in ("lambda_r", "lambda_d"):
        weight = getattr(objective, name)
        # By comparison, as torch.compile traces no math.isfinite of a number that it takes as dynamic.
        if not isinstance(weight, _NUMBER) or not abs(weight) < math.inf:
            raise ValueError(f"{function}: {name} must be a finite number, got {weight!r}; 0 switches the term off")
    check_alpha(function, objective.alpha)
    if objective.distillation not in _FORMS:
        raise ValueError(
            f"{function}: distillation must be one of {_FORMS}, got {objective.distillation!r}; "
            "'mutual_information' is the paper's"
        )
    if objective.distillation == "debiased" and objective.alpha < 2:
        raise ValueError(
            f"{function}: alpha must be at least 2 under distillation='debiased', got {objective.alpha!r}; below, it "
            "can be negative, so that its optimum is no longer the teacher: use alpha=2, or another form"
        )
