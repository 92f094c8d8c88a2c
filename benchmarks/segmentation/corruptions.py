"""Corrupted copies of test images: four of the fifteen kinds of ImageNet-C, at its severity 3 of 5.

Source: Hendrycks, Dietterich: Benchmarking Neural Network Robustness to Common Corruptions and Perturbations, ICLR
2019, arXiv 1903.12261, for the kinds and the constants of severity 3. They were chosen for photographs of 224 pixels,
and are used here on images of any size.
"""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.sam.data import Change
from benchmarks.segmentation.data import MaskDataset

Corruption = Literal["gaussian_noise", "motion_blur", "contrast", "jpeg"]
CORRUPTIONS: tuple[Corruption, ...] = get_args(Corruption)
# All of severity 3. Noise and contrast are of values in 0..1.
NOISE_DEVIATION = 0.18
BLUR_RADIUS, BLUR_DEVIATION, BLUR_ANGLE = 15, 8.0, 45.0
CONTRAST = 0.2
JPEG_QUALITY = 15

Values = NDArray[np.float64]


class CorruptedDataset(MaskDataset):
    """The images of another set, corrupted; prompts and masks stay those of the clean images.

    Args:
        clean: not of training.
        corruption: which; what is random in it depends on the image's name alone.

    """

    def __init__(self, clean: MaskDataset, corruption: Corruption) -> None:
        # Its files have been looked at already.
        self.__dict__.update(clean.__dict__)
        self.corruption = corruption

    def change(self, sample_id: str) -> Change:
        """Return what corrupts an image."""
        rng = np.random.default_rng(zlib.crc32(f"{self.corruption} {sample_id}".encode()))
        return lambda image, mask: (corrupted(image, self.corruption, rng), mask)


def corrupted(image: Image.Image, corruption: Corruption, rng: np.random.Generator) -> Image.Image:
    """Return a corrupted copy of an RGB image, of its size."""
    if corruption == "jpeg":
        file = io.BytesIO()
        image.save(file, "JPEG", quality=JPEG_QUALITY)
        return Image.open(file).convert("RGB")
    changed = _CHANGES[corruption](np.asarray(image, np.float64) / 255, rng)
    return Image.fromarray((255 * changed.clip(0, 1)).round().astype(np.uint8))


def _gaussian_noise(values: Values, rng: np.random.Generator) -> Values:
    return values + rng.normal(scale=NOISE_DEVIATION, size=values.shape)


def _contrast(values: Values, rng: np.random.Generator) -> Values:
    means = values.mean((0, 1), keepdims=True)
    return CONTRAST * (values - means) + means


def _motion_blur(values: Values, rng: np.random.Generator) -> Values:
    """Return the mean along a line that begins at each pixel, with the weights of half a normal distribution."""
    angle = math.radians(rng.uniform(-BLUR_ANGLE, BLUR_ANGLE))
    reach = 2 * BLUR_RADIUS
    padded = np.pad(values, ((reach, reach), (reach, reach), (0, 0)), "edge")
    blurred, total = np.zeros_like(values), 0.0
    for distance in range(reach + 1):
        weight = math.exp(-(distance**2) / (2 * BLUR_DEVIATION**2))
        top, left = reach + round(distance * math.sin(angle)), reach + round(distance * math.cos(angle))
        blurred += weight * padded[top : top + values.shape[0], left : left + values.shape[1]]
        total += weight
    return blurred / total


_CHANGES: dict[str, Callable[[Values, np.random.Generator], Values]] = {
    "gaussian_noise": _gaussian_noise,
    "contrast": _contrast,
    "motion_blur": _motion_blur,
}
