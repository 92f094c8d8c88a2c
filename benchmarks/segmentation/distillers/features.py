"""Distillation of the image features of one layer, the encoder's output."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.segmentation.distillers.base import EPS, Distiller
from benchmarks.segmentation.observation import Observation

# Of the authors' configurations for a two-stage detector, per level of its pyramid (10 for a one-stage detector).
PKD_WEIGHT = 6.0
# Of the scripts of RepDistiller and of SemCKD; the authors' own code has no second loss to weigh it against.
PKT_WEIGHT = 30_000.0
PKT_EPS = 1e-7
# Both of RepDistiller's copy of the authors' code; the weight there is 1.
VID_VARIANCE = 5.0
VID_EPS = 1e-5


class PKD(Distiller):
    """6 times MSE / 2 of channel-standardised features, which is 1 - Pearson's correlation, the mean over channels.

    Source: Cao et al.: PKD: General Distillation Framework for Object Detectors via Pearson Correlation Coefficient,
    NeurIPS 2022, arXiv 2207.02039. There on every level of a pyramid; here on the one map that there is. The variance
    is the population's plus 1e-6, so that constant channels have a finite gradient; there 1e-6 is added to the sample's
    deviation.
    """

    def loss(self, teacher: Observation, student: Observation, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the distance, 6 * (1 - r)."""
        t, s = (_standardised(observation.features.image_features) for observation in (teacher, student))
        return PKD_WEIGHT * F.mse_loss(s, t) / 2


class PKT(Distiller):
    """30,000 times the mean of p_T log(p_T / p_S), p_ij = (cos_ij + 1) / 2 over its sum over j, i and j images.

    Source: Passalis, Tefas: Learning Deep Representations with Probabilistic Knowledge Transfer, ECCV 2018,
    arXiv 1803.10837. As in the authors' code the diagonal, cos = 1, is kept, 1e-7 is added to both probabilities and
    the mean is over all b^2 pairs, so the weight falls as 1 / b against a mean over rows. A sample is an image, by its
    features' mean over pixels: the source takes the vector before the classifier, which is such a mean too.
    """

    def loss(self, teacher: Observation, student: Observation, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the weighted divergence; two images or more."""
        check_two_images("PKT", student)
        t, s = (_similarities(observation.features.image_features) for observation in (teacher, student))
        return PKT_WEIGHT * (t * ((t + PKT_EPS) / (s + PKT_EPS)).log()).mean()


class VID(Distiller):
    """Mean of 1/2 ((mu(F_S) - F_T)^2 / sigma_c^2 + log sigma_c^2), weight 1; it may be negative.

    mu is three 1x1 convolutions with ReLU between them, without biases; sigma_c^2 = softplus(alpha_c) + 1e-5 starts at
    5.

    Source: Ahn et al.: Variational Information Distillation for Knowledge Transfer, CVPR 2019, arXiv 1904.05835. There
    on several layers and the logits; here on the image features alone.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        layers = [nn.Conv2d(dim, dim, 1, bias=False) for _ in range(3)]
        self.mean = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
        # The softplus of it is VID_VARIANCE - VID_EPS.
        self.alpha = nn.Parameter(torch.full((dim,), math.log(math.expm1(VID_VARIANCE - VID_EPS))))

    def loss(self, teacher: Observation, student: Observation, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the negative log-likelihood of the teacher's features in nats, but for a constant."""
        variance = (F.softplus(self.alpha) + VID_EPS)[:, None, None]
        error = self.mean(student.features.image_features) - teacher.features.image_features
        return ((error.square() / variance + variance.log()) / 2).mean()


def check_two_images(function: str, student: Observation) -> None:
    """Raise if there is nothing to compare an image with.

    Raises:
        ValueError: there are fewer than two images.

    """
    n_images = len(student.features.image_features)
    if n_images < 2:
        raise ValueError(
            f"{function}: the batch must hold at least two images, got {n_images}: similarities of one image say "
            "nothing; use a larger batch, and drop the last one if it is smaller"
        )


def _standardised(features: Tensor) -> Tensor:
    """Return features ``[b, c, h, w]`` with mean 0 and variance 1 per channel, over images and pixels."""
    variance, mean = torch.var_mean(features, (0, 2, 3), correction=0, keepdim=True)
    return (features - mean) * (variance + EPS).rsqrt()


def _similarities(features: Tensor) -> Tensor:
    unit = F.normalize(features.mean((2, 3)), dim=1, eps=EPS)
    similarities = (unit @ unit.mT + 1) / 2
    return similarities / similarities.sum(1, keepdim=True)
