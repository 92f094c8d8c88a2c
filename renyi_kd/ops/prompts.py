"""Which image each sample belongs to, where an image has several prompts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch._guards import detect_fake_mode


def prompts_of_each(images: Sequence[int], n_images: int) -> int | None:
    """Return how many samples every image has, one image after the other; None where that differs."""
    n_prompts = len(images) // n_images
    if len(images) != n_images * n_prompts:
        return None
    return n_prompts if all(image == sample // n_prompts for sample, image in enumerate(images)) else None


def gram_of_samples(image_gram: Tensor, images: Sequence[int]) -> Tensor:
    """Return the Gram matrix of samples ``[s, s]`` from that of their images."""
    n_images = len(image_gram)
    n_prompts = prompts_of_each(images, n_images)
    if n_prompts is None:
        index = index_on(image_gram.device, images)
        return image_gram[index[:, None], index]
    repeated = image_gram[:, None, :, None].expand(n_images, n_prompts, n_images, n_prompts)
    return repeated.reshape(len(images), len(images))


def index_on(device: torch.device, numbers: Sequence[int]) -> Tensor:
    """Return whole numbers on a device; the host does not wait until a GPU has them."""
    index = torch.tensor(numbers)
    if device.type == "cuda" and not torch.compiler.is_compiling():
        index = index.pin_memory()
    return index.to(device, non_blocking=True)


def image_index_on(device: torch.device, images: tuple[int, ...]) -> Tensor:
    """Return the image of each sample on a device, copied there once: batches of a training repeat a few of them."""
    # Who follows operations has tensors that are none of later steps.
    if torch.compiler.is_compiling() or detect_fake_mode() is not None:
        return index_on(device, images)
    return _kept_index(device, images)


@lru_cache(256)
def _kept_index(device: torch.device, images: tuple[int, ...]) -> Tensor:
    # Where validation comes first, training saves it for its backward all the same.
    with torch.inference_mode(False):
        return index_on(device, images)
