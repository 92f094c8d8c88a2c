"""Distillation of the mask logits, and what can be said of masks inside the image."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.nn import functional as F

from benchmarks.segmentation.distillers.base import Distiller
from benchmarks.segmentation.observation import Observation

# Of ONE, whose loss adds the term with weight 1.
TEMPERATURE = 3.0


class Logit(Distiller):
    """T^2 KL(p_T || p_S) of the softened masks, a Bernoulli distribution per pixel; weight 1, as in the source.

    Source: Lan, Zhu, Gong: Knowledge Distillation by On-the-Fly Native Ensemble (ONE), NeurIPS 2018,
    arXiv 1806.04606. There the softmax of classes from an ensemble that learns too; here sigmoids of pixels from a
    frozen teacher, and the mean over the pixels of the images, not over samples.
    """

    def loss(self, teacher: Observation, student: Observation, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the divergence in nats."""
        return TEMPERATURE**2 * bernoulli_kl(teacher.logits, student.logits, batch["inside"], TEMPERATURE)


def bernoulli_kl(teacher: Tensor, student: Tensor, inside: Tensor, temperature: float) -> Tensor:
    """Return KL(p_T || p_S) in nats, the mean over the pixels inside the images; logits ``[b, p, S, S]``."""
    # Before the divergence, so that nothing in the padding has a gradient, NaN included.
    inside = inside.bool().expand_as(student)
    t, s = (logits.where(inside, 0) / temperature for logits in (teacher, student))
    kl = t.sigmoid() * (F.logsigmoid(t) - F.logsigmoid(s)) + (-t).sigmoid() * (F.logsigmoid(-t) - F.logsigmoid(-s))
    return kl.sum() / inside.sum().clamp(min=1)


def iou(logits: Tensor, masks: Tensor, inside: Tensor) -> Tensor:
    """Return the IoU of every binarised prediction with its mask, ``[b, p]``; 1 where both are empty."""
    inside, truth, found = inside.bool(), masks > 0.5, logits > 0
    overlap = (truth & found & inside).sum((-2, -1)).float()
    union = ((truth | found) & inside).sum((-2, -1)).float()
    return (overlap / union.clamp(min=1)).where(union > 0, 1)
