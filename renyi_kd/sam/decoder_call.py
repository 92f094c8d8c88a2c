"""One call of a mask decoder, and the tensors that were seen in it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from renyi_kd.sam.inputs import Seen
from renyi_kd.sam.memory import version


class Held(NamedTuple):
    """A tensor of the model, and the version of its memory when it was seen.

    Attributes:
        value: the tensor.
        version: of its memory.
        source: the tensor of the model that it is a view of; None where that is itself, or is not known.

    """

    value: Tensor
    version: int
    source: Tensor | None = None

    def overwritten(self) -> bool:
        """Return whether its memory was written to since."""
        return version(self.value) != self.version


@dataclass
class DecoderCall:
    """One call of a mask decoder.

    Attributes:
        decoder: its name.
        image: its image features.
        with_gradient: whether it counts.
        layout: how many images and prompts it was told to have, ``(b, p)``, by the shape of its prompts; or None.
        groups: its mask tokens by number; more than one group where it loops.
        images: what reached the image encoder for it.
        prompts: what reached the prompt encoder for it.

    """

    decoder: str
    image: Held
    with_gradient: bool
    layout: tuple[int, int] | None = None
    groups: list[dict[int, Held]] = field(default_factory=list)
    images: list[Seen] = field(default_factory=list)
    prompts: list[Seen] = field(default_factory=list)


def hold(value: Tensor, source: Tensor | None = None) -> Held:
    """Return a tensor as it is now, a view of ``source``."""
    return Held(value, version(value), source)


def are_one(known: Held, new: Held) -> bool:
    """Return whether two tensors show the same values to autograd, as when one image is decoded again."""
    a, b = known.value, new.value
    if known.version != new.version:
        return False
    same_memory = (
        a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype
    )
    one_origin = a.grad_fn is b.grad_fn or (a._base is not None and a._base is b._base)
    return a is b or (same_memory and one_origin)
