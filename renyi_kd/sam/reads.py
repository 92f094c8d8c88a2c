"""What the loss reads of a student: aliases of its tensors, between which and the tensors lies the loss's gradient."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from renyi_kd.sam.features import SAMFeatures
from renyi_kd.sam.memory import storage_of


class Part(NamedTuple):
    """Where a view lies in the tensor that it was taken from, in numbers of elements."""

    whole_shape: torch.Size
    whole_stride: tuple[int, ...]
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int

    def of(self, gradient: Tensor) -> Tensor:
        """Return the view's part of a gradient of the whole."""
        if gradient.stride() != self.whole_stride:
            laid_alike = gradient.new_empty_strided(self.whole_shape, self.whole_stride)
            gradient = laid_alike.copy_(gradient)
        return gradient.as_strided(self.shape, self.stride, gradient.storage_offset() + self.offset)


class Read(NamedTuple):
    """One tensor as the loss reads it.

    Attributes:
        source: the tensor of the model that the task reads too: its gradient is the total.
        alias: what the loss reads, and nothing else does: its gradient is the loss's own.
        part: where the alias lies in the source; None where it is all of it.

    """

    source: Tensor
    alias: Tensor
    part: Part | None = None


class Reads(NamedTuple):
    """What the loss reads of a step, as far as the tensors of the model itself are known.

    Attributes:
        image_features: the maps.
        mask_tokens: all of them; the loss may then take some.

    """

    image_features: tuple[Read, ...] = ()
    mask_tokens: tuple[Read, ...] = ()


_NOTHING = Reads()


class ReadFeatures(SAMFeatures):
    """Features of which the tensors of the model are known that they were made from.

    Attributes:
        reads: those tensors, with the aliases in between.

    """

    # Of the class too: features that are made anew, as by _make, are known to come from nothing.
    reads: Reads = _NOTHING

    def __new__(
        cls, image_features: Tensor, mask_tokens: Tensor, image_index: Tensor | None, reads: Reads = _NOTHING
    ) -> ReadFeatures:
        """Return the features."""
        features = super().__new__(cls, image_features, mask_tokens, image_index)
        features.reads = reads
        return features

    def _replace(self, **fields: Any) -> ReadFeatures:
        """Return features that are computed from these: the gradient of the loss still comes by the aliases."""
        image_features, mask_tokens, image_index = super()._replace(**fields)
        # What has no gradient comes by none, and would keep the graph.
        reads = Reads(
            self.reads.image_features if image_features.requires_grad else (),
            self.reads.mask_tokens if mask_tokens.requires_grad else (),
        )
        return ReadFeatures(image_features, mask_tokens, image_index, reads)


def with_reads(features: SAMFeatures) -> ReadFeatures:
    """Return features that come from no tap as aliases of themselves."""
    if isinstance(features, ReadFeatures):
        return features
    image_features, of_map = read(features.image_features)
    mask_tokens, of_tokens = read(features.mask_tokens)
    reads = Reads(*(() if each is None else (each,) for each in (of_map, of_tokens)))
    return ReadFeatures(image_features, mask_tokens, features.image_index, reads)


def read(value: Tensor, source: Tensor | None = None) -> tuple[Tensor, Read | None]:
    """Return an alias of a tensor for the loss to read, and what is known of it; None where it gets no gradient.

    ``source`` is the tensor of the model, of which ``value`` is a view; None where that is the tensor itself.
    """
    if not value.requires_grad:
        return value, None
    alias = value.view_as(value)
    if source is None or source is value:
        return alias, Read(value, alias)
    if not is_view_of(value, source) or _repeats(source) or _repeats(value):
        # It was computed from the source, or one number stands in several places: no part of a gradient is its own.
        return alias, None
    offset = int(value.storage_offset() - source.storage_offset())
    part = Part(source.shape, source.stride(), value.shape, value.stride(), offset)
    return alias, Read(source, alias, part)


def is_view_of(value: Tensor, source: Tensor) -> bool:
    """Return whether a tensor with gradient lies in a source's memory, and was taken from it by views alone."""
    if value is source:
        return True
    if storage_of(value) is None or storage_of(value) != storage_of(source):
        return False
    node: Any = value.grad_fn
    number = value.output_nr
    while node is not None:
        # One operation may give several tensors of one memory.
        if node is source.grad_fn and number == source.output_nr:
            return True
        if len(node.next_functions) != 1:
            return getattr(node, "variable", None) is source
        node, number = node.next_functions[0]
    return False


def _repeats(value: Tensor) -> bool:
    return any(stride == 0 and size > 1 for size, stride in zip(value.shape, value.stride(), strict=True))
