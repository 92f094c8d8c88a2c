"""Distillation of the relation between image features and mask tokens: InfoSAM, and its module beside other losses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from benchmarks.segmentation.distillers.base import Distiller
from benchmarks.segmentation.observation import Observation
from renyi_kd import InfoSAMLoss, SAMFeatures


def seeded_loss(dim: int, **settings: Any) -> InfoSAMLoss:
    """Return a loss whose relation module begins otherwise in every run, by the seed that torch was given for it."""
    return InfoSAMLoss(dim, **settings, generator=torch.Generator().manual_seed(torch.initial_seed()))


class InfoSAM(Distiller):
    """:class:`renyi_kd.InfoSAMLoss` of the features, in bits; two samples (image, prompt) or more.

    Source: Zhang et al.: InfoSAM: Fine-Tuning the Segment Anything Model from An Information-Theoretic Perspective,
    ICML 2025, arXiv 2505.21920.

    Attributes:
        infosam: the loss, with its relation module and ``scalars()``.

    """

    def __init__(self, infosam: InfoSAMLoss) -> None:
        super().__init__()
        self.infosam = infosam
        self._made_a_step = False

    def loss(self, teacher: Observation, student: Observation, batch: Mapping[str, Tensor]) -> Tensor:
        """Return lambda_r L_r + lambda_d L_d."""
        self._made_a_step = True
        loss: Tensor = self.infosam(teacher.features, student.features)
        return loss

    def state(self) -> dict[str, float]:
        """Return terms, similarities, entropies and the share of the gradient in the last step; empty before one."""
        return self.infosam.scalars() if self._made_a_step else {}


class WithRelation(Distiller):
    """A distiller + the distance of the relation maps + L_r with weight 1.

    The distance is the squared L2 distance of teacher's and student's relation maps, which are unit vectors, the mean
    over samples: 2 - 2 cosine. A mean over pixels too would be at most 4 / (h w), nothing beside the other terms. The
    relation module is trained by L_r alone: it would make the distance small by forgetting the features.

    Source: a reading of Table 5 of InfoSAM (arXiv 2505.21920), where MobileSAM's and TinySAM's distillation gain from
    the relation module. The source says neither which distance is meant, nor how the module is trained, nor the
    weights: all are 1 here.
    """

    def __init__(self, plain: Distiller, dim: int) -> None:
        super().__init__()
        self.plain = plain
        self.infosam = seeded_loss(dim, lambda_r=1.0, lambda_d=0.0)
        self.terms: tuple[Tensor, Tensor] | None = None

    def loss(self, teacher: Observation, student: Observation, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the sum of the three terms."""
        compression = self.infosam.terms(teacher.features, student.features).compression
        difference = self._relation(student.features) - self._relation(teacher.features)
        distance = difference.square().flatten(1).sum(1).mean()
        self.terms = (compression.detach(), distance.detach())
        return self.plain.loss(teacher, student, batch) + distance + compression

    def _relation(self, features: SAMFeatures) -> Tensor:
        """Return the relation maps of the first token ``[s, 1, h, w]``, without gradient for the module."""
        frozen = {name: value.detach() for name, value in self.infosam.relation.named_parameters()}
        arguments = (features.image_features, features.mask_tokens[:, :1], features.image_index)
        return functional_call(self.infosam.relation, frozen, arguments)

    def state(self) -> dict[str, float]:
        """Return L_r, the distance, and the similarities and entropies of the relations; empty before a step."""
        if self.terms is None:
            return {}
        compression, distance = self.terms
        terms = {"compression": compression.item(), "relation_distance": distance.item()}
        return {**terms, **_diagnostics(self.infosam)}


def _diagnostics(infosam: InfoSAMLoss) -> dict[str, float]:
    diagnostics = infosam.diagnostics()
    names = ("teacher_similarity", "student_similarity", "teacher_entropy", "student_entropy")
    return {name: getattr(diagnostics, name).item() for name in names}
