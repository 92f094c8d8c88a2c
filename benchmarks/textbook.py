"""The InfoSAM loss as its equations read: the yardstick for values, gradients, speed and memory.

LayerNorm of every pixel, key projection of every pixel, the matrix product, the normalised relation, Grams by einsum.
Nothing is fused and nothing is guarded; in particular there is no answer for zero features or a single sample.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from renyi_kd import InfoSAMTerms, RelationModule, SAMFeatures


def relation_maps(relation: RelationModule, features: SAMFeatures) -> Tensor:
    """Return the relation maps ``[s, n * h * w]``, L2-normalised."""
    image_features, mask_tokens, image_index = features
    if image_index is not None:
        image_features = image_features[image_index]
    pixels = F.layer_norm(
        rearrange(image_features, "s d h w -> s (h w) d"),
        (relation.dim,),
        relation.layer_norm_feat.weight,
        relation.layer_norm_feat.bias,
        relation.layer_norm_feat.eps,
    )
    tokens = relation.layer_norm_mask(mask_tokens)
    queries, keys = relation.query_proj(tokens), relation.key_proj(pixels)
    scores = queries @ keys.mT / math.sqrt(relation.dim) + tokens @ pixels.mT
    return F.normalize(scores.flatten(1), dim=-1)


def infosam_terms(
    relation: RelationModule,
    teacher: SAMFeatures,
    student: SAMFeatures,
    *,
    lambda_r: float = 1.0,
    lambda_d: float = 0.5,
) -> InfoSAMTerms:
    """Return the loss at alpha = 2 and its terms, in bits, in the dtype of the features."""
    teacher = SAMFeatures(teacher.image_features.detach(), teacher.mask_tokens.detach(), teacher.image_index)
    teacher_gram = trace_normalised(gram(relation_maps(relation, teacher)))
    student_gram = trace_normalised(gram(relation_maps(relation, student)))
    images = teacher.image_features if teacher.image_index is None else teacher.image_features[teacher.image_index]
    image_gram = trace_normalised(gram(F.normalize(images.flatten(1), dim=-1)))
    token_gram = trace_normalised(gram(F.normalize(teacher.mask_tokens.flatten(1), dim=-1)))
    joint_of_teacher = trace_normalised(image_gram * token_gram * teacher_gram)
    joint_of_both = trace_normalised(teacher_gram * student_gram)
    compression = -log2_squared_norm(teacher_gram) + log2_squared_norm(joint_of_teacher)
    distillation = log2_squared_norm(teacher_gram) + log2_squared_norm(student_gram) - log2_squared_norm(joint_of_both)
    return InfoSAMTerms(lambda_r * compression + lambda_d * distillation, compression, distillation)


def gram(rows: Tensor) -> Tensor:
    """Return the inner products of rows ``[s, k]``."""
    return torch.einsum("ik,jk->ij", rows, rows)


def trace_normalised(matrix: Tensor) -> Tensor:
    """Return a matrix of trace one."""
    return matrix / matrix.trace()


def log2_squared_norm(matrix: Tensor) -> Tensor:
    """Return the base-2 logarithm of the squared Frobenius norm."""
    return matrix.square().sum().log2()
