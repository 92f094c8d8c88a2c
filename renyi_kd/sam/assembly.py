"""From the decoder calls of a step to its features: whose sample is whose, and which are none."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from renyi_kd.sam.decoder_call import DecoderCall, Held, hold
from renyi_kd.sam.inputs import Seen
from renyi_kd.sam.reads import Read, ReadFeatures, Reads, read


def features_of_calls(all_calls: Sequence[DecoderCall], groups_are_images: bool = False) -> ReadFeatures:
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
    maps: list[Held] = []
    rows, index = [], []
    token_reads: list[Read] = []
    for call in calls:
        image = call.image
        if image.overwritten():
            raise RuntimeError(
                "tap: image features must stay as they are until the loss is computed, got features that were "
                "overwritten in place; pass a tensor of its own to each decoder call"
            )
        if id(image) not in first_image:
            first_image[id(image)] = sum(len(each.value) for each in maps)
            maps.append(image)
        for tokens, images, reads in _samples(call, groups_are_images):
            rows.append(tokens)
            token_reads += reads
            index.append(first_image[id(image)] + images)
    n_images = sum(len(each.value) for each in maps)
    if len({tuple(each.value.shape[1:]) for each in maps}) > 1:
        raise RuntimeError(
            f"tap: image features of one step must have one size, got {[tuple(each.value.shape) for each in maps]}; "
            "call the loss once per image size"
        )
    image_index = torch.cat(index)
    if not len(image_index):
        raise RuntimeError(
            f"tap: the images of a step must have prompts, got {n_images} images without any; leave the "
            "loss out of such a step, and call clear() on the student's tap"
        )
    one_to_one = torch.equal(image_index, torch.arange(n_images))
    aliases, map_reads = zip(*(read(each.value, each.source) for each in _whole(maps)), strict=True)
    image_features = aliases[0] if len(aliases) == 1 else torch.cat(aliases)
    known = Reads(tuple(each for each in map_reads if each is not None), tuple(token_reads))
    return ReadFeatures(image_features, torch.cat(rows), None if one_to_one else image_index, known)


def _samples(call: DecoderCall, groups_are_images: bool) -> list[tuple[Tensor, Tensor, list[Read]]]:
    """Return the mask tokens ``[s, n, d]`` of each group of a call, the image of each sample, and the reads."""
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
        read_tokens = [read(group[number].value, group[number].source) for number in range(len(group))]
        values = [alias for alias, _ in read_tokens]
        reads = [each for _, each in read_tokens if each is not None]
        tokens = torch.stack([value.flatten(0, -2) for value in values], 1)
        images = torch.full((len(tokens),), number) if looped else _images(values[0], n_images, call.layout)
        keep = None if looped else _true_prompts(call.prompts, tuple(values[0].shape[:-1]))
        if keep is not None:
            tokens, images = tokens[keep.to(tokens.device)], images[keep]
        parts.append((tokens, images, reads))
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


def _whole(maps: list[Held]) -> list[Held]:
    """Return the one map of which these are the consecutive parts, so that it needs no copy; or the maps."""
    if len(maps) == 1:
        return maps
    first = maps[0].value
    whole = first._base
    if whole is None or whole.shape != (sum(len(each.value) for each in maps), *first.shape[1:]):
        return maps
    offset = whole.storage_offset()
    for each in maps:
        part = each.value
        if part._base is not whole or part.storage_offset() != offset or part.stride()[1:] != whole.stride()[1:]:
            return maps
        offset += len(part) * whole.stride(0)
    return [hold(whole)]
