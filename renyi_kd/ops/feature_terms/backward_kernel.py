r"""Gradients of both models' maps, directions and offsets in one launch, from the terms' mix of relation maps.

    g_i = sum_j mix_ij s_j        dx = g_i rstd v_i + b (x - mean)        b = -g_i rstd^2 (s_i - c_i) / d
    dw_i = sum_p g_ip rstd_p (x_p - mean_p)          dc_i = sum_p g_ip

with v a centred direction; of the teacher's map there is no dx. The mix is in fp64, in every program that needs it: of
few samples it takes less time than the map's bytes. The sums over pixels go to one row per stretch of pixels, added up
afterwards: no atomics, so results repeat bit for bit. One direction a sample. First derivatives only.

Where an image has several samples, each has programs of its own for the sums, and the image further ones, which add up
what its samples make of its gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from renyi_kd.ops.gram_terms.kernels import gradient_of_map, weights_of_terms
from renyi_kd.ops.launches import launcher
from renyi_kd.ops.pixels import channel_places, pixel_places, pixels_of
from renyi_kd.ops.relation_scores.triton import (
    PROGRAMS,
    backward_tile,
    image_of,
    mean_of_direction,
    next_sample,
)
from renyi_kd.ops.tiles import cdiv, next_power_of_2

# Every program mixes the maps of all samples, which by the count of its instructions outgrows reading the maps.
MAX_SAMPLES = 64
# Samples whose relation maps are mixed at a time, so few that nothing spills; not measured on a GPU yet.
BLOCK_S = 8
NUM_WARPS = 4


@triton.jit
def _backward_of_map(
    x_ptr, grad_x_ptr, directions_ptr, offsets_ptr, scores_ptr, teacher_scores_ptr, statistics_ptr, mix_ptr, sums_ptr,
    compression_weight, distillation_weight, sample, image, row, block, part,
    n_samples, n_pixels, n_channels, n_steps, n_parts, sums_stride, width,
    x_stride_b, x_stride_c, x_stride_h, x_stride_w, grad_stride_b, grad_stride_c, grad_stride_h, grad_stride_w,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr, MERGED: tl.constexpr,
    GRAD_CHANNELS_LAST: tl.constexpr, GRAD_ALIGN: tl.constexpr, GRAD_MERGED: tl.constexpr,
    IS_STUDENT: tl.constexpr, NEEDS_X: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Write one block of channels of a row of sums, and of the map's gradient where NEEDS_X."""
    channels = block * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = channels < n_channels
    tile_ptr = x_ptr + tl.multiple_of(image * x_stride_b, [ALIGN])
    tile_ptr += channel_places(channels, x_stride_c, CHANNELS_LAST, ALIGN)[:, None]
    kept_ptr = statistics_ptr + row.to(tl.int64) * 2 * n_pixels
    sums = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    total = tl.zeros((BLOCK_P,), tl.float32)
    if NEEDS_X:
        grad_ptr = grad_x_ptr + tl.multiple_of(image * grad_stride_b, [GRAD_ALIGN])
        grad_ptr += channel_places(channels, grad_stride_c, GRAD_CHANNELS_LAST, GRAD_ALIGN)[:, None]
        offset = tl.load(offsets_ptr + row)
        v = tl.load(directions_ptr + row * n_channels + channels, mask=in_c, other=0.0)
        v -= mean_of_direction(directions_ptr, row, n_channels, BLOCK_D)
    for step in range(n_steps):
        pixels = (part * n_steps + step) * BLOCK_P + tl.arange(0, BLOCK_P)
        in_p = pixels < n_pixels
        inside = in_c[:, None] & in_p[None, :]
        places = pixel_places(pixels, width, x_stride_h, x_stride_w, CHANNELS_LAST, ALIGN, MERGED)
        x = tl.load(tile_ptr + places[None, :], mask=inside, other=0.0).to(tl.float32)
        g = gradient_of_map(
            scores_ptr, teacher_scores_ptr, mix_ptr, compression_weight, distillation_weight, sample, pixels,
            n_samples, n_pixels, BLOCK_S, IS_STUDENT, PAIRS,
        )  # fmt: skip
        mean = tl.load(kept_ptr + pixels, mask=in_p, other=0.0)
        rstd = tl.load(kept_ptr + n_pixels + pixels, mask=in_p, other=0.0)
        a = g * rstd
        y = x - mean[None, :]
        sums += y * a[None, :]
        total += g
        if NEEDS_X:
            s = tl.load(scores_ptr + sample.to(tl.int64) * n_pixels + pixels, mask=in_p, other=0.0) - offset
            b = s * a * rstd * (-1.0 / n_channels)
            grad = y * b[None, :] + v[:, None] * a[None, :]
            places = pixel_places(
                pixels, width, grad_stride_h, grad_stride_w, GRAD_CHANNELS_LAST, GRAD_ALIGN, GRAD_MERGED
            )
            tl.store(grad_ptr + places[None, :], grad.to(grad_x_ptr.dtype.element_ty), mask=inside)
    row_ptr = sums_ptr + (row.to(tl.int64) * n_parts + part) * sums_stride
    tl.store(row_ptr + channels, tl.sum(sums, 1), mask=in_c)
    tl.store(row_ptr + n_channels, tl.sum(total, 0), mask=block == 0)


@triton.jit
def _gradient_of_image(
    x_ptr, index_ptr, grad_x_ptr, directions_ptr, offsets_ptr, scores_ptr, teacher_scores_ptr, statistics_ptr, mix_ptr,
    compression_weight, distillation_weight, image, block, part,
    n_samples, n_pixels, n_channels, n_steps, width,
    x_stride_b, x_stride_c, x_stride_h, x_stride_w, grad_stride_b, grad_stride_c, grad_stride_h, grad_stride_w,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr, MERGED: tl.constexpr,
    GRAD_CHANNELS_LAST: tl.constexpr, GRAD_ALIGN: tl.constexpr, GRAD_MERGED: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Write one block of channels of the gradient of a student's image, the sum over its samples in their order."""
    channels = block * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = channels < n_channels
    tile_ptr = x_ptr + tl.multiple_of(image.to(tl.int64) * x_stride_b, [ALIGN])
    tile_ptr += channel_places(channels, x_stride_c, CHANNELS_LAST, ALIGN)[:, None]
    grad_ptr = grad_x_ptr + tl.multiple_of(image.to(tl.int64) * grad_stride_b, [GRAD_ALIGN])
    grad_ptr += channel_places(channels, grad_stride_c, GRAD_CHANNELS_LAST, GRAD_ALIGN)[:, None]
    for step in range(n_steps):
        pixels = (part * n_steps + step) * BLOCK_P + tl.arange(0, BLOCK_P)
        in_p = pixels < n_pixels
        inside = in_c[:, None] & in_p[None, :]
        places = pixel_places(pixels, width, x_stride_h, x_stride_w, CHANNELS_LAST, ALIGN, MERGED)
        x = tl.load(tile_ptr + places[None, :], mask=inside, other=0.0).to(tl.float32)
        grad = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
        sample = next_sample(index_ptr, image, -1, n_samples)
        while sample < n_samples:
            row = n_samples + sample
            kept_ptr = statistics_ptr + row.to(tl.int64) * 2 * n_pixels
            v = tl.load(directions_ptr + row * n_channels + channels, mask=in_c, other=0.0)
            v -= mean_of_direction(directions_ptr, row, n_channels, BLOCK_D)
            g = gradient_of_map(
                scores_ptr, teacher_scores_ptr, mix_ptr, compression_weight, distillation_weight, sample, pixels,
                n_samples, n_pixels, BLOCK_S, True, PAIRS,
            )  # fmt: skip
            mean = tl.load(kept_ptr + pixels, mask=in_p, other=0.0)
            rstd = tl.load(kept_ptr + n_pixels + pixels, mask=in_p, other=0.0)
            a = g * rstd
            s = tl.load(scores_ptr + sample.to(tl.int64) * n_pixels + pixels, mask=in_p, other=0.0)
            b = (s - tl.load(offsets_ptr + row)) * a * rstd * (-1.0 / n_channels)
            grad += (x - mean[None, :]) * b[None, :] + v[:, None] * a[None, :]
            sample = next_sample(index_ptr, image, sample, n_samples)
        places = pixel_places(pixels, width, grad_stride_h, grad_stride_w, GRAD_CHANNELS_LAST, GRAD_ALIGN, GRAD_MERGED)
        tl.store(grad_ptr + places[None, :], grad.to(grad_x_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n_samples", "n_units", "n_steps", "n_parts", "width"])
def _feature_terms_bwd_kernel(
    teacher_ptr, student_ptr, index_ptr, grad_map_ptr, directions_ptr, offsets_ptr,
    teacher_scores_ptr, student_scores_ptr, statistics_ptr, mix_ptr,
    grad_loss_ptr, grad_compression_ptr, grad_distillation_ptr, sums_ptr,
    n_samples, n_units, n_channels, n_steps, n_parts, sums_stride, width, lambda_r, lambda_d,
    teacher_stride_b, teacher_stride_c, teacher_stride_h, teacher_stride_w,
    student_stride_b, student_stride_c, student_stride_h, student_stride_w,
    grad_stride_b, grad_stride_c, grad_stride_h, grad_stride_w,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, UNIT: tl.constexpr,
    TEACHER_CHANNELS_LAST: tl.constexpr, TEACHER_ALIGN: tl.constexpr, TEACHER_MERGED: tl.constexpr,
    STUDENT_CHANNELS_LAST: tl.constexpr, STUDENT_ALIGN: tl.constexpr, STUDENT_MERGED: tl.constexpr,
    GRAD_CHANNELS_LAST: tl.constexpr, GRAD_ALIGN: tl.constexpr, GRAD_MERGED: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Write what one block of channels over one stretch of pixels gives: of the teacher's maps, then the student's.

    With an index the gradient of the student's images comes last.
    """
    NEEDS_X: tl.constexpr = grad_map_ptr is not None and index_ptr is None
    n_pixels = n_units * UNIT
    n_blocks = tl.cdiv(n_channels, BLOCK_C)
    part = tl.program_id(0) % n_parts
    block = tl.program_id(0) // n_parts % n_blocks
    row = tl.program_id(0) // (n_parts * n_blocks)
    compression_weight, distillation_weight = weights_of_terms(
        grad_loss_ptr, grad_compression_ptr, grad_distillation_ptr, lambda_r, lambda_d
    )
    if row < n_samples:
        _backward_of_map(
            teacher_ptr, grad_map_ptr, directions_ptr, offsets_ptr, teacher_scores_ptr, teacher_scores_ptr,
            statistics_ptr, mix_ptr, sums_ptr, compression_weight, distillation_weight, row, image_of(index_ptr, row),
            row, block, part, n_samples, n_pixels, n_channels, n_steps, n_parts, sums_stride, width,
            teacher_stride_b, teacher_stride_c, teacher_stride_h, teacher_stride_w,
            grad_stride_b, grad_stride_c, grad_stride_h, grad_stride_w, BLOCK_C, BLOCK_P, BLOCK_D, BLOCK_S,
            TEACHER_CHANNELS_LAST, TEACHER_ALIGN, TEACHER_MERGED, GRAD_CHANNELS_LAST, GRAD_ALIGN, GRAD_MERGED,
            False, False, PAIRS,
        )  # fmt: skip
    elif row < 2 * n_samples:
        sample = row - n_samples
        _backward_of_map(
            student_ptr, grad_map_ptr, directions_ptr, offsets_ptr, student_scores_ptr, teacher_scores_ptr,
            statistics_ptr, mix_ptr, sums_ptr, compression_weight, distillation_weight, sample,
            image_of(index_ptr, sample), row, block, part, n_samples, n_pixels, n_channels, n_steps, n_parts,
            sums_stride, width, student_stride_b, student_stride_c, student_stride_h, student_stride_w,
            grad_stride_b, grad_stride_c, grad_stride_h, grad_stride_w, BLOCK_C, BLOCK_P, BLOCK_D, BLOCK_S,
            STUDENT_CHANNELS_LAST, STUDENT_ALIGN, STUDENT_MERGED, GRAD_CHANNELS_LAST, GRAD_ALIGN, GRAD_MERGED,
            True, NEEDS_X, PAIRS,
        )  # fmt: skip
    # Nested: the compiler must not see the pointers where there are none.
    elif index_ptr is not None:  # noqa: SIM102
        if grad_map_ptr is not None:
            _gradient_of_image(
                student_ptr, index_ptr, grad_map_ptr, directions_ptr, offsets_ptr, student_scores_ptr,
                teacher_scores_ptr, statistics_ptr, mix_ptr, compression_weight, distillation_weight,
                row - 2 * n_samples, block, part, n_samples, n_pixels, n_channels, n_steps, width,
                student_stride_b, student_stride_c, student_stride_h, student_stride_w,
                grad_stride_b, grad_stride_c, grad_stride_h, grad_stride_w, BLOCK_C, BLOCK_P, BLOCK_D, BLOCK_S,
                STUDENT_CHANNELS_LAST, STUDENT_ALIGN, STUDENT_MERGED, GRAD_CHANNELS_LAST, GRAD_ALIGN, GRAD_MERGED,
                PAIRS,
            )  # fmt: skip


def launch_backward_of_both(
    maps: tuple[Tensor, Tensor],
    grad_map: Tensor | None,
    directions: Tensor,
    offsets: Tensor,
    scores: tuple[Tensor, Tensor],
    statistics: Tensor,
    mix: Tensor,
    upstream: Sequence[Tensor | None],
    lambda_r: float,
    lambda_d: float,
    compares_pairs: bool,
    image_index: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Write the gradient of the student's map, if wanted; return those of directions and offsets in parts.

    Args:
        maps: ``[b, d, h, w]``, of teacher and student.
        grad_map: as the student's.
        directions: ``[2 s, d]``, the teacher's before the student's, as all that follows.
        offsets: ``[2 s]``.
        scores: ``[s, h * w]`` each.
        statistics: ``[2 s, 2, h * w]``: mean and rstd of every pixel.
        mix: as the terms return it.
        upstream: gradients of loss, L_r and L_d, or None.
        lambda_r: weight of L_r in the loss.
        lambda_d: likewise of L_d.
        compares_pairs: whether the form of L_d does.
        image_index: ``[s]``, on the device; None where sample i is of image i.

    Returns:
        ``[2 s, parts, d]`` and ``[2 s, parts]``.

    """
    teacher, student = map(pixels_of, maps)
    grad = student if grad_map is None else pixels_of(grad_map)
    n_samples, n_channels = len(scores[0]), maps[0].shape[1]
    n_rows = 2 * n_samples if image_index is None or grad_map is None else 2 * n_samples + len(maps[1])
    tile = backward_tile(n_channels)
    n_blocks = cdiv(n_channels, tile["BLOCK_C"])
    n_tiles = cdiv(student.n_units * student.unit, tile["BLOCK_P"])
    n_steps = cdiv(n_tiles, cdiv(PROGRAMS, n_samples * n_blocks))
    n_parts = cdiv(n_tiles, n_steps)
    # Rows that are read in vectors.
    sums = directions.new_empty(2 * n_samples, n_parts, 16 * (n_channels // 16 + 1))
    with torch.cuda.device_of(sums):
        launcher(_feature_terms_bwd_kernel, (n_rows * n_blocks * n_parts,))(
            *maps, image_index, grad_map, directions, offsets, *scores, statistics, mix, *upstream, sums,
            n_samples, student.n_units, n_channels, n_steps, n_parts, sums.stride(1), student.width, lambda_r, lambda_d,
            *teacher.strides, *student.strides, *grad.strides,
            **tile, BLOCK_D=next_power_of_2(n_channels), BLOCK_S=BLOCK_S, UNIT=student.unit,
            TEACHER_CHANNELS_LAST=teacher.channels_last, TEACHER_ALIGN=teacher.align, TEACHER_MERGED=teacher.merged,
            STUDENT_CHANNELS_LAST=student.channels_last, STUDENT_ALIGN=student.align, STUDENT_MERGED=student.merged,
            GRAD_CHANNELS_LAST=grad.channels_last, GRAD_ALIGN=grad.align, GRAD_MERGED=grad.merged,
            # A pair's gradient takes a map of each model.
            PAIRS=compares_pairs, num_warps=2 * NUM_WARPS if compares_pairs else NUM_WARPS,
        )  # fmt: skip
    return sums[..., :n_channels], sums[..., n_channels]
