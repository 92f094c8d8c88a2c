"""From the decoder calls of a step to its features: whose sample is whose, and which are none."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from renyi_kd.sam.decoder_call import DecoderCall
from renyi_kd.sam.features import SAMFeatures
from renyi_kd.sam.inputs import Seen


def features_of_calls(all_calls: Sequence[DecoderCall], groups_are_images: bool = False) -> SAMFeatures:
    """Return the calls that count as one: maps of distinct images, samples in the order of the calls.

    Args:
        all_calls: of a step, one of them with gradient at least.
        groups_are_images: whether a decoder that makes several groups of tokens in a call loops over its images.

    Raises:
        RuntimeError: the calls do not fit together, have no samples, or were overwritten since.

    """
    calls = [call for call in all_calls if call.with_gradient]
    decoders = list(dict.fromkeys(call.decoder for call in calls))
    if len(decoders) > 1:
        raise RuntimeError(
            f"tap: one mask decoder must run in a step, got calls of {' and '.join(map(repr, decoders))}, whose "
            "features must not mix; tap the part of the model whose decoder is meant"
        )
    first_image: dict[int, int] = {}
    maps: list[Tensor] = []
    rows, index = [], []
    for call in calls:
        image = call.image
        if image.overwritten():
            raise RuntimeError(
                "tap: image features must stay as they are until the loss is computed, got features that were "
                "overwritten in place; pass a tensor of its own to each decoder call"
            )
        if id(image) not in first_image:
            first_image[id(image)] = sum(map(len, maps))
            maps.append(image.value)
        for tokens, images in _samples(call, groups_are_images):
            rows.append(tokens)
            index.append(first_image[id(image)] + images)
    if len({tuple(value.shape[1:]) for value in maps}) > 1:
        raise RuntimeError(
            f"tap: image features of one step must have one size, got {[tuple(value.shape) for value in maps]}; "
            "call the loss once per image size"
        )
    image_index = torch.cat(index)
    if not len(image_index):
        raise RuntimeError(
            f"tap: the images of a step must have prompts, got {sum(map(len, maps))} images without any; leave the "
            "loss out of such a step, and call clear() on the student's tap"
        )
    one_to_one = torch.equal(image_index, torch.arange(sum(map(len, maps))))
    return SAMFeatures(_joined(maps), torch.cat(rows), None if one_to_one else image_index)


def _samples(call: DecoderCall, groups_are_images: bool) -> list[tuple[Tensor, Tensor]]:
    """Return the mask tokens ``[s, n, d]`` of each group of a call, with the image of each sample."""
    n_images, n_groups = len(call.image.value), len(call.groups)
    looped = n_groups > 1 and n_images > 1
    if looped and not (groups_are_images and n_groups == n_images):
        raise RuntimeError(
            f"tap: a decoder call must tell which samples belong to which image, got {n_groups} groups of mask tokens "
            f"for {n_images} images; call the decoder once per image or, where it loops over its images and nothing "
            "else, say so: tap(model, decoder_loops_over_images=True)"
        )
    parts = []
    for number, group in enumerate(call.groups):
        if sorted(group) != list(range(len(group))):
            raise RuntimeError(
                f"tap: a decoder call must give its mask tokens from 0 on, got numbers {sorted(group)}; a hypernetwork "
                "was replaced after the model was tapped: tap it again"
            )
        if any(held.overwritten() for held in group.values()):
            raise RuntimeError(
                "tap: mask tokens must stay as they are until the loss is computed, got tokens that were overwritten "
                "in place; leave the decoder's tokens as they are, or use a copy of them"
            )
        values = [group[number].value for number in range(len(group))]
        tokens = torch.stack([value.flatten(0, -2) for value in values], 1)
        images = torch.full((len(tokens),), number) if looped else _images(values[0], n_images, call.layout)
        keep = None if looped else _true_prompts(call.prompts, tuple(values[0].shape[:-1]))
        parts.append((tokens, images) if keep is None else (tokens[keep.to(tokens.device)], images[keep]))
    return parts


def _images(tokens: Tensor, n_images: int, layout: tuple[int, int] | None) -> Tensor:
    """Return the image of each sample of tokens ``[s, d]`` or ``[b, p, d]``, by what the shapes say of it."""
    shape = tokens.shape[:-1]
    n_samples = shape.numel()
    if n_images == 1 or n_samples == 0:
        return torch.zeros(n_samples, dtype=torch.int64)
    if len(shape) == 2 and shape[0] == n_images:
        return torch.arange(n_images).repeat_interleave(shape[1])
    if layout is not None and layout[0] == n_images and n_samples == n_images * layout[1]:
        return torch.arange(n_images).repeat_interleave(layout[1])
    if shape == (n_images,):
        return torch.arange(n_images)
    raise RuntimeError(
        f"tap: a decoder call must tell which samples belong to which image, got {n_samples} samples for {n_images} "
        "images; call the decoder once per image, or name a place that gives the tokens as [b, p, n, d]"
    )


def _true_prompts(prompts: Sequence[Seen], shape: tuple[int, ...]) -> Tensor | None:
    """Return which samples are prompts, where some may be padding, on the CPU; None where none is.

    The processors of transformers fill prompts up to one number with -10, as labels and as coordinates.
    """
    if len(prompts) != 1 or len(shape) != 2 or shape[1] == 1:
        return None
    padding: Tensor | None = None
    for name, value in prompts[0].arguments.items():
        if (
            isinstance(value, Tensor)
            and value.ndim >= 3
            and value.shape[:2] == shape
            and ("label" in name or "box" in name)
        ):
            filled = (value == -10).flatten(2).all(-1)
            padding = filled if padding is None else padding & filled
    if padding is None:
        return None
    keep = ~padding.flatten().cpu()
    return None if bool(keep.all()) else keep


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
