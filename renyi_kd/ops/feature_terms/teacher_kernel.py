r"""What the loss needs of the teacher's map, in one read: scores and statistics of its pixels, and the Gram of samples.

A tile holds a run of neighbours, pixels or channels, of all samples at some places of the other kind. The Gram sums the
products of all its elements. For the scores, deviations from an anchor, their squares and their products with the
directions are summed element by element of the tile, and over its channels once, after the last:

    y = x - anchor        mean = anchor + sum(y) / d        var = sum(y^2) / d - (sum(y) / d)^2
    s = sum(y (w - mean(w))) / sqrt(var + eps) + c

The anchor is the mean of the first channels. If it is off by a, the variance is at least a^2 times their share of all
channels, so that a large mean costs no digits. A pixel whose channels are all alike has score c.

The Gram takes tensor cores (``ops/row_products.py``). Its parts are in fp32, one per program, to be summed in fp64; no
atomics. One direction a sample; up to 64 samples, of as many images or fewer; fp16, bf16, fp32; any strides. No
derivatives.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from renyi_kd.ops.launches import device_of, launcher
from renyi_kd.ops.pixels import channel_places, pixel_places, pixels_of
from renyi_kd.ops.row_products import (
    ELEMENTS,
    MAX_ROWS,
    add_products,
    gram_of_products,
    no_products,
    tile_of_rows,
)
from renyi_kd.ops.tiles import cdiv, next_power_of_2

MAX_IMAGES = MAX_ROWS
PROGRAMS = 256
# Channels whose mean is the anchor, at least.
_ANCHOR = tl.constexpr(16)
# Rounding of fp32: a variance below that of the mean's rounding is none.
_ROUNDING = tl.constexpr(4 * torch.finfo(torch.float32).eps)


@triton.jit(
    do_not_specialize=["n_samples", "n_units", "n_steps", "width"],
    do_not_specialize_on_alignment=["index_ptr", "offsets_ptr"],
)
def _teacher_pass_kernel(
    x_ptr, index_ptr, directions_ptr, offsets_ptr, scores_ptr, statistics_ptr, parts_ptr,
    n_samples, n_channels, n_units, n_steps, width, eps,
    x_stride_b, x_stride_c, x_stride_h, x_stride_w,
    BLOCK_L: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_W: tl.constexpr, BATCH: tl.constexpr,
    EVEN: tl.constexpr, SPLIT: tl.constexpr,
    UNIT: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr, MERGED: tl.constexpr,
):  # fmt: skip
    """Write the scores and statistics of n_steps tiles of pixels of all samples, and the products of the samples."""
    # Places of a tile are [BLOCK_L, BLOCK_B, BLOCK_K]; the last are neighbours.
    BLOCK_C: tl.constexpr = BLOCK_K if CHANNELS_LAST else BLOCK_L
    BLOCK_P: tl.constexpr = BLOCK_L if CHANNELS_LAST else BLOCK_K
    AXIS: tl.constexpr = 2 if CHANNELS_LAST else 0
    n_pixels = n_units * UNIT
    samples = tl.arange(0, BLOCK_B)
    in_b = samples < n_samples
    if index_ptr is None:
        images = samples.to(tl.int64)
    else:
        images = tl.load(index_ptr + samples, mask=in_b, other=0).to(tl.int64)
    image_places = tl.multiple_of(images * x_stride_b, [ALIGN])
    tile_channels = tl.arange(0, BLOCK_C)

    many_channels = tl.arange(0, BLOCK_W)
    w_ptr = directions_ptr + samples[:, None] * n_channels + many_channels[None, :]
    w_mean = tl.zeros((BLOCK_B, BLOCK_W), tl.float32)
    for first in range(0, n_channels, BLOCK_W):
        in_w = in_b[:, None] & (first + many_channels < n_channels)[None, :]
        w_mean += tl.load(w_ptr + first, mask=in_w, other=0.0)
    w_mean = tl.sum(w_mean, 1) / n_channels
    # Rounding leaves the directions a mean all the same.
    w_rest = tl.zeros((BLOCK_B, BLOCK_W), tl.float32)
    for first in range(0, n_channels, BLOCK_W):
        in_w = in_b[:, None] & (first + many_channels < n_channels)[None, :]
        w_rest += tl.where(in_w, tl.load(w_ptr + first, mask=in_w, other=0.0) - w_mean[:, None], 0.0)
    w_rest = tl.sum(w_rest, 1)
    offsets = tl.load(offsets_ptr + samples, mask=in_b, other=0.0)

    high = no_products(BLOCK_L, BLOCK_B, BATCH)
    mixed = no_products(BLOCK_L, BLOCK_B, BATCH)
    for step in range(n_steps):
        pixels = (tl.program_id(0) * n_steps + step) * BLOCK_P + tl.arange(0, BLOCK_P)
        in_p = pixels < n_pixels
        places = pixel_places(pixels, width, x_stride_h, x_stride_w, CHANNELS_LAST, ALIGN, MERGED)
        steps = channel_places(tile_channels, x_stride_c, CHANNELS_LAST, ALIGN)
        if CHANNELS_LAST:
            in_bp = in_p[:, None, None] & in_b[None, :, None]
            tile_ptr = x_ptr + (image_places[None, :, None] + places[:, None, None] + steps[None, None, :])
        else:
            in_bp = in_b[None, :, None] & in_p[None, None, :]
            tile_ptr = x_ptr + (image_places[None, :, None] + steps[:, None, None] + places[None, None, :])

        first_sum = tl.zeros((BLOCK_L, BLOCK_B, BLOCK_K), tl.float32)
        for first in tl.static_range(0, max(_ANCHOR, BLOCK_C), BLOCK_C):
            in_c = first + tile_channels < n_channels
            in_c = in_c[None, None, :] if CHANNELS_LAST else in_c[:, None, None]
            first_ptr = tile_ptr + tl.cast(x_stride_c, tl.int64) * first
            first_sum += tl.load(first_ptr, mask=in_bp & in_c, other=0.0).to(tl.float32)
        anchor = tl.sum(first_sum, AXIS, keep_dims=True) / tl.minimum(max(_ANCHOR, BLOCK_C), n_channels)

        deviations = tl.zeros((BLOCK_L, BLOCK_B, BLOCK_K), tl.float32)
        squares = tl.zeros((BLOCK_L, BLOCK_B, BLOCK_K), tl.float32)
        products = tl.zeros((BLOCK_L, BLOCK_B, BLOCK_K), tl.float32)
        for first in range(0, n_channels, BLOCK_C):
            channels = first + tile_channels
            if CHANNELS_LAST:
                in_c = (channels < n_channels)[None, None, :]
                channel_ptr = directions_ptr + samples[None, :, None] * n_channels + channels[None, None, :]
            else:
                in_c = (channels < n_channels)[:, None, None]
                channel_ptr = directions_ptr + samples[None, :, None] * n_channels + channels[:, None, None]
            x = tl.load(tile_ptr, mask=in_bp if EVEN else in_bp & in_c, other=0.0)
            in_w = in_b[None, :, None] if EVEN else in_b[None, :, None] & in_c
            w = tl.load(channel_ptr, mask=in_w, other=0.0) - w_mean[None, :, None]
            high, mixed = add_products(x, high, mixed, BATCH, SPLIT)
            y = x.to(tl.float32) - anchor
            if not EVEN:
                y = tl.where(in_c, y, 0.0)
            deviations += y
            squares += y * y
            products += y * w
            tile_ptr += tl.cast(x_stride_c, tl.int64) * BLOCK_C

        off = tl.sum(deviations, AXIS) / n_channels
        variance = tl.sum(squares, AXIS) / n_channels - off * off
        mean = tl.sum(anchor, AXIS) + off
        rounding = _ROUNDING * mean
        rstd = tl.where(variance > rounding * rounding, tl.sqrt(1.0 / (variance + eps)), 0.0)
        scores = tl.sum(products, AXIS)
        if CHANNELS_LAST:
            scores = (scores - off * w_rest[None, :]) * rstd + offsets[None, :]
            rows, columns, inside = samples[None, :], pixels[:, None], in_p[:, None] & in_b[None, :]
        else:
            scores = (scores - off * w_rest[:, None]) * rstd + offsets[:, None]
            rows, columns, inside = samples[:, None], pixels[None, :], in_b[:, None] & in_p[None, :]
        rows = rows.to(tl.int64) * n_pixels
        tl.store(scores_ptr + rows + columns, scores, mask=inside)
        if statistics_ptr is not None:
            tl.store(statistics_ptr + 2 * rows + columns, mean, mask=inside)
            tl.store(statistics_ptr + 2 * rows + n_pixels + columns, rstd, mask=inside)

    gram = gram_of_products(high, mixed, BLOCK_L, BLOCK_B, BATCH)
    others = tl.arange(0, BLOCK_B)
    tl.store(
        parts_ptr + (tl.program_id(0).to(tl.int64) * n_samples + samples[:, None]) * n_samples + others[None, :], gram,
        mask=in_b[:, None] & (others < n_samples)[None, :],
    )  # fmt: skip


def config(
    n_samples: int, n_channels: int, dtype: torch.dtype, device: torch.device, channels_last: bool
) -> dict[str, Any]:
    """Return the sizes of a tile, and how it is multiplied."""
    tile = tile_of_rows(n_samples, dtype, device)
    block_c = tile["BLOCK_K"] if channels_last else tile["BLOCK_L"]
    block_w = min(ELEMENTS // tile["BLOCK_B"], next_power_of_2(n_channels))
    if channels_last and dtype != torch.float32:
        if tile["BLOCK_B"] == 4:
            # A third tile on its way spills on sm_120.
            tile["num_stages"] = 2
        elif tile["BATCH"] > 0:
            # Eight warps spill on sm_100.
            tile |= {name: tile[name] // 2 for name in ("BLOCK_L", "BATCH", "num_warps")}
    return {**tile, "BLOCK_W": block_w, "EVEN": n_channels % block_c == 0}


def launch(
    image_features: Tensor,
    directions: Tensor,
    offsets: Tensor,
    eps: float,
    statistics: Tensor | None = None,
    image_index: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the scores ``[s, h * w]``, and the Gram in parts ``[parts, s, s]``; write the statistics, if wanted.

    Args:
        image_features: ``[b, d, h, w]``.
        directions: ``[s, d]`` or ``[s, 1, d]``, contiguous.
        offsets: s of them.
        eps: added to the variance.
        statistics: ``[s, 2, h * w]``, for mean and rstd.
        image_index: ``[s]``, int32 or int64, on the device; None where sample i is of image i.

    """
    pixels = pixels_of(image_features)
    n_samples, n_channels = len(directions), directions.shape[-1]
    n_pixels = pixels.n_units * pixels.unit
    settings = config(n_samples, n_channels, image_features.dtype, device_of(image_features), pixels.channels_last)
    n_tiles = cdiv(n_pixels, settings["BLOCK_L"] if pixels.channels_last else settings["BLOCK_K"])
    n_steps = cdiv(n_tiles, PROGRAMS)
    n_programs = cdiv(n_tiles, n_steps)
    scores = directions.new_empty(n_samples, n_pixels)
    parts = directions.new_empty(n_programs, n_samples, n_samples)
    with torch.cuda.device_of(image_features):
        launcher(_teacher_pass_kernel, (n_programs,))(
            image_features, image_index, directions, offsets, scores, statistics, parts,
            n_samples, n_channels, pixels.n_units, n_steps, pixels.width, eps, *pixels.strides, **settings,
            UNIT=pixels.unit, CHANNELS_LAST=pixels.channels_last, ALIGN=pixels.align, MERGED=pixels.merged,
        )  # fmt: skip
    return scores, parts
