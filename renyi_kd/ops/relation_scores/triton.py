r"""Scores of layer-normalised pixels in one read of the map; backward in one read and one write.

    s_jp = rstd_p (x_p - mean_p) . w_j + c_j
    G_p = sum_j g_jp w_j          dx_p = rstd_p (G_p - mean(G_p) - (x_p - mean_p) rstd_p / d sum_j g_jp s0_jp)
    dw_j = sum_p g_jp rstd_p (x_p - mean_p)          dc_j = sum_p g_jp          with s0 = s - c

A program holds a tile of pixels with all their channels, so the variance is summed from deviations, and the layout is a
matter of strides alone. The sums over pixels go to one row of partial sums per program, added up afterwards: no
atomics, so results repeat bit for bit. Extra memory: these rows, at most about ``PROGRAMS`` of d + 1 numbers per
direction of an image, and no statistics: the backward computes them again from the tile that it has to read anyway. A
pixel whose channels are all alike has score c and gradient 0.

fp16, bf16, fp32, summed in fp32; any strides, any sizes >= 1. First derivatives only.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from renyi_kd.ops.autograd import second_derivative_refusal

# Elements of a tile, chosen so that nothing spills on any target; not measured on a GPU yet.
FORWARD_TILE, BACKWARD_TILE = 8192, 4096
NUM_WARPS = 8
# Programs of the backward, at least where there are as many tiles: what it takes to fill the largest GPUs.
PROGRAMS = 1024
# Rounding of fp32: a variance below that of the mean's rounding is none.
_ROUNDING = tl.constexpr(4 * torch.finfo(torch.float32).eps)


@triton.jit
def _load_pixels(
    x_ptr, pixels, channels, n_pixels, n_channels, width, x_stride_c, x_stride_h, x_stride_w,
):  # fmt: skip
    """Return the deviations of pixels from their mean as [BLOCK_C, BLOCK_P], 0 past the end, and the mean."""
    inside = (channels < n_channels)[:, None] & (pixels < n_pixels)[None, :]
    places = (pixels // width).to(tl.int64) * x_stride_h + (pixels % width).to(tl.int64) * x_stride_w
    x = tl.load(
        x_ptr + channels.to(tl.int64)[:, None] * x_stride_c + places[None, :], mask=inside, other=0.0
    ).to(tl.float32)  # fmt: skip
    mean = tl.sum(x, 0) / n_channels
    centred = tl.where(inside, x - mean[None, :], 0.0)
    # Once more, as a GPU rounds sum and quotient: the directions have a mean too, which would meet that of the rest.
    rest = tl.sum(centred, 0) / n_channels
    return tl.where(inside, centred - rest[None, :], 0.0), mean


@triton.jit
def _rstd(centred, mean, n_channels, eps):
    """Return 1 / sqrt(variance + eps) per pixel; 0 where the variance is no more than rounding of the mean."""
    variance = tl.sum(centred * centred, 0) / n_channels
    rounding = _ROUNDING * mean
    return tl.where(variance > rounding * rounding, 1.0 / tl.sqrt(variance + eps), 0.0)


@triton.jit
def _relation_scores_fwd_kernel(
    x_ptr, directions_ptr, offsets_ptr, scores_ptr,
    n_channels, n_pixels, n_directions, width, eps,
    x_stride_b, x_stride_c, x_stride_h, x_stride_w,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, HAS_OFFSETS: tl.constexpr,
):  # fmt: skip
    """Write the scores of one tile of pixels for every direction of their image."""
    n_tiles = tl.cdiv(n_pixels, BLOCK_P)
    image = (tl.program_id(0) // n_tiles).to(tl.int64)
    channels = tl.arange(0, BLOCK_C)
    pixels = (tl.program_id(0) % n_tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
    centred, mean = _load_pixels(
        x_ptr + image * x_stride_b, pixels, channels, n_pixels, n_channels, width, x_stride_c, x_stride_h, x_stride_w
    )
    rstd = _rstd(centred, mean, n_channels, eps)
    for j in range(n_directions):
        row = image * n_directions + j
        w = tl.load(directions_ptr + row * n_channels + channels, mask=channels < n_channels, other=0.0)
        scores = tl.sum(centred * w[:, None], 0) * rstd
        if HAS_OFFSETS:
            scores += tl.load(offsets_ptr + row)
        tl.store(scores_ptr + row * n_pixels + pixels, scores, mask=pixels < n_pixels)


@triton.jit
def _relation_scores_bwd_kernel(
    x_ptr, directions_ptr, grad_scores_ptr, grad_x_ptr, partial_ptr,
    n_channels, n_pixels, n_directions, n_programs, width, eps,
    x_stride_b, x_stride_c, x_stride_h, x_stride_w, grad_stride_b, grad_stride_c, grad_stride_h, grad_stride_w,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, NEEDS_X: tl.constexpr, NEEDS_DIRECTIONS: tl.constexpr,
):  # fmt: skip
    """Write the gradient of every n_programs-th tile of an image, and one row of sums over them per direction."""
    image = (tl.program_id(0) // n_programs).to(tl.int64)
    channels = tl.arange(0, BLOCK_C)
    in_c = channels < n_channels
    first = tl.program_id(0) % n_programs
    for step in range(tl.cdiv(tl.cdiv(n_pixels, BLOCK_P) - first, n_programs)):
        tile = first + step * n_programs
        pixels = tile * BLOCK_P + tl.arange(0, BLOCK_P)
        in_p = pixels < n_pixels
        centred, mean = _load_pixels(
            x_ptr + image * x_stride_b, pixels, channels, n_pixels, n_channels, width,
            x_stride_c, x_stride_h, x_stride_w,
        )  # fmt: skip
        rstd = _rstd(centred, mean, n_channels, eps)
        along = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
        projection = tl.zeros((BLOCK_P,), tl.float32)
        for j in range(n_directions):
            row = image * n_directions + j
            g = tl.load(grad_scores_ptr + row * n_pixels + pixels, mask=in_p, other=0.0)
            if NEEDS_X:
                w = tl.load(directions_ptr + row * n_channels + channels, mask=in_c, other=0.0)
                along += w[:, None] * g[None, :]
                projection += g * tl.sum(centred * w[:, None], 0)
            if NEEDS_DIRECTIONS:
                row_ptr = partial_ptr + (row * n_programs + first) * (n_channels + 1)
                sums, total = tl.sum(centred * (g * rstd)[None, :], 1), tl.sum(g, 0)
                # The row is this program's own; its first tile finds nothing there.
                if step > 0:
                    sums += tl.load(row_ptr + channels, mask=in_c, other=0.0)
                    total += tl.load(row_ptr + n_channels)
                tl.store(row_ptr + channels, sums, mask=in_c)
                tl.store(row_ptr + n_channels, total)
                # The threads that read the row at the next tile may not be those that wrote it.
                tl.debug_barrier()
        if NEEDS_X:
            along = along - (tl.sum(along, 0) / n_channels)[None, :]
            grad = rstd[None, :] * (along - centred * (projection * rstd * rstd / n_channels)[None, :])
            places = (pixels // width).to(tl.int64) * grad_stride_h + (pixels % width).to(tl.int64) * grad_stride_w
            tl.store(
                grad_x_ptr + image * grad_stride_b + channels.to(tl.int64)[:, None] * grad_stride_c + places[None, :],
                grad.to(grad_x_ptr.dtype.element_ty), mask=in_c[:, None] & in_p[None, :],
            )  # fmt: skip


def block_sizes(n_channels: int, n_pixels: int, elements: int) -> dict[str, int]:
    """Return the sizes of a tile: all channels, and as many pixels as fit beside them."""
    block_c = triton.next_power_of_2(n_channels)
    # What is kept per channel takes registers too.
    elements = min(elements, 4096) if block_c > 1024 else elements
    block_p = max(1, min(elements // block_c, triton.next_power_of_2(n_pixels)))
    return {"BLOCK_C": block_c, "BLOCK_P": block_p}


def launch_forward(image_features: Tensor, directions: Tensor, offsets: Tensor | None, eps: float) -> Tensor:
    """Return the scores, by one launch."""
    n_images, n_channels, height, width = image_features.shape
    n_directions, n_pixels = directions.shape[1], height * width
    scores = directions.new_empty(n_images, n_directions, n_pixels)
    blocks = block_sizes(n_channels, n_pixels, FORWARD_TILE)
    with torch.cuda.device_of(image_features):
        _relation_scores_fwd_kernel[(triton.cdiv(n_pixels, blocks["BLOCK_P"]) * n_images,)](
            image_features, directions, offsets, scores,
            n_channels, n_pixels, n_directions, width, eps, *image_features.stride(),
            **blocks, HAS_OFFSETS=offsets is not None, num_warps=NUM_WARPS,
        )  # fmt: skip
    return scores


def _n_programs(image_features: Tensor) -> int:
    n_images, n_channels, height, width = image_features.shape
    n_tiles = triton.cdiv(height * width, block_sizes(n_channels, height * width, BACKWARD_TILE)["BLOCK_P"])
    n_programs: int = min(n_tiles, triton.cdiv(PROGRAMS, n_images))
    return n_programs


def empty_sums(image_features: Tensor, n_rows: int) -> Tensor:
    """Return room for what the programs of a backward sum up: ``[n_rows, programs, d + 1]``, offsets last."""
    shape = n_rows, _n_programs(image_features), image_features.shape[1] + 1
    return image_features.new_empty(shape, dtype=torch.float32)


def launch_backward(
    image_features: Tensor,
    directions: Tensor,
    grad_scores: Tensor,
    eps: float,
    grad_features: Tensor | None,
    sums: Tensor | None,
) -> None:
    """Write the gradient of the map, and a row of sums per direction and program, by one launch; None: not needed."""
    n_images, n_channels, height, width = image_features.shape
    n_directions, n_pixels, n_programs = directions.shape[1], height * width, _n_programs(image_features)
    with torch.cuda.device_of(image_features):
        _relation_scores_bwd_kernel[(n_programs * n_images,)](
            image_features, directions, grad_scores, grad_features, sums,
            n_channels, n_pixels, n_directions, n_programs, width, eps, *image_features.stride(),
            *(image_features if grad_features is None else grad_features).stride(),
            **block_sizes(n_channels, n_pixels, BACKWARD_TILE),
            NEEDS_X=grad_features is not None, NEEDS_DIRECTIONS=sums is not None, num_warps=NUM_WARPS,
        )  # fmt: skip


_forward = torch.library.custom_op("renyi_kd::relation_scores", launch_forward, mutates_args=())


@_forward.register_fake
def _(image_features: Tensor, directions: Tensor, offsets: Tensor | None, eps: float) -> Tensor:
    n_images, _, height, width = image_features.shape
    return directions.new_empty(n_images, directions.shape[1], height * width)


@torch.library.custom_op("renyi_kd::relation_scores_backward", mutates_args=())
def _backward(
    image_features: Tensor,
    directions: Tensor,
    grad_scores: Tensor,
    eps: float,
    needs_features: bool,
    needs_directions: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gradient of the map, and those of each direction and offset side by side; empty if not needed."""
    grad_features = torch.empty_like(image_features) if needs_features else None
    shape = directions.shape[:2]
    sums = empty_sums(image_features, shape.numel()) if needs_directions else None
    launch_backward(image_features, directions, grad_scores, eps, grad_features, sums)
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


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    image_features, directions, _, ctx.eps = inputs
    ctx.save_for_backward(image_features, directions)


def _differentiate(ctx: Any, grad_scores: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
    image_features, directions = ctx.saved_tensors
    needs_features, needs_directions, needs_offsets, _ = ctx.needs_input_grad
    grad_features, sums = torch.ops.renyi_kd.relation_scores_backward(
        image_features, directions, grad_scores.contiguous(), ctx.eps, needs_features, needs_directions or needs_offsets
    )
    return (
        grad_features if needs_features else None,
        sums[..., :-1] if needs_directions else None,
        sums[..., -1] if needs_offsets else None,
        None,
    )


_forward.register_autograd(_differentiate, setup_context=_setup_context)
_backward.register_autograd(
    second_derivative_refusal("relation_scores", "differentiate a textbook implementation instead")
)


def relation_scores(
    image_features: Tensor, directions: Tensor, offsets: Tensor | None = None, *, eps: float = 1e-5
) -> Tensor:
    """Return what the reference does, plus the offsets ``[b, m]``."""
    scores: Tensor = torch.ops.renyi_kd.relation_scores(
        image_features, directions.contiguous(), None if offsets is None else offsets.contiguous(), eps
    )
    return scores
