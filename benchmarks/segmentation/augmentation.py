"""Flips and crops of a training image with its mask."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageOps

from benchmarks.sam.data import Change

# Of each side. A smaller crop of one image would show little else than its foreground.
SMALLEST_CROP = 0.7
TRIES = 10
# Of the foreground; less of it would be another object.
KEPT = 0.5


def flipped_and_cropped(rng: np.random.Generator) -> Change:
    """Return a change: flips at even odds along both axes, and a crop that keeps half of the foreground or more.

    The crop keeps the image's aspect, with sides of .7 to 1 of it; where ten crops lose too much, it is left out.
    """

    def change(image: Image.Image, mask: Image.Image) -> tuple[Image.Image, Image.Image]:
        if rng.random() < 0.5:
            image, mask = ImageOps.mirror(image), ImageOps.mirror(mask)
        if rng.random() < 0.5:
            image, mask = ImageOps.flip(image), ImageOps.flip(mask)
        foreground = np.asarray(mask) > 127
        for _ in range(TRIES):
            scale = rng.uniform(SMALLEST_CROP, 1)
            width, height = (max(1, round(scale * side)) for side in image.size)
            left = int(rng.integers(image.width - width + 1))
            top = int(rng.integers(image.height - height + 1))
            if foreground[top : top + height, left : left + width].sum() >= KEPT * foreground.sum():
                box = (left, top, left + width, top + height)
                return image.crop(box), mask.crop(box)
        return image, mask

    return change
