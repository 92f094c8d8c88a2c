"""Score of every pixel for every token and prompt of its image, in one pass over the feature map."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from renyi_kd.ops.dispatch import Impl, resolve
from renyi_kd.ops.prompts import image_index_on, index_on, prompts_of_each
from renyi_kd.ops.relation_scores import reference

# All channels of a direction must fit in the registers of one program.
MAX_CHANNELS = 4096


def relation_scores(
    image_features: Tensor,
    directions: Tensor,
    image_index: Sequence[int] | Tensor | None = None,
    *,
    offsets: Tensor | None = None,
    eps: float = 1e-5,
    impl: Impl = "auto",
) -> Tensor:
    """Return the score of every pixel for every sample and token, as :func:`reference.relation_scores` defines it.

    Args:
        image_features: ``[b, d, h, w]``.
        directions: ``[s, n, d]``: one per sample and token.
        image_index: the image of each of the s samples; None when sample i belongs to image i. A tensor of int32 or
            int64 on the device of the features costs the kernels no copy from the host.
        offsets: ``[s, n]``: added to all scores of a sample and token; None for zeros.
        eps: added to the variance.
        impl: which implementation runs.

    Returns:
        ``[s, n, h * w]`` in the dtype of ``directions``.

    """
    n_channels = image_features.shape[1]
    limits = [f"{n_channels} channels (the kernels take at most {MAX_CHANNELS})"] if n_channels > MAX_CHANNELS else []
    if resolve(impl, image_features, directions, limits=limits) == "triton":
        from renyi_kd.ops.relation_scores import triton

        if image_index is not None and not isinstance(image_index, Tensor):
            image_index = image_index_on(directions.device, tuple(image_index))
        return triton.relation_scores(image_features, directions, offsets, image_index=image_index, eps=eps)
    if image_index is None:
        return reference.relation_scores(image_features, directions, offsets, eps=eps)
    image_index = image_index.tolist() if isinstance(image_index, Tensor) else image_index
    n_images, (n_samples, n_tokens, _) = len(image_features), directions.shape
    n_prompts = prompts_of_each(image_index, n_images)
    if n_prompts is not None:
        # Nothing to sort: the directions of an image lie side by side.
        of_images = None if offsets is None else offsets.reshape(n_images, n_prompts * n_tokens)
        of_each = directions.reshape(n_images, n_prompts * n_tokens, -1)
        scores = reference.relation_scores(image_features, of_each, of_images, eps=eps)
        return scores.reshape(n_samples, n_tokens, -1)
    # One product for all images: those with fewer samples than others are filled up with directions of zero.
    places = _places(image_index)
    n_places = max(place for _, place in places) + 1
    slots = index_on(directions.device, [image * n_places + place for image, place in places])
    padded = directions.new_zeros(n_images * n_places, *directions.shape[1:]).index_copy(0, slots, directions)
    scores = reference.relation_scores(image_features, padded.view(n_images, n_places * n_tokens, -1), eps=eps)
    scores = scores.reshape(n_images * n_places, n_tokens, -1).index_select(0, slots)
    return scores if offsets is None else scores + offsets[..., None]


def _places(image_index: Sequence[int]) -> list[tuple[int, int]]:
    """Return for every sample its image and its number among the samples of that image."""
    counts: dict[int, int] = {}
    places = []
    for image in image_index:
        places.append((image, counts.get(image, 0)))
        counts[image] = places[-1][1] + 1
    return places
