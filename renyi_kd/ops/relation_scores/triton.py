r"""Scores of layer-normalised pixels in one read of the map; backward in one read and one write.

    s_jp = rstd_p (x_p - mean_p) . w_j + c_j
    G_p = sum_j g_jp (w_j - mean(w_j))          dx_p = rstd_p G_p - (x_p - mean_p) rstd_p^2 / d sum_j g_jp (s_jp - c_j)
    dw_j = sum_p g_jp rstd_p (x_p - mean_p)          dc_j = sum_p g_jp

The forward walks through the channels of a tile of pixels and sums, element by element of the tile, deviations from an
anchor, their squares and their products with the directions; the tile is summed over its channels once, at the end.
The anchor is the mean of the first channels. If it is off by a, the variance is at least a^2 times their share of all
channels, so that a large mean costs no digits. Directions are centred before they are multiplied. Mean and rstd of
each pixel are kept, 8 bytes, and with them and the scores the backward needs no sum over channels: its tiles are as
wide as memory likes them.

The sums over pixels go to rows of partial sums, one per stretch of pixels, added up afterwards: no atomics, so results
repeat bit for bit. Extra memory: mean and rstd of each pixel of a sample; partial sums, at most about ``PROGRAMS`` rows
of d + 1 numbers, or one per direction. A pixel whose channels are all alike has score c and gradient 0.

Several samples can be of one image: their index stays on the device, in any order. The forward reads an image once per
sample; the backward reads it once and writes its gradient once, summed over its samples from the first to the last.

fp16, bf16, fp32, summed in fp32; any strides, any sizes >= 1. First derivatives only.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from renyi_kd.ops.autograd import second_derivative_refusal
from renyi_kd.ops.launches import launcher
from renyi_kd.ops.pixels import Pixels, channel_places, pixel_places, pixels_of
from renyi_kd.ops.tiles import cdiv, next_power_of_2

# Channels and pixels of a tile, chosen so that nothing spills on any target; not measured on a GPU yet.
FORWARD_CHANNELS, FORWARD_PIXELS = 32, 64
BACKWARD_CHANNELS, BACKWARD_PIXELS = 128, 32
# Directions of a sample at a time.
TOKENS = 4
NUM_WARPS = 4
# Channels above which the mean of a direction takes the registers of more warps in the backward.
LONG_DIRECTION = 1024
# Programs of the backward, at least where there are as many tiles: what it takes to fill the largest GPUs.
PROGRAMS = 1024
# Samples whose image is looked up at a time.
_LOOK_UP = tl.constexpr(256)
# Rounding of fp32: a variance below that of the mean's rounding is none.
_ROUNDING = tl.constexpr(4 * torch.finfo(torch.float32).eps)
# What changes with the batch or the map alone and needs no kernel of its own.
_VARYING = ["n_samples", "n_units", "n_steps", "n_parts", "width"]
# Parts of larger tensors, which begin anywhere.
_UNALIGNED = ["index_ptr", "offsets_ptr", "partial_ptr"]


@triton.jit
def image_of(index_ptr, sample):
    """Return the image of a sample."""
    return sample.to(tl.int64) if index_ptr is None else tl.load(index_ptr + sample).to(tl.int64)


@triton.jit
def next_sample(index_ptr, image, after, n_samples):
    """Return the first sample of an image after another; n_samples if there is none."""
    found = n_samples
    for first in range(0, n_samples, _LOOK_UP):
        samples = first + tl.arange(0, _LOOK_UP)
        images = tl.load(index_ptr + samples, mask=samples < n_samples, other=-1)
        found = tl.minimum(found, tl.min(tl.where((images == image) & (samples > after), samples, n_samples), 0))
    return found


@triton.jit
def mean_of_direction(directions_ptr, row, n_channels, BLOCK_D: tl.constexpr):
    """Return the mean of a direction."""
    channels = tl.arange(0, BLOCK_D)
    return tl.sum(tl.load(directions_ptr + row * n_channels + channels, mask=channels < n_channels, other=0.0), 0) / (
        n_channels
    )


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_UNALIGNED)
def _relation_scores_fwd_kernel(
    x_ptr, index_ptr, directions_ptr, offsets_ptr, scores_ptr, statistics_ptr,
    n_units, n_tokens, n_channels, width, eps,
    x_stride_b, x_stride_c, x_stride_h, x_stride_w,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, EVEN: tl.constexpr,
    UNIT: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr, MERGED: tl.constexpr,
):  # fmt: skip
    """Write the scores of one tile of pixels along BLOCK_T directions of a sample, and the statistics of the pixels."""
    n_pixels = n_units * UNIT
    n_tiles = tl.cdiv(n_pixels, BLOCK_P)
    n_groups = tl.cdiv(n_tokens, BLOCK_T)
    sample = tl.program_id(0) // (n_tiles * n_groups)
    group = tl.program_id(0) // n_tiles % n_groups
    pixels = (tl.program_id(0) % n_tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
    in_p = pixels < n_pixels
    tokens = group * BLOCK_T + tl.arange(0, BLOCK_T)
    in_t = tokens < n_tokens
    rows = sample.to(tl.int64) * n_tokens + tokens

    every_channel = tl.arange(0, BLOCK_D)
    in_directions = in_t[:, None] & (every_channel < n_channels)[None, :]
    whole = tl.load(directions_ptr + rows[:, None] * n_channels + every_channel[None, :], mask=in_directions, other=0.0)
    w_mean = tl.sum(whole, 1) / n_channels
    # Rounding leaves the directions a mean all the same.
    w_rest = tl.sum(tl.where(in_directions, whole - w_mean[:, None], 0.0), 1)

    channels = tl.arange(0, BLOCK_C)
    in_c = channels < n_channels
    image_ptr = x_ptr + tl.multiple_of(image_of(index_ptr, sample) * x_stride_b, [ALIGN])
    tile_ptr = (
        image_ptr
        + channel_places(channels, x_stride_c, CHANNELS_LAST, ALIGN)[None, :, None]
        + pixel_places(pixels, width, x_stride_h, x_stride_w, CHANNELS_LAST, ALIGN, MERGED)[None, None, :]
    )
    w_ptr = directions_ptr + rows[:, None, None] * n_channels + channels[None, :, None]
    inside = in_p[None, None, :] if EVEN else in_c[None, :, None] & in_p[None, None, :]
    x = tl.load(tile_ptr, mask=inside, other=0.0).to(tl.float32)
    anchor = tl.sum(x, 1) / tl.minimum(BLOCK_C, n_channels)
    deviations = tl.zeros((1, BLOCK_C, BLOCK_P), tl.float32)
    squares = tl.zeros((1, BLOCK_C, BLOCK_P), tl.float32)
    products = tl.zeros((BLOCK_T, BLOCK_C, BLOCK_P), tl.float32)
    for first in range(0, n_channels, BLOCK_C):
        in_c = first + channels < n_channels
        inside = in_p[None, None, :] if EVEN else in_c[None, :, None] & in_p[None, None, :]
        x = tl.load(tile_ptr, mask=inside, other=0.0).to(tl.float32)
        in_w = in_t[:, None, None] if EVEN else in_t[:, None, None] & in_c[None, :, None]
        w = tl.load(w_ptr, mask=in_w, other=0.0) - w_mean[:, None, None]
        y = x - anchor[:, None, :]
        if not EVEN:
            y = tl.where(in_c[None, :, None], y, 0.0)
        deviations += y
        squares += y * y
        products += y * w
        tile_ptr += tl.cast(x_stride_c, tl.int64) * BLOCK_C
        w_ptr += BLOCK_C

    off = tl.sum(deviations, 1) / n_channels
    variance = tl.sum(squares, 1) / n_channels - off * off
    mean = anchor + off
    rounding = _ROUNDING * mean
    rstd = tl.where(variance > rounding * rounding, tl.sqrt(1.0 / (variance + eps)), 0.0)
    scores = (tl.sum(products, 1) - off * w_rest[:, None]) * rstd
    if offsets_ptr is not None:
        scores += tl.load(offsets_ptr + rows, mask=in_t, other=0.0)[:, None]
    tl.store(scores_ptr + rows[:, None] * n_pixels + pixels[None, :], scores, mask=in_t[:, None] & in_p[None, :])
    # Nested: the compiler must not see the pointer where there is none.
    if statistics_ptr is not None:  # noqa: SIM102
        if group == 0:
            kept_ptr = statistics_ptr + sample.to(tl.int64) * 2 * n_pixels + pixels[None, :]
            tl.store(kept_ptr, mean, mask=in_p[None, :])
            tl.store(kept_ptr + n_pixels, rstd, mask=in_p[None, :])


@triton.jit
def _pixel_weights(
    offsets_ptr, scores_ptr, statistics_ptr, grad_scores_ptr, sample, row, pixels, n_pixels, n_channels,
    NEEDS_X: tl.constexpr,
):  # fmt: skip
    """Return g, the mean, a = g rstd and b = -a rstd (s - c) / d of pixels: dx = sum a v + b (x - mean)."""
    in_p = pixels < n_pixels
    kept_ptr = statistics_ptr + sample.to(tl.int64) * 2 * n_pixels + pixels
    mean = tl.load(kept_ptr, mask=in_p, other=0.0)
    rstd = tl.load(kept_ptr + n_pixels, mask=in_p, other=0.0)
    g = tl.load(grad_scores_ptr + row * n_pixels + pixels, mask=in_p, other=0.0)
    a = g * rstd
    b = a
    if NEEDS_X:
        s = tl.load(scores_ptr + row * n_pixels + pixels, mask=in_p, other=0.0)
        if offsets_ptr is not None:
            s -= tl.load(offsets_ptr + row)
        b = s * a * rstd * (-1.0 / n_channels)
    return g, mean, a, b


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_UNALIGNED)
def _relation_scores_bwd_kernel(
    x_ptr, index_ptr, directions_ptr, offsets_ptr, scores_ptr, statistics_ptr, grad_scores_ptr, grad_x_ptr, partial_ptr,
    n_samples, n_units, n_tokens, n_channels, n_steps, n_parts, width,
    x_stride_b, x_stride_c, x_stride_h, x_stride_w, grad_stride_b, grad_stride_c, grad_stride_h, grad_stride_w,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr, MERGED: tl.constexpr,
    GRAD_CHANNELS_LAST: tl.constexpr, GRAD_ALIGN: tl.constexpr, GRAD_MERGED: tl.constexpr,
    ONE_ROW: tl.constexpr,
):  # fmt: skip
    """Write the gradient of BLOCK_C channels over n_steps tiles of pixels, and one row of sums over them per direction.

    A program is of an image where its gradient is needed, and of a sample elsewhere. ONE_ROW says that there is one
    direction for it: then sums stay in registers until the last tile.
    """
    NEEDS_X: tl.constexpr = grad_x_ptr is not None
    BY_IMAGE: tl.constexpr = NEEDS_X and index_ptr is not None
    n_pixels = n_units * UNIT
    n_blocks = tl.cdiv(n_channels, BLOCK_C)
    part = tl.program_id(0) % n_parts
    block = tl.program_id(0) // n_parts % n_blocks
    unit = tl.program_id(0) // (n_parts * n_blocks)
    channels = block * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = channels < n_channels
    image = unit.to(tl.int64) if BY_IMAGE else image_of(index_ptr, unit)
    tile_ptr = (
        x_ptr
        + tl.multiple_of(image * x_stride_b, [ALIGN])
        + channel_places(channels, x_stride_c, CHANNELS_LAST, ALIGN)[:, None]
    )
    if NEEDS_X:
        grad_tile_ptr = (
            grad_x_ptr
            + tl.multiple_of(image * grad_stride_b, [GRAD_ALIGN])
            + channel_places(channels, grad_stride_c, GRAD_CHANNELS_LAST, GRAD_ALIGN)[:, None]
        )
    if ONE_ROW:
        row = unit.to(tl.int64)
        sums = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
        total = tl.zeros((BLOCK_P,), tl.float32)
        if NEEDS_X:
            v = tl.load(directions_ptr + row * n_channels + channels, mask=in_c, other=0.0)
            v -= mean_of_direction(directions_ptr, row, n_channels, BLOCK_D)
    for step in range(n_steps):
        pixels = (part * n_steps + step) * BLOCK_P + tl.arange(0, BLOCK_P)
        in_p = pixels < n_pixels
        inside = in_c[:, None] & in_p[None, :]
        places = pixel_places(pixels, width, x_stride_h, x_stride_w, CHANNELS_LAST, ALIGN, MERGED)
        x = tl.load(tile_ptr + places[None, :], mask=inside, other=0.0).to(tl.float32)
        if ONE_ROW:
            g, mean, a, b = _pixel_weights(
                offsets_ptr, scores_ptr, statistics_ptr, grad_scores_ptr, unit, row, pixels, n_pixels, n_channels,
                NEEDS_X,
            )  # fmt: skip
            y = x - mean[None, :]
            sums += y * a[None, :]
            total += g
            if NEEDS_X:
                grad = y * b[None, :] + v[:, None] * a[None, :]
        else:
            grad = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
            sample = next_sample(index_ptr, unit, -1, n_samples) if BY_IMAGE else unit
            while sample < n_samples:
                for token in range(n_tokens):
                    row = sample.to(tl.int64) * n_tokens + token
                    g, mean, a, b = _pixel_weights(
                        offsets_ptr, scores_ptr, statistics_ptr, grad_scores_ptr, sample, row, pixels, n_pixels,
                        n_channels, NEEDS_X,
                    )  # fmt: skip
                    y = x - mean[None, :]
                    if NEEDS_X:
                        v = tl.load(directions_ptr + row * n_channels + channels, mask=in_c, other=0.0)
                        v -= mean_of_direction(directions_ptr, row, n_channels, BLOCK_D)
                        grad += y * b[None, :] + v[:, None] * a[None, :]
                    if partial_ptr is not None:
                        row_ptr = partial_ptr + (row * n_parts + part) * (n_channels + 1)
                        sums, total = tl.sum(y * a[None, :], 1), tl.sum(g, 0)
                        # The row is this program's own; its first tile finds nothing there.
                        if step > 0:
                            sums += tl.load(row_ptr + channels, mask=in_c, other=0.0)
                            total += tl.load(row_ptr + n_channels, mask=block == 0, other=0.0)
                        tl.store(row_ptr + channels, sums, mask=in_c)
                        tl.store(row_ptr + n_channels, total, mask=block == 0)
                        # The threads that read the row at the next tile may not be those that wrote it.
                        tl.debug_barrier()
                sample = next_sample(index_ptr, unit, sample, n_samples) if BY_IMAGE else n_samples
        if NEEDS_X:
            places = pixel_places(
                pixels, width, grad_stride_h, grad_stride_w, GRAD_CHANNELS_LAST, GRAD_ALIGN, GRAD_MERGED
            )
            tl.store(grad_tile_ptr + places[None, :], grad.to(grad_x_ptr.dtype.element_ty), mask=inside)
    if ONE_ROW and partial_ptr is not None:
        row_ptr = partial_ptr + (row * n_parts + part) * (n_channels + 1)
        tl.store(row_ptr + channels, tl.sum(sums, 1), mask=in_c)
        tl.store(row_ptr + n_channels, tl.sum(total, 0), mask=block == 0)


def forward_tile(n_channels: int, n_tokens: int) -> dict[str, Any]:
    """Return the sizes of the forward's tile, and whether its channels are those of the map."""
    block_c = min(FORWARD_CHANNELS, next_power_of_2(n_channels))
    return {
        "BLOCK_T": min(TOKENS, next_power_of_2(n_tokens)),
        "BLOCK_C": block_c,
        "BLOCK_P": FORWARD_PIXELS,
        "BLOCK_D": next_power_of_2(n_channels),
        "EVEN": n_channels % block_c == 0,
    }


def backward_tile(n_channels: int) -> dict[str, int]:
    """Return the sizes of the backward's tile: of few channels it has more pixels."""
    block_c = min(BACKWARD_CHANNELS, next_power_of_2(n_channels))
    return {"BLOCK_C": block_c, "BLOCK_P": min(BACKWARD_CHANNELS * BACKWARD_PIXELS // block_c, 128)}


def _constants(pixels: Pixels, prefix: str = "") -> dict[str, Any]:
    names = {"CHANNELS_LAST": pixels.channels_last, "ALIGN": pixels.align, "MERGED": pixels.merged}
    return {prefix + name: value for name, value in names.items()}


def empty_statistics(image_features: Tensor, n_samples: int) -> Tensor:
    """Return room for mean and rstd of the pixels of each sample: ``[n_samples, 2, h * w]``."""
    return image_features.new_empty(n_samples, 2, image_features.shape[2:].numel(), dtype=torch.float32)


def launch_forward(
    image_features: Tensor,
    directions: Tensor,
    offsets: Tensor | None,
    eps: float,
    statistics: Tensor | None = None,
    image_index: Tensor | None = None,
) -> Tensor:
    """Return the scores ``[s, n, h * w]`` and write the statistics, if wanted, by one launch.

    Args:
        image_features: ``[b, d, h, w]``.
        directions: ``[s, n, d]``, contiguous.
        offsets: ``[s, n]``, contiguous, or none.
        eps: added to the variance.
        statistics: as :func:`empty_statistics` has it.
        image_index: ``[s]``, int32 or int64, on the device; None where sample i is of image i.

    """
    pixels = pixels_of(image_features)
    n_samples, n_tokens, n_channels = directions.shape
    n_pixels = pixels.n_units * pixels.unit
    scores = directions.new_empty(n_samples, n_tokens, n_pixels)
    tile = forward_tile(n_channels, n_tokens)
    n_programs = n_samples * cdiv(n_tokens, tile["BLOCK_T"]) * cdiv(n_pixels, tile["BLOCK_P"])
    with torch.cuda.device_of(image_features):
        launcher(_relation_scores_fwd_kernel, (n_programs,))(
            image_features, image_index, directions, offsets, scores, statistics,
            pixels.n_units, n_tokens, n_channels, pixels.width, eps, *pixels.strides,
            **tile, UNIT=pixels.unit, **_constants(pixels), num_warps=NUM_WARPS,
        )  # fmt: skip
    return scores


def empty_sums(image_features: Tensor, n_rows: int) -> Tensor:
    """Return room for what the programs of a backward sum up: ``[n_rows, parts, d + 1]``, offsets last."""
    n_images, n_channels, height, width = image_features.shape
    tile = backward_tile(n_channels)
    n_tiles, n_blocks = cdiv(height * width, tile["BLOCK_P"]), cdiv(n_channels, tile["BLOCK_C"])
    n_steps = cdiv(n_tiles, cdiv(PROGRAMS, n_images * n_blocks))
    return image_features.new_empty(n_rows, cdiv(n_tiles, n_steps), n_channels + 1, dtype=torch.float32)


def launch_backward(
    image_features: Tensor,
    directions: Tensor,
    offsets: Tensor | None,
    scores: Tensor,
    statistics: Tensor,
    grad_scores: Tensor,
    grad_features: Tensor | None,
    sums: Tensor | None,
    image_index: Tensor | None = None,
) -> None:
    """Write the gradient of the map, and a row of sums per direction and part, by one launch; None: not needed."""
    pixels = pixels_of(image_features)
    grad_pixels = pixels if grad_features is None else pixels_of(grad_features)
    n_samples, n_tokens, n_channels = directions.shape
    tile = backward_tile(n_channels)
    n_tiles = cdiv(pixels.n_units * pixels.unit, tile["BLOCK_P"])
    n_parts = n_tiles if sums is None else sums.shape[1]
    n_owners = n_samples if grad_features is None else len(image_features)
    with torch.cuda.device_of(image_features):
        launcher(_relation_scores_bwd_kernel, (n_owners * cdiv(n_channels, tile["BLOCK_C"]) * n_parts,))(
            image_features, image_index, directions, offsets, scores, statistics, grad_scores, grad_features, sums,
            n_samples, pixels.n_units, n_tokens, n_channels, cdiv(n_tiles, n_parts), n_parts, pixels.width,
            *pixels.strides, *grad_pixels.strides,
            **tile, BLOCK_D=next_power_of_2(n_channels), UNIT=pixels.unit,
            **_constants(pixels), **_constants(grad_pixels, "GRAD_"),
            ONE_ROW=n_tokens == 1 and (image_index is None or grad_features is None),
            num_warps=NUM_WARPS if n_channels <= LONG_DIRECTION else 2 * NUM_WARPS,
        )  # fmt: skip


@torch.library.custom_op("renyi_kd::relation_scores", mutates_args=())
def _forward(
    image_features: Tensor,
    directions: Tensor,
    offsets: Tensor | None,
    image_index: Tensor | None,
    eps: float,
    keeps_statistics: bool,
) -> tuple[Tensor, Tensor]:
    """Return the scores, and what the backward needs of the pixels; empty if not needed."""
    statistics = empty_statistics(image_features, len(directions)) if keeps_statistics else None
    scores = launch_forward(image_features, directions, offsets, eps, statistics, image_index)
    return scores, directions.new_empty(0, 2, 0) if statistics is None else statistics


@_forward.register_fake
def _(image_features: Tensor, directions: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    *_rest, keeps_statistics = rest
    _, _, height, width = image_features.shape
    kept = empty_statistics(image_features, len(directions)) if keeps_statistics else directions.new_empty(0, 2, 0)
    return directions.new_empty(*directions.shape[:2], height * width), kept


@torch.library.custom_op("renyi_kd::relation_scores_backward", mutates_args=())
def _backward(
    image_features: Tensor,
    directions: Tensor,
    offsets: Tensor | None,
    image_index: Tensor | None,
    scores: Tensor,
    statistics: Tensor,
    grad_scores: Tensor,
    needs_features: bool,
    needs_directions: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gradient of the map, and those of each direction and offset side by side; empty if not needed."""
    grad_features = torch.empty_like(image_features) if needs_features else None
    shape = directions.shape[:2]
    sums = empty_sums(image_features, shape.numel()) if needs_directions else None
    launch_backward(
        image_features, directions, offsets, scores, statistics, grad_scores, grad_features, sums, image_index
    )
    return (
        image_features.new_empty(0, 0, 0, 0) if grad_features is None else grad_features,
        directions.new_empty(*shape, 0) if sums is None else sums.sum(1).view(*shape, -1),
    )


@_backward.register_fake
def _(image_features: Tensor, directions: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    *_rest, needs_features, needs_directions = rest
    grad_features = torch.empty_like(image_features) if needs_features else image_features.new_empty(0, 0, 0, 0)
    n_columns = directions.shape[2] + 1 if needs_directions else 0
    return grad_features, directions.new_empty(*directions.shape[:2], n_columns)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    image_features, directions, offsets, image_index, *_ = inputs
    ctx.save_for_backward(image_features, directions, offsets, image_index, *output)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad_scores: Tensor, _grad_statistics: Tensor) -> tuple[Tensor | None, ...]:
    needs_features, needs_directions, needs_offsets, *_ = ctx.needs_input_grad
    grad_features, sums = torch.ops.renyi_kd.relation_scores_backward(
        *ctx.saved_tensors, grad_scores.contiguous(), needs_features, needs_directions or needs_offsets
    )
    return (
        grad_features if needs_features else None,
        sums[..., :-1] if needs_directions else None,
        sums[..., -1] if needs_offsets else None,
        None,
        None,
        None,
    )


_forward.register_autograd(_differentiate, setup_context=_setup_context)
_backward.register_autograd(
    second_derivative_refusal("relation_scores", "differentiate a textbook implementation instead")
)


def relation_scores(
    image_features: Tensor,
    directions: Tensor,
    offsets: Tensor | None = None,
    *,
    image_index: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Return the scores ``[s, n, h * w]`` along directions ``[s, n, d]`` plus offsets ``[s, n]``.

    Sample i is of image ``image_index[i]``, which is on the device and goes unchecked, or of image i.
    """
    leaves = [value for value in (image_features, directions, offsets) if value is not None]
    scores: Tensor = torch.ops.renyi_kd.relation_scores(
        image_features,
        directions.contiguous(),
        None if offsets is None else offsets.contiguous(),
        image_index,
        eps,
        torch.is_grad_enabled() and any(value.requires_grad for value in leaves),
    )[0]
    return scores
