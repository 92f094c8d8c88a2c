"""Where the pixels of a map lie: what the kernels that read one take, and how they find a pixel."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

# No access is wider than this many elements.
_WIDEST = 16


class Pixels(NamedTuple):
    """The pixels of maps as kernels take them.

    Attributes:
        n_units: their number, in units of ``unit``: a multiple of more than 1 can be read in vectors.
        unit: up to 16.
        width: of a row of the map.
        strides: of image, channel, row and column, in elements.
        channels_last: whether the channels of a pixel are neighbours.
        align: divides the distance from one run of neighbours to the next, up to 16.
        merged: whether rows follow each other without a gap, which spares the division by the width.

    """

    n_units: int
    unit: int
    width: int
    strides: tuple[int, int, int, int]
    channels_last: bool
    align: int
    merged: bool


def pixels_of(image_features: Tensor) -> Pixels:
    """Return how a map's pixels lie."""
    _, _, height, width = image_features.shape
    stride_b, stride_c, stride_h, stride_w = image_features.stride()
    if width == 1:
        # The next column would be the next row.
        stride_w = stride_h
    merged = height == 1 or stride_h == width * stride_w
    channels_last = stride_c == 1
    runs = [stride_b, stride_w if channels_last else stride_c, *([] if merged else [stride_h])]
    unit = _divisor(height * width)
    return Pixels(
        height * width // unit,
        unit,
        width,
        (stride_b, stride_c, stride_h, stride_w),
        channels_last,
        min(map(_divisor, runs)),
        merged,
    )


def _divisor(size: int) -> int:
    """Return the largest power of two that divides ``size``, up to the widest access."""
    return min(size & -size, _WIDEST) if size else _WIDEST


@triton.jit
def channel_places(channels, stride_c, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr):
    """Return the places of channels in an image, with what the compiler cannot know of them."""
    return channels.to(tl.int64) if CHANNELS_LAST else tl.multiple_of(channels.to(tl.int64) * stride_c, [ALIGN])


@triton.jit
def pixel_places(
    pixels, width, stride_h, stride_w, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr, MERGED: tl.constexpr
):
    """Return the places of pixels in a channel, likewise."""
    if MERGED:
        places = pixels.to(tl.int64) * stride_w
    else:
        places = (pixels // width).to(tl.int64) * stride_h + (pixels % width).to(tl.int64) * stride_w
    if CHANNELS_LAST:
        places = tl.multiple_of(places, [ALIGN])
    return places
