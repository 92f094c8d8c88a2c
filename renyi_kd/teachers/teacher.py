"""What the loss asks of a teacher."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from renyi_kd.sam.features import SAMFeatures
from renyi_kd.sam.step import Step


@runtime_checkable
class Teacher(Protocol):
    """What the loss asks of a teacher; the :class:`Tap` of a frozen model is one.

    Where a teacher has a ``model``, that must have nothing in common with what the student trains.
    """

    def observe(self, step: Step) -> SAMFeatures:
        """Return the features of what the student saw in a step, computed in eval mode and without gradient.

        Args:
            step: the batch that the loss was given, and the calls that the student made.

        """
        ...
