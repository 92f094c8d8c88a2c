"""What the loss asks of a teacher."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from renyi_kd.sam.features import SAMFeatures


@runtime_checkable
class Teacher(Protocol):
    """What the loss asks of a teacher; the :class:`Tap` of a frozen model is one."""

    @property
    def needs_batch(self) -> bool:
        """Whether it runs on the batch given to the loss rather than on the arguments that the student was run with."""
        ...

    def observe(self, *batches: Any) -> SAMFeatures:
        """Return the features of the batches, computed in eval mode and without gradient."""
        ...
