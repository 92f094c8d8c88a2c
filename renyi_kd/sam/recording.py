"""What the decoder calls of one step left behind, until the loss takes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from renyi_kd.sam.features import SAMFeatures


class _Map(NamedTuple):
    """Image features, and the version of their memory when they were seen."""

    value: Tensor
    version: int


class _Call(NamedTuple):
    """One call of a mask decoder: its name, its image features and its tokens by number."""

    decoder: str
    image: _Map
    tokens: dict[int, Tensor]


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
        self._calls: list[_Call] = []
        self._open: _Call | None = None
        self._backward = _Backward()

    def __len__(self) -> int:
        return len(self._calls)

    @property
    def differentiated(self) -> bool:
        """Whether backward has run through the calls."""
        return self._backward.seen

    def add_image(self, image_features: Tensor, decoder: str = "") -> None:
        """Begin a call of a decoder on these image features."""
        image = _Map(image_features, _version(image_features))
        same = (call.image for call in self._calls if _are_one(call.image, image))
        self._open = _Call(decoder, next(same, image), {})

    def add_tokens(self, number: int | None, tokens: Tensor) -> None:
        """Add mask token ``number``, or the next, of the open call: ``[..., d]`` with one row per sample."""
        if self._open is None:
            raise RuntimeError(
                "tap: image_features must be seen before mask_tokens in every forward, got mask tokens first; "
                "name a module of image_features that runs before the one of mask_tokens"
            )
        self._open.tokens[len(self._open.tokens) if number is None else number] = tokens

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
        """Count the open call, which has all its tokens; more may follow for the same image features.

        A call whose tokens no hook has seen, as in a part of the model that was compiled before, does not count.
        """
        if self._open is not None and self._open.tokens:
            self._calls.append(self._open)
            self._open = _Call(self._open.decoder, self._open.image, {})

    def end_forward(self) -> None:
        """Let no later tokens belong to the image features that were last seen."""
        self._open = None

    def features(self) -> SAMFeatures:
        """Return all calls as one: maps of distinct images, samples in the order of the calls.

        Raises:
            RuntimeError: the calls do not fit together, or image features were overwritten since.

        """
        decoders = list(dict.fromkeys(call.decoder for call in self._calls))
        if len(decoders) > 1:
            raise RuntimeError(
                f"tap: one mask decoder must run in a step, got calls of {' and '.join(map(repr, decoders))}, whose "
                "features must not mix; tap the part of the model whose decoder is meant"
            )
        first_image: dict[int, int] = {}
        maps: list[Tensor] = []
        rows, index = [], []
        for _, image, by_number in self._calls:
            if image.version != _version(image.value):
                raise RuntimeError(
                    "tap: image features must stay as they are until the loss is computed, got features that were "
                    "overwritten in place; pass a tensor of its own to each decoder call"
                )
            if id(image) not in first_image:
                first_image[id(image)] = sum(map(len, maps))
                maps.append(image.value)
            tokens = torch.stack([by_number[number].flatten(0, -2) for number in sorted(by_number)], 1)
            n_images, n_samples = len(image.value), len(tokens)
            if n_samples % n_images:
                raise RuntimeError(
                    f"tap: a decoder call must have as many prompts for every image, got {n_samples} samples for "
                    f"{n_images} images; call the decoder once per image"
                )
            rows.append(tokens)
            index.append(first_image[id(image)] + torch.arange(n_images).repeat_interleave(n_samples // n_images))
        if len({tuple(value.shape[1:]) for value in maps}) > 1:
            raise RuntimeError(
                f"tap: image features of one step must have one size, got {[tuple(value.shape) for value in maps]}; "
                "call the loss once per image size"
            )
        image_index = torch.cat(index)
        one_to_one = torch.equal(image_index, torch.arange(sum(map(len, maps))))
        return SAMFeatures(_joined(maps), torch.cat(rows), None if one_to_one else image_index)


def _version(tensor: Tensor) -> int:
    # Inference tensors have no version: autograd does not track what happens to them.
    return 0 if tensor.is_inference() else tensor._version


def _are_one(known: _Map, new: _Map) -> bool:
    """Return whether two tensors show the same values to autograd, as when one image is decoded again."""
    a, b = known.value, new.value
    if known.version != new.version:
        return False
    same_memory = (
        a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype
    )
    one_origin = a.grad_fn is b.grad_fn or (a._base is not None and a._base is b._base)
    return a is b or (same_memory and one_origin)


def _joined(maps: list[Tensor]) -> Tensor:
    """Return the maps as one tensor: without a copy where they are the consecutive parts of one."""
    whole = maps[0]._base
    if len(maps) == 1:
        return maps[0]
    if whole is not None and whole.shape == (sum(map(len, maps)), *maps[0].shape[1:]):
        offset = whole.storage_offset()
        for part in maps:
            if part._base is not whole or part.storage_offset() != offset or part.stride()[1:] != whole.stride()[1:]:
                return torch.cat(maps)
            offset += len(part) * whole.stride(0)
        return whole
    return torch.cat(maps)
