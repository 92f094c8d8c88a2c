r"""What the loss needs of the teacher's map, in one read: the scores of its pixels, and the Gram of its images.

A tile holds a few channels of some pixels of all images, which is enough at a time: for the Gram, as its sum goes over
all of them, and for the scores, as means, variances and products with a direction can be merged. Of one pixel, with n,
mu, v, a, o the number, mean, sum of squared deviations, sum of deviations times w and sum of w of the channels seen,
and n', mu', v', a', o' of those that join them,

    delta = mu' - mu        mu += delta n' / (n + n')        v += v' + delta^2 n n' / (n + n')
    a += a' + delta (n o' - n' o) / (n + n')                 s = a / sqrt(v / d + eps) + c

from deviations alone, so that a large mean costs no digits. Partial Grams in fp32, one per program, to be summed in
fp64; no atomics. A pixel whose channels are all alike has score c. One direction an image; up to 64 images; fp16, bf16,
fp32; any strides. No derivatives.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_IMAGES = 64
# Columns of a tile, and of those the ones side by side in memory, chosen so that nothing spills on any target; not
# measured on a GPU yet.
COLUMNS, RUN = 64, 16
NUM_WARPS = 4
PROGRAMS = 512
# Rounding of fp32: a variance below that of the mean's rounding is none.
_ROUNDING = tl.constexpr(4 * torch.finfo(torch.float32).eps)


@triton.jit
def _teacher_pass_kernel(
    x_ptr, directions_ptr, offsets_ptr, scores_ptr, parts_ptr,
    n_images, n_channels, n_pixels, n_steps, width, eps,
    x_stride_b, x_stride_c, x_stride_h, x_stride_w,
    BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the scores of n_steps tiles of pixels of all images, and the products of the images over them."""
    images = tl.arange(0, BLOCK_B)
    in_b = images < n_images
    image_places = images.to(tl.int64) * x_stride_b
    gram = tl.zeros((BLOCK_B, BLOCK_B), tl.float32)
    for step in range(n_steps):
        pixels = (tl.program_id(0) * n_steps + step) * BLOCK_P + tl.arange(0, BLOCK_P)
        in_p = pixels < n_pixels
        places = (pixels // width).to(tl.int64) * x_stride_h + (pixels % width).to(tl.int64) * x_stride_w
        in_bp = in_b[:, None] & in_p[None, :]
        anchor = tl.zeros((BLOCK_B, BLOCK_P), tl.float32)
        mean = tl.zeros((BLOCK_B, BLOCK_P), tl.float32)
        squares = tl.zeros((BLOCK_B, BLOCK_P), tl.float32)
        along = tl.zeros((BLOCK_B, BLOCK_P), tl.float32)
        direction_sum = tl.zeros((BLOCK_B,), tl.float32)
        for first in range(0, n_channels, BLOCK_C):
            channels = first + tl.arange(0, BLOCK_C)
            in_c = channels < n_channels
            inside = in_bp[:, None, :] & in_c[None, :, None]
            channel_places = channels.to(tl.int64) * x_stride_c
            x = tl.load(
                x_ptr + image_places[:, None, None] + channel_places[None, :, None] + places[None, None, :],
                mask=inside, other=0.0,
            )  # fmt: skip
            rows = tl.reshape(x, (BLOCK_B, BLOCK_C * BLOCK_P))
            gram = tl.dot(rows, tl.trans(rows), gram, input_precision=PRECISION)
            w = tl.load(
                directions_ptr + images[:, None] * n_channels + channels[None, :],
                mask=in_b[:, None] & in_c[None, :], other=0.0,
            )  # fmt: skip
            n_here = tl.minimum(BLOCK_C, n_channels - first)
            y = x.to(tl.float32)
            if first == 0:
                # Of all channels taken off this, the rest of the mean is small and rounds finely.
                anchor = tl.sum(y, 1) / n_here
            y = tl.where(inside, y - anchor[:, None, :], 0.0)
            mean_here = tl.sum(y, 1) / n_here
            y = tl.where(inside, y - mean_here[:, None, :], 0.0)
            direction_sum_here = tl.sum(w, 1)
            delta = (mean_here - mean) / (first + n_here)
            squares += tl.sum(y * y, 1) + delta * (mean_here - mean) * (first * 1.0 * n_here)
            along += tl.sum(y * w[:, :, None], 1)
            along += delta * (first * direction_sum_here - n_here * direction_sum)[:, None]
            mean += delta * n_here
            direction_sum += direction_sum_here
        rounding = _ROUNDING * (anchor + mean)
        variance = squares / n_channels
        rstd = tl.where(variance > rounding * rounding, 1.0 / tl.sqrt(variance + eps), 0.0)
        offsets = tl.load(offsets_ptr + images, mask=in_b, other=0.0)
        scores = rstd * along + offsets[:, None]
        tl.store(scores_ptr + images.to(tl.int64)[:, None] * n_pixels + pixels[None, :], scores, mask=in_bp)
    others = tl.arange(0, BLOCK_B)
    tl.store(
        parts_ptr + (tl.program_id(0).to(tl.int64) * n_images + images[:, None]) * n_images + others[None, :], gram,
        mask=in_b[:, None] & (others < n_images)[None, :],
    )  # fmt: skip


def config(n_images: int, channels_last: bool) -> dict[str, Any]:
    """Return the sizes of a tile, and how fp32 is multiplied: exactly enough for fp32, on tensor cores."""
    block_b = max(16, triton.next_power_of_2(n_images))
    few = block_b == 16
    rest = COLUMNS // RUN if few else COLUMNS // RUN // 2
    block_c, block_p = (RUN, rest) if channels_last else (rest, RUN)
    return {
        "BLOCK_B": block_b, "BLOCK_C": block_c, "BLOCK_P": block_p,
        "PRECISION": "ieee" if torch.version.hip else "tf32x3",
        "num_warps": 2 * NUM_WARPS if block_b == MAX_IMAGES else NUM_WARPS,
    }  # fmt: skip


def launch(image_features: Tensor, directions: Tensor, offsets: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the scores ``[b, h * w]`` along directions ``[b, d]``, and the Gram in parts ``[parts, b, b]``."""
    n_images, n_channels, height, width = image_features.shape
    n_pixels = height * width
    settings = config(n_images, channels_last=image_features.stride(1) == 1)
    n_tiles = triton.cdiv(n_pixels, settings["BLOCK_P"])
    n_steps = triton.cdiv(n_tiles, PROGRAMS)
    n_programs = triton.cdiv(n_tiles, n_steps)
    scores = directions.new_empty(n_images, n_pixels)
    parts = directions.new_empty(n_programs, n_images, n_images)
    with torch.cuda.device_of(image_features):
        _teacher_pass_kernel[(n_programs,)](
            image_features, directions, offsets, scores, parts,
            n_images, n_channels, n_pixels, n_steps, width, eps, *image_features.stride(), **settings,
        )  # fmt: skip
    return scores, parts
