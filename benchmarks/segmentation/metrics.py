"""How well one predicted mask fits, in the metrics of the paper's tables."""

from __future__ import annotations

import numpy as np
import py_sod_metrics
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

METRICS = ("s_measure", "e_adaptive", "e_mean", "wf", "wf_03", "jaccard", "dice", "iou")
IOU_THRESHOLDS = (0.1, 0.3, 0.5, 0.7, 0.9)


class SMeasure(py_sod_metrics.Smeasure):
    """The S-measure where a mask's centre of mass lies in the last row or column, too."""

    def ssim(self, pred: NDArray[np.float64], gt: NDArray[np.bool_]) -> float:
        """Return the similarity of a quarter; an empty one has weight 0, but its NaN would pass through that."""
        return super().ssim(pred, gt) if pred.size else 0.0


def image_metrics(logits: Tensor, inside: Tensor, mask: NDArray[np.bool_]) -> dict[str, float]:
    """Return the ``METRICS`` of one prediction, each in 0..1, the higher the better.

    The padding is cut off and the logits are resized bilinearly to the mask's own size, as SAM does. Then:

    - ``s_measure``: structure (alpha .5); ``e_adaptive``, ``e_mean``: enhanced alignment at the adaptive threshold, and
      averaged over the 256 thresholds; ``wf``, ``wf_03``: weighted F-measure at beta^2 = 1 (the field's) and .3
      (InfoSAM's). Of the probabilities in 256 steps, by pysodmetrics, which follows the authors' MATLAB.
    - ``jaccard``, ``dice``: of the pixels with a logit above 0, a probability above 1/2.
    - ``iou``: the mean of the IoUs of the pixels with a *logit* above .1, .3, .5, .7 and .9 (probabilities .52 to .71).
      InfoSAM's code puts these thresholds to the logits, as do the SAM fine-tuning codes it comes from, and this
      column is for comparison with its tables; at probabilities of .1 to .9 it would be another number.

    For S, E and weighted F InfoSAM's code clips the *logits* to 0..1 where the probabilities are meant: its columns
    are nearer to those of a binary mask. A perfect prediction has an ``e_mean`` of 1 - .75 / 256, because everything is
    foreground at threshold 0. The adaptive threshold is twice the mean probability and at most 1: where more than half
    of the image is predicted, only probabilities that round to 1 (logits from 6.3) stay foreground. An empty prediction
    still has an S- and E-measure for its background, and a weighted F above 0 if the mask touches the image's border.

    Args:
        logits: ``[S, S]``, at the size of the model's input.
        inside: ``[S, S]``, 1 where the image is (top left) and 0 in the padding.
        mask: ``[H, W]`` at its own size, bool.

    Raises:
        TypeError: the mask is not bool.
        ValueError: the shapes do not fit together, a logit in the image is not finite, or the mask has no foreground.

    """
    resized = resized_logits(logits, inside, mask)
    # The measures are of maps in 256 grey values, and two of them need exact zeros and ones: for the S-measure a
    # quarter of 1e-9 without foreground is all wrong, and of .9999 nothing reaches an adaptive threshold of 1.
    probability = (255 * resized.sigmoid().double()).round().numpy() / 255
    values = {**saliency_metrics(probability, mask), **overlap_metrics(resized.numpy(), mask)}
    # The E-measure divides by one pixel less than there are, as the original does: a perfect one is above 1.
    return {name: min(float(values[name]), 1.0) for name in METRICS}


def mean_iou(logits: Tensor, inside: Tensor, masks: NDArray[np.bool_]) -> float:
    """Return the ``iou`` of :func:`image_metrics`, the mean over the masks ``[p, H, W]`` of an image.

    Args:
        logits: ``[p, S, S]``.
        inside: ``[S, S]``.
        masks: at their own size, bool, each with foreground.

    """
    pairs = zip(logits, masks, strict=True)
    return float(
        np.mean([overlap_metrics(resized_logits(one, inside, mask).numpy(), mask)["iou"] for one, mask in pairs])
    )


def resized_logits(logits: Tensor, inside: Tensor, mask: NDArray[np.bool_]) -> Tensor:
    """Return logits ``[S, S]`` without their padding, at the size of a mask; raise as :func:`image_metrics` does."""
    if logits.ndim != 2 or inside.shape != logits.shape:
        raise ValueError(
            f"image_metrics: inside must have the shape [S, S] of logits, got {tuple(inside.shape)} and "
            f"{tuple(logits.shape)}; pass those of one image"
        )
    if mask.dtype != np.bool_:
        raise TypeError(f"image_metrics: mask must be bool, got {mask.dtype}; compare it with its threshold")
    if mask.ndim != 2 or not mask.any():
        raise ValueError(f"image_metrics: mask must be [H, W] with foreground, got {mask.shape}; leave this image out")
    height, width = int(inside.any(1).sum()), int(inside.any(0).sum())
    cropped = logits.detach().float()[:height, :width]
    if not cropped.isfinite().all():
        raise ValueError("image_metrics: logits must be finite, got NaN or inf; lower the learning rate")
    return F.interpolate(cropped[None, None], mask.shape, mode="bilinear", align_corners=False)[0, 0].cpu()


def saliency_metrics(probability: NDArray[np.float64], mask: NDArray[np.bool_]) -> dict[str, float]:
    """Return S-, E- and weighted F-measures of probabilities ``[H, W]``."""
    s_measure, e_measure = SMeasure(alpha=0.5), py_sod_metrics.Emeasure()
    # What this package calls beta stands where the formula has beta squared.
    wf, wf_03 = py_sod_metrics.WeightedFmeasure(beta=1), py_sod_metrics.WeightedFmeasure(beta=0.3)
    for measure in (s_measure, e_measure, wf, wf_03):
        # By default it takes grey values of 0 to 255, divides by 255 and stretches each image to 0..1. Of probabilities
        # the stretch would make a full mask out of a prediction of 1e-9 everywhere but 2e-9 in one place, and take the
        # foreground from one of .9 everywhere. Without it, floats in 0..1 and a bool mask are used as they are.
        measure.step(probability, mask, normalize=False)
    e_values = e_measure.get_results()["em"]
    return {
        "s_measure": s_measure.get_results()["sm"],
        "e_adaptive": e_values["adp"],
        "e_mean": e_values["curve"].mean(),
        "wf": wf.get_results()["wfm"],
        "wf_03": wf_03.get_results()["wfm"],
    }


def overlap_metrics(logits: NDArray[np.float32], mask: NDArray[np.bool_]) -> dict[str, float]:
    """Return Jaccard index and Dice at logit 0, and the IoU averaged over its thresholds, of logits ``[H, W]``."""
    jaccard = jaccard_index(logits > 0, mask)
    return {
        "jaccard": jaccard,
        "dice": 2 * jaccard / (1 + jaccard),
        "iou": float(np.mean([jaccard_index(logits > threshold, mask) for threshold in IOU_THRESHOLDS])),
    }


def jaccard_index(predicted: NDArray[np.bool_], mask: NDArray[np.bool_]) -> float:
    """Return the pixels in both over the pixels in either."""
    return np.count_nonzero(predicted & mask) / np.count_nonzero(predicted | mask)
