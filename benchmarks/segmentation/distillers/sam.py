"""The two distillations that were made for SAM."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.nn import functional as F

from benchmarks.segmentation.distillers.base import EPS, Distiller
from benchmarks.segmentation.distillers.outputs import iou
from benchmarks.segmentation.observation import Observation


class MobileSAM(Distiller):
    """MSE of the image features, weight 1.

    Source: Zhang et al.: Faster Segment Anything: Towards Lightweight SAM for Mobile Applications, 2023,
    arXiv 2306.14289. The source gives no weight: there it is the only loss.
    """

    def loss(self, teacher: Observation, student: Observation, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the mean squared error."""
        return F.mse_loss(student.features.image_features, teacher.features.image_features)


class TinySAM(Distiller):
    """L1 of image features + L1 of all mask tokens + mean over masks of H_i times the L1 of mask i's logits.

    H_i = sigmoid(IoU_T / (IoU_S + 1e-6) - 1), without gradient, of the IoUs of the binarised predictions with the
    ground truth: 1/2 where the student is as good as the teacher, near 1 where it is far behind.

    Source: Shu et al.: TinySAM: Pushing the Envelope for Efficient Segment Anything Model, AAAI 2025,
    arXiv 2312.13789, equations 1 to 7; the L1 distance is the source's. Its weights alpha, beta and gamma and its
    epsilon are not published: all weights are 1 here. There the masks are summed; the mean here makes the loss
    independent of their number. The L1 of a mask is the mean over the pixels of the image. Without the sampling of
    hard prompts, which is not a loss, and the losses on masks and IoUs, which do not involve the teacher.
    """

    def loss(self, teacher: Observation, student: Observation, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the sum of the three terms."""
        embedding = F.l1_loss(student.features.image_features, teacher.features.image_features)
        token = F.l1_loss(student.features.mask_tokens, teacher.features.mask_tokens)
        inside = batch["inside"].bool()
        error = (student.logits.where(inside, 0) - teacher.logits.where(inside, 0)).abs()
        per_mask = error.sum((-2, -1)) / inside.sum((-2, -1)).clamp(min=1)
        of_teacher, of_student = (iou(each.logits, batch["masks"], inside) for each in (teacher, student))
        hardness = (of_teacher / (of_student + EPS) - 1).sigmoid()
        return embedding + token + (hardness * per_mask).mean()
