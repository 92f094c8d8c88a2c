"""Distillation of the encoder's stages, each teacher's with all of the student's, by learned attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from einops import einsum, rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.segmentation.distillers.base import EPS, Distiller
from benchmarks.segmentation.distillers.features import check_two_images
from benchmarks.segmentation.distillers.outputs import bernoulli_kl
from benchmarks.segmentation.observation import Observation

# Of the authors' training code: both soft-label terms together weigh 1.
IBD_FEATURES = 0.8
IBD_WIDTH = 128
# Of the authors' script for CIFAR-100.
SEMCKD_WEIGHT = 400.0
# Rows of similarities are as long as the authors' batches; a smaller batch leaves the rest zero.
SEMCKD_BATCH = 64
# The source has no limit: its 3x3 convolutions for the 16 pairs of four stages of ViT-B would hold 340 million weights.
SEMCKD_WIDTH = 256


class IBD(Distiller):
    """KL(p_T || p_S) of the masks + 0.8 sum over teacher stages t of sum over student stages s a_ts d_ts.

    d_ts is the mean squared difference, over pixels, of the stages' energy maps: mean over channels of F^2, pooled to
    the teacher's size, L2-normalised. The attention a is a softmax over s of (k_st . q_t + p_t . p_s) / sqrt(128), with
    q and k from the stages' means over pixels; per image, and the loss is their mean.

    Source: Kuang et al.: Improving Adversarial Robustness via Information Bottleneck Distillation, NeurIPS 2023, and
    the authors' code for the attention and the weights. There the student sees adversarial images and the terms for
    clean and adversarial soft labels weigh 0.2 and 0.8; here there are only clean ones, so they are one term of weight
    1. A Bernoulli KL per pixel stands for that of classes, and LayerNorm for BatchNorm, which is noise for 4 vectors.
    """

    needs_layers = True

    def __init__(self, layer_channels: Sequence[int]) -> None:
        super().__init__(layer_channels)
        n_layers = len(layer_channels)
        self.query = nn.ModuleList(
            nn.Sequential(nn.Linear(channels, IBD_WIDTH), nn.LayerNorm(IBD_WIDTH)) for channels in layer_channels
        )
        self.key = nn.ModuleList(
            nn.Sequential(nn.Linear(channels, IBD_WIDTH), nn.LayerNorm(IBD_WIDTH), nn.ReLU())
            for channels in layer_channels
        )
        wide = IBD_WIDTH * n_layers
        self.key_of_teacher = nn.Sequential(nn.Linear(IBD_WIDTH, wide), nn.LayerNorm(wide))
        self.teacher_position = nn.Parameter(nn.init.xavier_normal_(torch.empty(n_layers, IBD_WIDTH)))
        self.student_position = nn.Parameter(nn.init.xavier_normal_(torch.empty(n_layers, IBD_WIDTH)))

    def loss(self, teacher: Observation, student: Observation, batch: Mapping[str, Tensor]) -> Tensor:
        """Return both terms, the KL in nats."""
        attention = self._attention(teacher.layers, student.layers)
        features = student.logits.new_zeros(())
        for index, layer in enumerate(teacher.layers):
            size = layer.shape[-2:]
            target = _energy(layer, size)
            distances = [(_energy(other, size) - target).square().mean(1) for other in student.layers]
            features = features + (attention[:, index] * torch.stack(distances, 1)).sum(1).mean()
        return bernoulli_kl(teacher.logits, student.logits, batch["inside"], 1.0) + IBD_FEATURES * features

    def _attention(self, teacher: Sequence[Tensor], student: Sequence[Tensor]) -> Tensor:
        """Return the weights ``[b, t, s]``, which sum to 1 over s."""
        queries = torch.stack([embed(layer.mean((2, 3))) for embed, layer in zip(self.query, teacher, strict=True)], 1)
        keys = torch.stack([embed(layer.mean((2, 3))) for embed, layer in zip(self.key, student, strict=True)], 1)
        keys = rearrange(self.key_of_teacher(keys), "b s (t d) -> b s t d", d=IBD_WIDTH)
        scores = einsum(keys, queries, "b s t d, b t d -> b t s") + self.teacher_position @ self.student_position.T
        return (scores / IBD_WIDTH**0.5).softmax(-1)


class SemCKD(Distiller):
    """400 / l times the mean over images of sum over l^2 pairs of stages (s, t) a_st MSE(g_st(F_S), F_T).

    The attention a_st of an image is a softmax over t of q_s . k_t: unit vectors that an MLP makes of the image's row
    in the b x b inner products of flattened stages. g_st is a 1x1, a 3x3 and a 1x1 convolution with BatchNorm and ReLU
    between them; of stages of two sizes the larger is pooled to the smaller.

    Source: Chen et al.: Cross-Layer Distillation with Semantic Calibration, AAAI 2021, arXiv 2012.03236, and the
    authors' code for the embeddings and the weight. There the MLP is made for one size of batch; here a batch of at
    most 64, theirs, fills the first entries of a row of zeros. The middle of g has at most 256 channels. The weight is
    the source's beside its logit term, which is left out: "logit" is a loss of its own here.
    """

    needs_layers = True

    def __init__(self, layer_channels: Sequence[int]) -> None:
        super().__init__(layer_channels)
        self.query = nn.ModuleList(_row_embedding() for _ in layer_channels)
        self.key = nn.ModuleList(_row_embedding() for _ in layer_channels)
        self.projections = nn.ModuleList(
            nn.ModuleList(_projection(of_student, of_teacher) for of_teacher in layer_channels)
            for of_student in layer_channels
        )

    def loss(self, teacher: Observation, student: Observation, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the weighted distance; 2 to 64 images."""
        check_two_images("SemCKD", student)
        n_images, n_layers = len(student.logits), len(student.layers)
        if n_images > SEMCKD_BATCH:
            raise ValueError(
                f"SemCKD: the batch must hold at most {SEMCKD_BATCH} images, got {n_images}; use a smaller batch"
            )
        queries = torch.stack([embed(_rows(layer)) for embed, layer in zip(self.query, student.layers, strict=True)], 1)
        keys = torch.stack([embed(_rows(layer)) for embed, layer in zip(self.key, teacher.layers, strict=True)], 1)
        unit_queries, unit_keys = (F.normalize(vectors, dim=-1, eps=EPS) for vectors in (queries, keys))
        attention = (unit_queries @ unit_keys.mT).softmax(-1)
        distances = [
            _distances(project, of_student, of_teacher)
            for of_student, projections in zip(student.layers, self.projections, strict=True)
            for of_teacher, project in zip(teacher.layers, projections, strict=True)
        ]
        return SEMCKD_WEIGHT * (attention.flatten(1) * torch.stack(distances, 1)).sum() / (n_images * n_layers)


def _energy(layer: Tensor, size: Sequence[int]) -> Tensor:
    """Return the L2-normalised energy of every pixel, ``[b, h * w]`` at a size."""
    energy = F.adaptive_avg_pool2d(layer.square().mean(1), size)
    return F.normalize(energy.flatten(1), dim=1, eps=EPS)


def _rows(layer: Tensor) -> Tensor:
    """Return every image's inner products with all images, ``[b, 64]``."""
    flat = layer.flatten(1)
    return F.pad(flat @ flat.mT, (0, SEMCKD_BATCH - len(flat)))


def _row_embedding() -> nn.Module:
    return nn.Sequential(
        nn.Linear(SEMCKD_BATCH, SEMCKD_BATCH // 2), nn.ReLU(), nn.Linear(SEMCKD_BATCH // 2, SEMCKD_BATCH // 4)
    )


def _projection(channels: int, target: int) -> nn.Module:
    width = min(2 * target, SEMCKD_WIDTH)
    return nn.Sequential(
        nn.Conv2d(channels, width, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, target, 1, bias=False),
    )


def _distances(project: nn.Module, of_student: Tensor, of_teacher: Tensor) -> Tensor:
    """Return every image's mean squared error between a projected stage and a stage, ``[b]``."""
    size = [min(sides) for sides in zip(of_student.shape[-2:], of_teacher.shape[-2:], strict=True)]
    found, target = (F.adaptive_avg_pool2d(layer, size) for layer in (of_student, of_teacher))
    return (project(found) - target).square().mean((1, 2, 3))
