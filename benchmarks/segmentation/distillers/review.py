"""Distillation of the encoder's stages, each with what the student knows in it and in all later ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.segmentation.distillers.base import Distiller
from benchmarks.segmentation.observation import Observation

# Of the authors' code, as are the halving weights of the sizes.
MAX_WIDTH = 512
POOLED_SIZES = (4, 2, 1)


class ReviewKD(Distiller):
    """Sum over stages of the hierarchical distance between the fused student and the teacher, weight 1.

    From the last stage to the first, a stage is fused with the fusion of the later ones by two attention maps, and a
    3x3 convolution of it stands for the student. The distance is the MSE at full size and pooled to 4 x 4, 2 x 2 and 1,
    weighted 1, 1/2, 1/4, 1/8 over their sum, without the sizes that the map does not exceed.

    Source: Chen et al.: Distilling Knowledge via Knowledge Review, CVPR 2021, arXiv 2104.09044, and the authors' code;
    the weight is the default of its detection part. Here teacher and student have the same
    stages, so the fused map needs no resizing.
    """

    needs_layers = True

    def __init__(self, layer_channels: Sequence[int]) -> None:
        super().__init__(layer_channels)
        width = min(MAX_WIDTH, layer_channels[-1])
        last = len(layer_channels) - 1
        self.fusions = nn.ModuleList(
            Fusion(channels, width, with_later=index < last) for index, channels in enumerate(layer_channels)
        )

    def loss(self, teacher: Observation, student: Observation, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the distance."""
        total, fused = student.logits.new_zeros(()), None
        triples = zip(self.fusions, student.layers, teacher.layers, strict=True)
        for fusion, layer, target in reversed(list(triples)):
            found, fused = fusion(layer, fused)
            total = total + hierarchical_distance(found, target)
        return total


class Fusion(nn.Module):
    """A stage of the student and the fusion of the later stages, weighed by two attention maps."""

    def __init__(self, channels: int, width: int, *, with_later: bool) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width))
        self.leave = nn.Sequential(nn.Conv2d(width, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))
        self.attention = nn.Conv2d(2 * width, 2, 1) if with_later else None
        for convolution in (self.enter[0], self.leave[0]):
            nn.init.kaiming_uniform_(convolution.weight, a=1)

    def forward(self, layer: Tensor, later: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return what stands for the student, of the stage's channels, and the fusion for the stage before."""
        fused = self.enter(layer)
        if self.attention is not None:
            later = F.interpolate(later, fused.shape[-2:], mode="nearest")
            own, others = self.attention(torch.cat([fused, later], 1)).sigmoid().chunk(2, 1)
            fused = own * fused + others * later
        return self.leave(fused), fused


def hierarchical_distance(found: Tensor, target: Tensor) -> Tensor:
    """Return the weighted mean of the MSEs of maps ``[b, c, h, w]`` at several sizes."""
    distance, weight, total = F.mse_loss(found, target), 1.0, 1.0
    for size in POOLED_SIZES:
        if size < min(found.shape[-2:]):
            weight /= 2
            total += weight
            pooled, pooled_target = (F.adaptive_avg_pool2d(maps, size) for maps in (found, target))
            distance = distance + weight * F.mse_loss(pooled, pooled_target)
    return distance / total
