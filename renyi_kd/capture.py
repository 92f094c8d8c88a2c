"""What the decoder calls of one step left behind, until the loss takes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from renyi_kd.features import SAMFeatures


@dataclass
class _Call:
    """One call of a mask decoder: the slot of its image features and its tokens by number."""

    slot: int
    tokens: dict[int, Tensor] = field(default_factory=dict)


class _Backward:
    """Whether a backward pass has run through a step; apart, so that the graph's hooks do not hold the tensors."""

    seen = False

    def note(self, _gradient: Tensor) -> None:
        self.seen = True


class Capture:
    """Collects the calls of a step: image features first, then each call's mask tokens, then the end of the call.

    The same image features in several calls (clicks, prompts) are kept once. A call that did not end, because an
    exception left it, does not count.
    """

    def __init__(self) -> None:
        self._maps: list[Tensor] = []
        self._calls: list[_Call] = []
        self._open: _Call | None = None
        self._backward = _Backward()

    def __len__(self) -> int:
        return len(self._calls)

    @property
    def differentiated(self) -> bool:
        """Whether backward has run through the calls."""
        return self._backward.seen

    def add_image(self, image_features: Tensor) -> None:
        """Begin a call on these image features."""
        for slot, known in enumerate(self._maps):
            if known is image_features or _same_memory(known, image_features):
                self._open = _Call(slot)
                return
        self._maps.append(image_features)
        self._open = _Call(len(self._maps) - 1)

    def add_tokens(self, number: int, tokens: Tensor) -> None:
        """Add mask token ``number`` of the open call, ``[..., d]`` with one row per sample."""
        if self._open is None:
            raise RuntimeError(
                "tap: image_features must be seen before mask_tokens, got mask tokens first; "
                "name a module that runs before the one of mask_tokens"
            )
        self._open.tokens[number] = tokens

    def watch(self, value: Any) -> None:
        """Note when backward runs through a tensor of the model, alone or in a module's output."""
        if isinstance(value, Tensor):
            if value.requires_grad:
                value.register_hook(self._backward.note)  # type: ignore[no-untyped-call]
        elif isinstance(value, Mapping):
            self.watch(tuple(value.values()))
        elif isinstance(value, tuple | list):
            for item in value:
                self.watch(item)

    def end_call(self) -> None:
        """Count the open call, which has all its tokens."""
        if self._open is not None:
            self._calls.append(self._open)
            # The explicit form may bring more tokens for the same image features.
            self._open = _Call(self._open.slot)

    def features(self) -> SAMFeatures:
        """Return all calls as one: maps of distinct images, samples in the order of the calls.

        Raises:
            RuntimeError: the calls do not fit together.

        """
        used = sorted({call.slot for call in self._calls})
        maps = [self._maps[slot] for slot in used]
        if len({tuple(map_.shape[1:]) for map_ in maps}) > 1:
            raise RuntimeError(
                f"tap: image features of one step must have one size, got {[tuple(m.shape) for m in maps]}; "
                "call the loss once per image size"
            )
        first_image = dict(zip(used, _offsets([len(map_) for map_ in maps]), strict=True))
        rows, index = [], []
        for call in self._calls:
            tokens = torch.stack([call.tokens[number].flatten(0, -2) for number in sorted(call.tokens)], 1)
            n_images, n_samples = len(self._maps[call.slot]), len(tokens)
            if n_samples % n_images:
                raise RuntimeError(
                    f"tap: a decoder call must have as many prompts for every image, got {n_samples} samples for "
                    f"{n_images} images; call the decoder once per image"
                )
            rows.append(tokens)
            index.append(first_image[call.slot] + torch.arange(n_images).repeat_interleave(n_samples // n_images))
        image_index = torch.cat(index)
        image_features = maps[0] if len(maps) == 1 else torch.cat(maps)
        one_to_one = torch.equal(image_index, torch.arange(len(image_features)))
        return SAMFeatures(image_features, torch.cat(rows), None if one_to_one else image_index)


def _same_memory(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors show the same values to autograd: as when one image is decoded again."""
    return (
        a.data_ptr() == b.data_ptr()
        and a.shape == b.shape
        and a.stride() == b.stride()
        and a.dtype == b.dtype
        and a.grad_fn is b.grad_fn
        and a._version == b._version
    )


def _offsets(sizes: list[int]) -> list[int]:
    return [sum(sizes[:position]) for position in range(len(sizes))]
