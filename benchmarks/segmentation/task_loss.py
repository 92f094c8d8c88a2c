"""What the segmentation benchmarks train with besides a distiller: the structure loss."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def structure_loss(logits: Tensor, masks: Tensor, inside: Tensor, *, window: int = 31) -> Tensor:
    """Return cross-entropy (nats) plus soft IoU loss, both weighted towards outlines and averaged over the masks.

    With A the mean of the mask over the window and p the probabilities, per mask and over the pixels of the image::

        w = 1 + 5 |A - mask|
        loss = sum(w BCE) / sum(w) + 1 - (sum(w p mask) + 1) / (sum(w (p + mask - p mask)) + 1)

    Padding counts nowhere, whatever it holds: the value is that of the image by itself. Outside of the image the mask
    counts as background in A, as published.

    Args:
        logits: ``[b, p, S, S]``, any float dtype.
        masks: ``[b, p, S, S]``, 0 or 1.
        inside: ``[b, 1, S, S]``, 1 where the image is and 0 in the padding.
        window: odd side of the window in pixels; published for inputs of 352 px and kept at others.

    Returns:
        A scalar in fp32, also under autocast; once differentiable in the logits.

    Raises:
        ValueError: the shapes do not fit together or the window is even or below 1.

    Source: F3Net (Wei et al., AAAI 2020), equations 5 to 9, in the form of PraNet (Fan et al., 2020). Their code, and
    InfoSAM's after it, passes ``reduce="none"``, which torch takes for a mean over the batch: there the weights cancel
    out of the cross-entropy. Here they count, as in the papers.

    """
    if logits.ndim != 4 or masks.shape != logits.shape:
        raise ValueError(
            f"structure_loss: masks must have the shape [b, p, S, S] of logits, got {tuple(masks.shape)} and "
            f"{tuple(logits.shape)}; resize the logits to the masks"
        )
    if inside.shape != (len(logits), 1, *logits.shape[2:]):
        raise ValueError(
            f"structure_loss: inside must be [b, 1, S, S] for logits {tuple(logits.shape)}, got {tuple(inside.shape)}; "
            "take it from the batch of the masks"
        )
    if window < 1 or window % 2 == 0:
        raise ValueError(f"structure_loss: window must be odd and above 0, got {window}; add 1")
    with torch.autocast(logits.device.type, enabled=False):
        of_image = inside.bool()
        # Chosen, not multiplied by zero, so that a NaN in the padding stays there.
        logits = logits.float().where(of_image, 0)
        masks = masks.float().where(of_image, 0)
        # A mean over rows of means over columns: 62 additions per pixel instead of 961.
        surrounding = F.avg_pool2d(masks, (window, 1), 1, (window // 2, 0))
        surrounding = F.avg_pool2d(surrounding, (1, window), 1, (0, window // 2))
        weight = (1 + 5 * (surrounding - masks).abs()) * of_image
        cross_entropy = weight * F.binary_cross_entropy_with_logits(logits, masks, reduction="none")
        probability = logits.sigmoid()
        overlap = (weight * probability * masks).sum((-2, -1))
        both = (weight * (probability + masks)).sum((-2, -1))
        iou = (overlap + 1) / (both - overlap + 1)
        return (cross_entropy.sum((-2, -1)) / weight.sum((-2, -1)) + 1 - iou).mean()
