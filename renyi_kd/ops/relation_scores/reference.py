r"""Scores of layer-normalised pixels along given directions, without the normalised map.

    s_p = (x_p - mean_p) . w rstd_p        rstd_p = 1 / sqrt(var_p + eps), mean and var over the channels of pixel p

A normalised pixel has mean zero, so only ``v = w - mean(w)`` counts, and the mean drops out: ``s_p = rstd_p x_p . v``.
With g_p the gradient of s_p, and sums over p or over the scores that share a pixel,

    dv = sum_p g_p rstd_p x_p        dx_p = sum rstd_p g_p v + b_p (x_p - mean_p)        b_p = -rstd_p^2 / d sum g_p s_p

Few large operations, because in eager PyTorch each call costs as much as some thousand pixels: all scores are one
product of thin matrices; the variance is summed in blocks that stay in the cache, from deviations (E[x^2] - E[x]^2
would lose all digits where the mean is large); the gradient is written in blocks too. The map is read twice forward and
twice backward; kept are the scores and two numbers a pixel. A pixel whose channels are all alike has no direction: its
score is 0 and so is its gradient (LayerNorm would multiply it by 1 / sqrt(eps): a dead pixel would outweigh all
others).

Any float dtype (sums in fp32, in fp64 for fp64), any strides, any sizes >= 1. First derivatives only.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from renyi_kd.ops.autograd import refuse_second_derivative

# 2 MiB in fp32, of which each of two cores has half in its L2 cache while it is summed over.
BLOCK_ELEMENTS = 2**19


def relation_scores(
    image_features: Tensor, directions: Tensor, offsets: Tensor | None = None, *, eps: float = 1e-5
) -> Tensor:
    """Return the score of every pixel along every direction of its image.

    Args:
        image_features: ``[b, d, h, w]``, floating point, any strides.
        directions: ``[b, m, d]``: w, m of them per image; fp32, or fp64 for fp64 features.
        offsets: ``[b, m]``: added to all scores of a direction; None for zeros.
        eps: added to the variance.

    Returns:
        ``[b, m, h * w]`` in the dtype of ``directions``. First derivatives for all tensors.

    Raises:
        NotImplementedError: a second derivative is asked for.

    Cost: four reads and one write of the map for forward and backward, O(b m h w d) products; no extra memory but two
    blocks, the scores and two numbers a pixel.

    Source: the attention score of InfoSAM (ICML 2025), with the key projection folded into w by associativity.

    """
    scores: Tensor = _RelationScores.apply(image_features, directions, offsets, eps)  # type: ignore[no-untyped-call]
    return scores


class _RelationScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, image_features: Tensor, directions: Tensor, offsets: Tensor | None, eps: float) -> Tensor:
        directions = _centred(directions)
        found = []
        with torch.autocast(image_features.device.type, enabled=False):
            for _, x in _parts(image_features, directions.dtype):
                found.append(_neighbour_sums(x, directions) if x.stride(1) == 1 else _plane_sums(x, directions))
            products, mean, variance = (torch.cat(pieces, 2) for pieces in zip(*found, strict=True))
            alive = variance > (4 * torch.finfo(mean.dtype).eps * mean).square()
            rstd = (variance + eps).rsqrt_().mul_(alive)
            # Rounding leaves the directions a mean, which a large mean of the pixels would make visible.
            rest = directions.sum(-1, keepdim=True)
            scores = products.addcmul_(rest, mean, value=-1).mul_(rstd)
        ctx.save_for_backward(image_features, directions, mean, rstd, scores)
        return scores if offsets is None else scores + offsets[..., None]

    @staticmethod
    def backward(ctx: Any, grad_scores: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        refuse_second_derivative("relation_scores", "differentiate a textbook implementation instead")
        image_features, directions, mean, rstd, scores = ctx.saved_tensors
        n_channels = image_features.shape[1]
        needs_features, needs_directions, needs_offsets, _ = ctx.needs_input_grad
        grad_features = _empty_gradient(image_features) if needs_features else None
        grad_directions = torch.zeros_like(directions) if needs_directions else None
        with torch.autocast(image_features.device.type, enabled=False):
            weights = grad_scores * rstd
            slope = (weights * scores).sum(1, keepdim=True).mul_(rstd).div_(-n_channels)
            # b_p x_p, and -b_p mean_p as the weight of one more direction, of ones.
            left = torch.cat([directions, torch.ones_like(directions[:, :1])], 1)
            right = torch.cat([weights, slope * -mean], 1)
            # What is the faster way to add both depends on what lies side by side: addcmul has no fast path for two
            # operands that do not vary along it, and a product with one row is the quicker as a sum of products.
            channels_last = image_features.stride(1) == 1
            for part, x in _parts(image_features, directions.dtype):
                if grad_directions is not None:
                    grad_directions.baddbmm_(weights[:, :, part], x.mT)
                if grad_features is None:
                    continue
                target = grad_features.flatten(2)[:, :, part]
                gradient = target if target.dtype == x.dtype else torch.empty_like(x)
                b, by_pixel = slope[:, :, part], right[:, :, part]
                if channels_last:
                    for images, pixels in _blocks_of_pixels(x):
                        out = torch.mul(x.mT[images, pixels], b.mT[images, pixels], out=gradient.mT[images, pixels])
                        out.baddbmm_(by_pixel.mT[images, pixels], left[images])
                else:
                    for channels in _blocks_of_channels(x):
                        out = torch.addcmul(by_pixel[:, -1:], x[:, channels], b, out=gradient[:, channels])
                        if left.shape[1] == 2:
                            out.addcmul_(left[:, :1, channels].mT, by_pixel[:, :1])
                        else:
                            out.baddbmm_(left[:, :-1, channels].mT, by_pixel[:, :-1])
                if gradient is not target:
                    target.copy_(gradient)
        return (
            grad_features,
            None if grad_directions is None else _centred(grad_directions),
            grad_scores.sum(-1) if needs_offsets else None,
            None,
        )


def _centred(directions: Tensor) -> Tensor:
    return directions - directions.mean(-1, keepdim=True)


def _parts(image_features: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield the map as ``[b, d, pixels]`` in ``dtype`` with the range of its pixels.

    That is the map itself, in one part, if it needs no copy; else copies of image rows, each about a block.
    """
    n_images, n_channels, height, width = image_features.shape
    rows_merge = image_features.stride(2) == width * image_features.stride(3)
    step = height
    if (image_features.dtype != dtype or not rows_merge) and not torch.compiler.is_compiling():
        step = max(1, BLOCK_ELEMENTS // (n_images * n_channels * width))
    for top in range(0, height, step):
        bottom = min(top + step, height)
        yield slice(top * width, bottom * width), image_features[:, :, top:bottom].flatten(2).to(dtype)


def _plane_sums(x: Tensor, directions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return products of pixels and directions ``[b, m, pixels]``, means and variances ``[b, 1, pixels]``."""
    averaging = directions.new_full((len(x), 1, x.shape[1]), 1 / x.shape[1])
    sums = torch.bmm(torch.cat([directions, averaging], 1), x)
    products, mean = sums[:, :-1], sums[:, -1:]
    # On its own, as a product that is added to part of a tensor can take several times as long.
    variance = torch.zeros_like(mean, memory_format=torch.contiguous_format)
    memory = None
    for channels in _blocks_of_channels(x):
        block = x[:, channels]
        memory = _memory_for(block, memory)
        # (x - mean)^2 in one pass and into memory that is there already, which no public name offers.
        squares = torch.ops.aten.mse_loss.out(block, mean.expand_as(block), 0, out=memory)
        variance.baddbmm_(averaging[:, :, channels], squares)
    return products, mean, variance


def _neighbour_sums(x: Tensor, directions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same where the channels of a pixel lie side by side."""
    # Tall with few columns, which is the quicker way round.
    products = torch.bmm(x.mT, directions.mT)
    mean, norm = x.new_empty(2, len(x), x.shape[2], 1)
    memory = None
    for images, pixels in _blocks_of_pixels(x):
        block = x.mT[images, pixels]
        memory = _memory_for(block, memory)
        block_mean = torch.mean(block, 2, keepdim=True, out=mean[images, pixels])
        deviations = torch.sub(block, block_mean, out=memory)
        norm[images, pixels] = torch.linalg.vector_norm(deviations, dim=2, keepdim=True)
    return products.mT, mean.mT, norm.square_().div_(x.shape[1]).mT


def _memory_for(block: Tensor, memory: Tensor | None) -> Tensor:
    """Return the memory of the block before, unless this one is of another size."""
    return torch.empty_like(block) if memory is None or memory.shape != block.shape else memory


def _blocks_of_pixels(x: Tensor) -> Iterator[tuple[slice, slice]]:
    """Yield the images and pixels of blocks of ``[b, d, pixels]``: pixels of one image, or some small images."""
    n_images, n_channels, n_pixels = x.shape
    n_together, step = max(1, BLOCK_ELEMENTS // (n_channels * n_pixels)), max(1, BLOCK_ELEMENTS // n_channels)
    if torch.compiler.is_compiling():
        # The compiler makes its own, and Dynamo writes into no part of a tensor.
        n_together, step = n_images, n_pixels
    for image in range(0, n_images, n_together):
        for pixel in range(0, n_pixels, step):
            yield slice(image, image + n_together), slice(pixel, pixel + step)


def _blocks_of_channels(x: Tensor) -> Iterator[slice]:
    """Yield the channels of blocks of ``[b, d, pixels]``."""
    n_images, n_channels, n_pixels = x.shape
    step = n_channels if torch.compiler.is_compiling() else max(1, BLOCK_ELEMENTS // (n_images * n_pixels))
    return (slice(channel, channel + step) for channel in range(0, n_channels, step))


def _empty_gradient(image_features: Tensor) -> Tensor:
    """Return an uninitialised map of the same shape whose pixels merge, channels last if the map's are."""
    n_images, n_channels, height, width = image_features.shape
    if image_features.stride(1) == 1:
        return image_features.new_empty(n_images, height, width, n_channels).permute(0, 3, 1, 2)
    return image_features.new_empty(n_images, n_channels, height, width)
