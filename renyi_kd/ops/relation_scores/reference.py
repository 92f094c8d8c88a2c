r"""Scores of layer-normalised pixels along given directions, without the normalised map.

    s_p = (x_p - mean_p) . w rstd_p        rstd_p = 1 / sqrt(var_p + eps), mean and var over the channels of pixel p

A normalised pixel has mean zero, so only ``v = w - mean(w)`` counts, and the mean drops out: ``s_p = rstd_p x_p . v``.
With g_p the gradient of s_p, and sums over p or over the scores that share a pixel,

    dv = sum_p g_p rstd_p x_p        dx_p = sum rstd_p g_p v + b_p (x_p - mean_p)        b_p = -rstd_p^2 / d sum g_p s_p

On a CPU all of it is done to a block of pixels while that lies in a cache. Few large blocks, because every call costs
as much as some thousand pixels, and PyTorch's threads wait for one another at its end. On any other device every call
is a launch, and there is one block: the map as it lies. Where it must be copied, for its dtype or the strides of its
rows, a block is 96 MiB. The variance is summed from deviations (E[x^2] - E[x]^2 would lose all digits where the mean is
large). Kept are the scores and two numbers a pixel. A pixel whose channels are all alike has no direction: its score is
0 and so is its gradient (LayerNorm would multiply it by 1 / sqrt(eps): a dead pixel would outweigh all others).

Any float dtype (sums in fp32, in fp64 for fp64), any strides, any sizes >= 1. First derivatives only.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from renyi_kd.ops.autograd import refuse_second_derivative

# 8 MiB in fp32, two images of a SAM. Elsewhere 96 MiB, which take no more launches than the formula as it is written,
# up to 64 images of that size.
BLOCK_ELEMENTS, BLOCK_ELEMENTS_ELSEWHERE = 2**21, 3 * 2**23


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

    Cost: O(b m h w d) products; on a CPU two reads and one write of the map for forward and backward. Extra memory for
    two blocks, the scores and two numbers a pixel.

    Source: the attention score of InfoSAM (ICML 2025), with the key projection folded into w by associativity.

    """
    scores: Tensor = _RelationScores.apply(image_features, directions, offsets, eps)  # type: ignore[no-untyped-call]
    return scores


class _RelationScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, image_features: Tensor, directions: Tensor, offsets: Tensor | None, eps: float) -> Tensor:
        directions = _centred(directions)
        pixels = _with_rows(image_features)
        blocks = _blocks(pixels, directions.dtype)
        with torch.autocast(pixels.device.type, enabled=False):
            forward = _forward_by_block if _is_cut(pixels) else _forward_in_few_calls
            scores, mean, rstd, shifted = forward(blocks, pixels, directions, offsets, eps)
        ctx.save_for_backward(image_features, directions, mean, rstd, scores)
        return shifted

    @staticmethod
    def backward(ctx: Any, grad_scores: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        refuse_second_derivative("relation_scores", "differentiate a textbook implementation instead")
        image_features, directions, mean, rstd, scores = ctx.saved_tensors
        needs_features, needs_directions, needs_offsets, _ = ctx.needs_input_grad
        pixels = _with_rows(image_features)
        blocks, is_cut = _blocks(pixels, directions.dtype), _is_cut(pixels)
        grad_features = _empty_map(pixels, pixels.dtype) if needs_features else None
        grad_directions = torch.zeros_like(directions) if needs_directions else None
        of_scores = grad_scores, scores, mean, rstd
        # Of all pixels, or of a block while it is in the cache.
        whole = None if is_cut else _weights(*of_scores, n_channels=pixels.shape[1])
        with torch.autocast(pixels.device.type, enabled=False):
            for block in blocks:
                x, at = block.of(pixels, directions.dtype), (block.images, slice(None), block.pixels)
                if whole is None:
                    weights, slope, shift = _weights(*(value[at] for value in of_scores), n_channels=pixels.shape[1])
                else:
                    weights, slope, shift = (value[at] for value in whole)
                if grad_directions is not None:
                    grad_directions[block.images].baddbmm_(weights, x.mT)
                if grad_features is not None:
                    target = grad_features[block.images, :, block.rows].flatten(2)
                    write = _write_gradient if pixels.device.type == "cpu" else _write_gradient_in_few_calls
                    write(target, x, directions[block.images], weights, slope, shift)
        return (
            None if grad_features is None else grad_features.view(image_features.shape),
            None if grad_directions is None else _centred(grad_directions),
            grad_scores.sum(-1) if needs_offsets else None,
            None,
        )


class _Block(NamedTuple):
    """Some rows of some images of a map.

    Attributes:
        images: which.
        rows: which of each.
        pixels: those of the rows.
        part: how many blocks of these images come before.

    """

    images: slice
    rows: slice
    pixels: slice
    part: int

    def of(self, pixels: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the block of a map as ``[b, d, pixels]``; a copy where dtype or strides of the rows do not fit."""
        x = pixels[self.images, :, self.rows]
        return (_empty_map(x, dtype).copy_(x) if _is_copied(pixels, dtype) else x).flatten(2)


def _with_rows(image_features: Tensor) -> Tensor:
    """Return the map as ``[b, d, rows, width]``: rows of one pixel where all pixels lie at equal distances."""
    _, _, height, width = image_features.shape
    merges = height == 1 or width == 1 or image_features.stride(2) == width * image_features.stride(3)
    return image_features.flatten(2).unsqueeze(3) if merges else image_features


def _is_copied(pixels: Tensor, dtype: torch.dtype) -> bool:
    return pixels.dtype != dtype or pixels.shape[3] > 1


def _is_cut(pixels: Tensor) -> bool:
    """Return whether a map is worked on in blocks that fit in a cache; the compiler makes its own."""
    return pixels.device.type == "cpu" and not torch.compiler.is_compiling()


def _blocks(pixels: Tensor, dtype: torch.dtype) -> list[_Block]:
    """Return the blocks of a map: rows of one image, or some small images."""
    n_images, n_channels, n_rows, width = pixels.shape
    n_together, step = n_images, n_rows
    if _is_cut(pixels) or (_is_copied(pixels, dtype) and not torch.compiler.is_compiling()):
        elements = BLOCK_ELEMENTS if _is_cut(pixels) else BLOCK_ELEMENTS_ELSEWHERE
        n_together = max(1, elements // (n_channels * n_rows * width))
        step = max(1, min(n_rows, elements // (n_channels * width)))
    return [
        _Block(slice(image, image + n_together), slice(row, row + step), slice(row * width, (row + step) * width), part)
        for image in range(0, n_images, n_together)
        for part, row in enumerate(range(0, n_rows, step))
    ]


def _empty_map(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Return an uninitialised map of the same shape whose pixels merge, channels last if those of ``like`` are."""
    n_images, n_channels, n_rows, width = like.shape
    if like.stride(1) == 1:
        return like.new_empty(n_images, n_rows, width, n_channels, dtype=dtype).permute(0, 3, 1, 2)
    return like.new_empty(n_images, n_channels, n_rows, width, dtype=dtype)


def _centred(directions: Tensor) -> Tensor:
    return directions - directions.mean(-1, keepdim=True)


def _forward_by_block(
    blocks: list[_Block], pixels: Tensor, directions: Tensor, offsets: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return scores, means, reciprocal deviations, and scores with offsets; all of a block while it is in the cache."""
    n_images, _, n_rows, width = pixels.shape
    scores = directions.new_empty(n_images, directions.shape[1], n_rows * width)
    mean, rstd = directions.new_empty(2, n_images, 1, n_rows * width)
    shifted = scores if offsets is None else torch.empty_like(scores)
    memory = None
    for block in blocks:
        x, at = block.of(pixels, directions.dtype), (block.images, slice(None), block.pixels)
        of_images = directions[block.images]
        # That of the block before: memory that is new is slow.
        if memory is None or memory.shape != x.shape or memory.stride() != x.stride():
            memory = torch.empty_like(x)
        products, mean[at], variance = _sums(x, of_images, memory)
        scores[at], rstd[at] = _normalised(products, mean[at], variance, of_images, eps)
        if offsets is not None:
            shifted[at] = scores[at] + offsets[block.images, :, None]
    return scores, mean, rstd, shifted


def _forward_in_few_calls(
    blocks: list[_Block], pixels: Tensor, directions: Tensor, offsets: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the same, all scores at once."""
    found = []
    for block in blocks:
        x, of_images = block.of(pixels, directions.dtype), directions[block.images]
        if x.device.type == "cpu":
            found.append(_sums(x, of_images, torch.empty_like(x)))
        else:
            variance, mean = torch.var_mean(x, 1, correction=0, keepdim=True)
            found.append((torch.bmm(of_images, x), mean, variance))
    n_parts = blocks[-1].part + 1
    products, mean, variance = (_joined(pieces, n_parts) for pieces in zip(*found, strict=True))
    scores, rstd = _normalised(products, mean, variance, directions, eps)
    return scores, mean, rstd, scores if offsets is None else scores + offsets[..., None]


def _joined(pieces: tuple[Tensor, ...], n_parts: int) -> Tensor:
    """Return the values of all pixels from those of blocks, of which ``n_parts`` make an image."""
    if n_parts > 1:
        pieces = tuple(torch.cat(pieces[first : first + n_parts], 2) for first in range(0, len(pieces), n_parts))
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0]


def _sums(x: Tensor, directions: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return products of pixels ``[b, d, p]`` and directions ``[b, m, p]``, means and variances ``[b, 1, p]``.

    The memory, of as many numbers as the pixels, is written over.
    """
    if x.stride(1) == 1:
        # The channels of a pixel lie side by side. Tall with few columns is the quicker way round.
        products = torch.bmm(x.mT, directions.mT)
        mean = x.mT.mean(2, keepdim=True)
        norm = torch.linalg.vector_norm(torch.sub(x.mT, mean, out=memory.mT), dim=2, keepdim=True)
        return products.mT, mean.mT, norm.square_().div_(x.shape[1]).mT
    averaging = directions.new_full((len(x), 1, x.shape[1]), 1 / x.shape[1])
    sums = torch.bmm(torch.cat([directions, averaging], 1), x)
    mean = sums[:, -1:]
    # (x - mean)^2 in one pass, which no public name offers.
    squares = torch.ops.aten.mse_loss.out(x, mean.expand_as(x), 0, out=memory)
    return sums[:, :-1], mean, torch.bmm(averaging, squares)


def _normalised(
    products: Tensor, mean: Tensor, variance: Tensor, directions: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return the scores, in the memory of the products, and the reciprocal deviations."""
    alive = variance > (4 * torch.finfo(mean.dtype).eps * mean).square()
    rstd = (variance + eps).rsqrt_().mul_(alive)
    # Rounding leaves the directions a mean, which a large mean of the pixels would make visible.
    rest = directions.sum(-1, keepdim=True)
    return products.addcmul_(rest, mean, value=-1).mul_(rstd), rstd


def _weights(
    grad_scores: Tensor, scores: Tensor, mean: Tensor, rstd: Tensor, *, n_channels: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weights of the directions in the gradient of a pixel, b and -b mean."""
    weights = grad_scores * rstd
    slope = (weights * scores).sum(1, keepdim=True).mul_(rstd).div_(-n_channels)
    return weights, slope, slope * -mean


def _write_gradient(
    target: Tensor, x: Tensor, directions: Tensor, weights: Tensor, slope: Tensor, shift: Tensor
) -> None:
    """Write the gradient of the pixels ``[b, d, p]`` to ``target``."""
    gradient = target if target.dtype == x.dtype else torch.empty_like(x)
    # What is the faster way to add both depends on what lies side by side: addcmul has no fast path for two operands
    # that do not vary along it, and a product with one row is the quicker as a sum of products.
    if x.stride(1) == 1:
        left = torch.cat([directions, torch.ones_like(directions[:, :1])], 1)
        out = torch.mul(x.mT, slope.mT, out=gradient.mT)
        out.baddbmm_(torch.cat([weights, shift], 1).mT, left)
    else:
        out = torch.addcmul(shift, x, slope, out=gradient)
        if directions.shape[1] == 1:
            out.addcmul_(directions.mT, weights)
        else:
            out.baddbmm_(directions.mT, weights)
    if gradient is not target:
        target.copy_(gradient)


def _write_gradient_in_few_calls(
    target: Tensor, x: Tensor, directions: Tensor, weights: Tensor, slope: Tensor, shift: Tensor
) -> None:
    # Dynamo writes into no part of a tensor.
    out = None if torch.compiler.is_compiling() else target
    gradient = torch.addcmul(shift, x, slope, out=out if target.dtype == x.dtype else None)
    if directions.shape[1] == 1:
        gradient = torch.addcmul(gradient, directions.mT, weights, out=out)
    else:
        gradient.baddbmm_(directions.mT, weights)
    if gradient is not target:
        target.copy_(gradient)
