"""Samples of earlier steps, beside which those of a step are seen when they are few."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from renyi_kd.samples.samples import Samples, images_of_parts
from renyi_kd.whole_state import listed_errors


class SampleBank(nn.Module):
    """The last samples of earlier steps, as constants: their scores are those of the step that they were part of.

    What is not finite of a step is kept as zero: its own loss tells of it, and those after it are not spoilt.

    Args:
        size: how many samples are kept.

    Memory: a kept sample is d h w numbers of its map, in the dtype that the teacher's maps come in, unless another of
    its image is kept too; n d of its n tokens likewise; and 2 n h w of its scores, in fp32 or fp64. For a SAM with maps
    of 256 x 64 x 64 and one token that is 4.03 MiB in fp32 and 2.03 MiB in half precision, in which nothing is lost.
    Maps in fp32 are not rounded: whether that were exact only the device could say, and the host would wait. While a
    step is joined, there are its samples and those kept once more.

    Source: Wang et al., Cross-Batch Memory for Embedding Learning, CVPR 2020, whose idea it is that what a model said a
    few steps ago is close to what it would say now.

    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self._past: Samples | None = None
        # From a checkpoint, which may have been read to another device.
        self._loaded = False

    def join(self, own: Samples) -> Samples:
        """Return the samples of a step and after them those kept, and keep the step's while gradients are on.

        Those kept are left out, and then forgotten, where they have another shape, dtype or device than the step's; a
        warning says so of a step with a single sample, which is left with nothing to compare it with.
        """
        if self._loaded and self._past is not None:
            self._past = _moved(self._past, own.image_features.device)
        self._loaded = False
        past = self._past
        if past is not None and _kind(past) != _kind(own):
            if len(own.mask_tokens) == 1:
                warnings.warn(
                    "InfoSAMLoss: samples must have one shape, dtype and device for the bank to join them, got "
                    f"{_kind(own)} after {_kind(past)}; the loss of this single sample is 0, so use one image size, "
                    "or larger batches",
                    stacklevel=2,
                )
            past = None
        joined = own if past is None else _concatenate(own, past)
        if torch.is_grad_enabled():
            # Let go of before they are copied: they are among those that are joined.
            self._past = past = None
            self._past = _kept(joined, self.size)
        return joined

    def get_extra_state(self) -> tuple[Any, ...]:
        """Return the fields of the :class:`Samples` that are kept; none before the first step."""
        # A tuple, which torch.distributed.checkpoint takes as a whole, as it does not know its parts when it loads.
        return () if self._past is None else tuple(self._past)

    def set_extra_state(self, state: Sequence[Any]) -> None:
        """Keep the samples of another bank; of a larger one its last ones, and of a smaller one all.

        Raises:
            ValueError: it is not the state of a bank.

        """
        fault = _fault(state)
        if fault is not None:
            raise ValueError(
                f"InfoSAMLoss: the state of the bank must be that of another's samples, got {fault}; load what was "
                "saved, or leave it out, for a bank that begins empty"
            )
        self._past = _kept(Samples(*state), self.size) if state else None
        self._loaded = True

    # Strict loading takes a checkpoint from before there was a bank, after which nothing is kept.
    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.setdefault(f"{prefix}_extra_state", ())
        with listed_errors(args[-1]):
            super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Return the size for ``repr``."""
        return f"size={self.size}"


def _fault(state: Any) -> str | None:
    """Return what a value has that the state of a bank has not, if anything."""
    if not isinstance(state, tuple | list):
        return f"one of type {type(state).__name__}"
    if not state:
        return None
    if len(state) != len(Samples._fields):
        return f"{len(state)} values in place of {len(Samples._fields)}"
    maps, images, tokens, *scores = state[:5]
    if any(value is not none for value, none in zip(state[5:], (None, False, None), strict=True)):
        return "what no bank keeps of samples"
    for name, value, n_dims in zip(Samples._fields, (maps, None, tokens, *scores), (4, 0, 3, 3, 3), strict=False):
        if n_dims and not (isinstance(value, Tensor) and value.is_floating_point() and value.layout == torch.strided):
            return f"{name} that are no dense tensor of floating point"
        if n_dims and value.is_meta:
            return f"{name} without numbers, on the device meta"
        if n_dims and value.ndim != n_dims:
            return f"{name} of shape {list(value.shape)}"
    shapes = [list(value.shape) for value in (maps, tokens, *scores)]
    n_images, dim, height, width = shapes[0]
    n_samples, n_tokens, token_dim = shapes[1]
    expected = [n_samples, n_tokens, height * width]
    if token_dim != dim or shapes[2] != expected or shapes[3] != expected:
        return f"maps, tokens and scores of the shapes {', '.join(map(str, shapes))}"
    if images is None:
        return None if n_images == n_samples else f"{n_images} maps of {n_samples} samples"
    known = isinstance(images, tuple | list) and all(type(each) is int and 0 <= each < n_images for each in images)
    return (
        None if known and len(images) == n_samples else f"images {images!r} of {n_samples} samples and {n_images} maps"
    )


def _moved(samples: Samples, device: torch.device) -> Samples:
    return samples._replace(
        image_features=samples.image_features.to(device),
        mask_tokens=samples.mask_tokens.to(device),
        teacher_scores=samples.teacher_scores.to(device),
        student_scores=samples.student_scores.to(device),
    )


def _kind(samples: Samples) -> str:
    """Return what samples must share to be compared."""
    values = samples.image_features, samples.mask_tokens, samples.teacher_scores
    return ", ".join(f"{list(value.shape[1:])} {value.dtype} {value.device}" for value in values)


def _concatenate(own: Samples, past: Samples) -> Samples:
    def both(name: str) -> Tensor:
        return torch.cat([getattr(own, name), getattr(past, name)])

    weight = own.weight
    if own.in_pairs:
        # What earlier samples say of a loss that compares none with another, they have said: the mean is the step's.
        n_own, n_past = len(own.mask_tokens), len(past.mask_tokens)
        weight = own.teacher_scores.new_ones(n_own) if weight is None else weight
        weight = torch.cat([weight * ((n_own + n_past) / n_own), weight.new_zeros(n_past)])
    return Samples(
        both("image_features"),
        images_of_parts([own.images, past.images], [len(own.image_features), len(past.image_features)]),
        both("mask_tokens"),
        both("teacher_scores"),
        both("student_scores"),
        weight,
        own.in_pairs,
    )


def _kept(samples: Samples, n: int) -> Samples:
    """Return copies of the first samples and of the images they need, finite and without gradient."""
    images = samples.images
    # Copies, as the buffers of a teacher may be written again, and a part would keep all that was joined.
    if images is None:
        maps = samples.image_features[:n].detach().clone()
    else:
        needed = sorted(set(images[:n]))
        # One by one: an index of numbers would be copied from the host, which waits for that.
        maps = torch.stack([samples.image_features[image].detach() for image in needed])
        images = [needed.index(image) for image in images[:n]]
    scores = samples.teacher_scores, samples.student_scores
    tokens, teacher, student = (value[:n].detach().clone() for value in (samples.mask_tokens, *scores))
    for value in (maps, tokens, teacher, student):
        value.nan_to_num_(0.0, 0.0, 0.0)
    return Samples(maps, images, tokens, teacher, student)
