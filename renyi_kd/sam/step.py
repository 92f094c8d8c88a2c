"""What a step was: the batch given to the loss, and the calls that the student made."""

from __future__ import annotations

from typing import Any, NamedTuple

from renyi_kd.sam.inputs import Comparison, Inputs
from renyi_kd.sam.memory import Snapshot, differ, leaves, storage_of


class Call(NamedTuple):
    """One run of a model, as it was made.

    Attributes:
        batch: what the tap was given to run the model on; None where the loop called the model itself.
        arguments: the arguments ``(args, kwargs)`` of the model's own call; None where only its parts were called.
        names: the arguments that the student's forward takes by position.
        own_embeddings: whether the model was called with image features that its own image encoder had computed.
        encoded: whether its image encoder ran in it.

    """

    batch: Snapshot | None = None
    arguments: Snapshot | None = None
    names: tuple[str, ...] = ()
    own_embeddings: bool = False
    encoded: bool = False

    def is_of_another(self, given: Any) -> bool:
        """Return whether something shows the call to be of another batch, or its tensors were written to since."""
        if self.batch is not None:
            return differ(given, self.batch.value) or self.batch.changed()
        if self.arguments is None:
            return False
        named = self.named()
        alone = next(iter(named.values())) if len(named) == 1 else None
        return differ(given, named) or (alone is not None and differ(given, alone)) or self.arguments.changed()

    def named(self) -> dict[str, Any]:
        """Return the arguments by name, as far as the student's forward names them."""
        return {**dict(zip(self.names, self.args, strict=False)), **self.kwargs}

    @property
    def args(self) -> tuple[Any, ...]:
        """The positional arguments of the model's call."""
        args: tuple[Any, ...] = () if self.arguments is None else self.arguments.value[0]
        return args

    @property
    def kwargs(self) -> dict[str, Any]:
        """The named arguments of the model's call."""
        kwargs: dict[str, Any] = {} if self.arguments is None else self.arguments.value[1]
        return kwargs


class Step(NamedTuple):
    """What the loss tells a teacher of a step.

    Attributes:
        given: the batch that the loss was given, or None.
        ran: the calls that the student made since the last loss, each as it was made; later changes of lists and
            dicts do not show in them.
        seen: what reached the student's encoders; None where it was no tap that ran.
        comparison: holds what reached the teacher's encoders against it.

    """

    given: Any = None
    ran: tuple[Call, ...] = ()
    seen: Inputs | None = None
    comparison: Comparison | None = None

    def ran_on(self, given: Any) -> bool:
        """Return whether nothing speaks against all calls being of the given batch."""
        if any(call.is_of_another(given) for call in self.ran):
            return False
        sources: list[Any] = [call for call in self.ran if call.encoded]
        if not self.ran and self.seen is not None:
            sources = list(self.seen.images)
        known = {storage_of(leaf) for leaf in leaves(given)} - {None}
        shares = [bool(known & {storage_of(leaf) for leaf in leaves(source)}) for source in sources]
        return all(shares) or not any(shares)
