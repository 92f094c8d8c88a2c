"""Inputs of the relation's directions, and the textbook form of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from renyi_kd.ops.relation_directions import RelationWeights
from tests.support import randn

EPS = 1e-5
NAMES = ("mask_tokens", *RelationWeights._fields)


def directions_inputs(s: int, n: int, d: int, dtype: torch.dtype = torch.float64, draw: int = 0) -> tuple[Tensor, ...]:
    """Return tokens and weights that require gradients; biases and LayerNorms are not at their initial values."""
    shapes = [(s, n, d), (d,), (d,), (d, d), (d,), (d, d), (d,), (d,), (d,)]
    values = [randn(*shape, seed=seed) for seed, shape in enumerate(shapes, draw * len(shapes))]
    return tuple((value / math.sqrt(d) if value.shape == (d, d) else value).to(dtype) for value in values)


def textbook_directions(mask_tokens: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
    w, d = RelationWeights(*parameters), mask_tokens.shape[-1]
    m = F.layer_norm(mask_tokens, (d,), w.norm_weight, w.norm_bias, EPS)
    q = F.linear(m, w.query_weight, w.query_bias) / math.sqrt(d)
    u = q @ w.key_weight + m
    return u * w.feature_weight, q @ w.key_bias + u @ w.feature_bias


def directions_and_gradients(function, values: tuple[Tensor, ...]) -> dict[str, Tensor]:
    leaves = [value.detach().clone().requires_grad_() for value in values]
    directions, offsets = function(*leaves)
    upstream = [randn(*out.shape, seed=20 + i).to(out) * -1.7 for i, out in enumerate((directions, offsets))]
    gradients = torch.autograd.grad([directions, offsets], leaves, upstream)
    named = {f"gradient of {name}": gradient for name, gradient in zip(NAMES, gradients, strict=True)}
    return {"directions": directions, "offsets": offsets, **named}
