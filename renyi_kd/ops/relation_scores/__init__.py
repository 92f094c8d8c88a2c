"""Score of every pixel for every token and prompt of its image, in one pass over the feature map."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from renyi_kd.ops.dispatch import Impl, resolve
from renyi_kd.ops.relation_scores import reference

# All channels of a pixel must fit in the registers of one program.
MAX_CHANNELS = 4096


def relation_scores(
    image_features: Tensor,
    directions: Tensor,
    image_index: Sequence[int] | None = None,
    *,
    offsets: Tensor | None = None,
    eps: float = 1e-5,
    impl: Impl = "auto",
) -> Tensor:
    """Return the score of every pixel for every sample and token, as :func:`reference.relation_scores` defines it.

    Args:
        image_features: ``[b, d, h, w]``.
        directions: ``[s, n, d]``: one per sample and token.
        image_index: the image of each of the s samples; None when sample i belongs to image i.
        offsets: ``[s, n]``: added to all scores of a sample and token; None for zeros.
        eps: added to the variance.
        impl: which implementation runs.

    Returns:
        ``[s, n, h * w]`` in the dtype of ``directions``.

    """
    if image_index is None:
        return _by_image(image_features, directions, offsets, eps, impl)
    # One product for all images: those with fewer samples than others are filled up with directions of zero.
    n_images, n_tokens = len(image_features), directions.shape[1]
    places = _places(image_index)
    n_places = max(place for _, place in places) + 1
    images, slots = torch.tensor(places, device=directions.device).unbind(1)

    def pad(values: Tensor) -> Tensor:
        zeros = values.new_zeros(n_images, n_places, *values.shape[1:])
        return zeros.index_put((images, slots), values).flatten(1, 2)

    padded = _by_image(image_features, pad(directions), None if offsets is None else pad(offsets), eps, impl)
    return padded.view(n_images, n_places, n_tokens, -1)[images, slots]


def _by_image(image_features: Tensor, directions: Tensor, offsets: Tensor | None, eps: float, impl: Impl) -> Tensor:
    n_channels = image_features.shape[1]
    limits = [f"{n_channels} channels (the kernels take at most {MAX_CHANNELS})"] if n_channels > MAX_CHANNELS else []
    if resolve(impl, image_features, directions, limits=limits) == "triton":
        from renyi_kd.ops.relation_scores import triton

        return triton.relation_scores(image_features, directions, offsets, eps=eps)
    return reference.relation_scores(image_features, directions, offsets, eps=eps)


def _places(image_index: Sequence[int]) -> list[tuple[int, int]]:
    """Return for every sample its image and its number among the samples of that image."""
    counts: dict[int, int] = {}
    places = []
    for image in image_index:
        places.append((image, counts.get(image, 0)))
        counts[image] = places[-1][1] + 1
    return places
