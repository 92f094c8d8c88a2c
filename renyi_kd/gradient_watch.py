"""Whether a training loop clears the gradients of the relation module."""

from __future__ import annotations

import warnings
import weakref
from typing import Any

from torch import Tensor, nn

from renyi_kd.relation import RelationModule


class GradientWatch:
    """Notices a loop that clears the gradients of the model and not those of the relation module."""

    def __init__(self) -> None:
        self._before: weakref.ref[Tensor] | None = None
        self._warned = False

    def __reduce__(self) -> tuple[Any, ...]:
        return GradientWatch, ()

    def look(self, relation: RelationModule, student: nn.Module) -> None:
        """Warn, once, where the gradient of the step before is still there and the student's are not."""
        gradient = relation.key_proj.weight.grad
        before, self._before = self._before, None if gradient is None else weakref.ref(gradient)
        # A gradient that was cleared is another tensor in the next step; one that adds up is the same.
        if self._warned or gradient is None or before is None or before() is not gradient:
            return
        trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
        if trained and all(parameter.grad is None for parameter in trained):
            self._warned = True
            warnings.warn(
                "InfoSAMLoss: gradients must be cleared in every step, got those of the relation module from the step "
                "before where the model's were cleared; call infosam_loss.zero_grad() too, or zero_grad() of an "
                "optimiser that holds both",
                stacklevel=5,
            )
