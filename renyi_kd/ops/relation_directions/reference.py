r"""From mask tokens to the directions and offsets of their scores: the projections of query and key, folded together.

    m = LN(z)    q = (W_Q m + b_Q) / sqrt(d)    u = W_K^T q + m    w = gamma u    c = q . b_K + u . beta

Over the rows of a batch, with dw and dc given,

    du = gamma dw + beta dc    dq = W_K du + b_K dc    dm = du + W_Q^T dq / sqrt(d)

and the gradient of z is LayerNorm's; those of the weights are the outer products ``dW_K = q^T du`` and ``dW_Q = dq^T m
/ sqrt(d)``, and sums. By hand, because autograd's thirty operations on some rows of 256 numbers cost as much as a read
of the maps. A token whose channels are all alike has no direction: its gradient is 0, where LayerNorm would send it
1 / sqrt(eps) of its own.

Any float dtype (sums in fp32, in fp64 if anything is fp64). Extra memory: two rows of d numbers for every token. First
derivatives only.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from renyi_kd.ops.autograd import refuse_second_derivative
from renyi_kd.ops.relation_directions.types import RelationWeights


def relation_directions(mask_tokens: Tensor, weights: RelationWeights, *, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """Return the direction and the offset of every mask token's scores.

    Args:
        mask_tokens: ``[s, n, d]``, floating point.
        weights: the weights of the relation module, floating point, on the tokens' device.
        eps: added to the variance of the tokens.

    Returns:
        w ``[s, n, d]`` and c ``[s, n]`` in fp32, or fp64 if anything is fp64. First derivatives for tokens and weights.

    Raises:
        NotImplementedError: a second derivative is asked for.

    Cost: 2 d^2 products a token forward, twice that backward.

    Source: the attention score of InfoSAM (ICML 2025), with the key projection folded into w by associativity.

    """
    directions, offsets = _RelationDirections.apply(mask_tokens, eps, *weights)  # type: ignore[no-untyped-call]
    return directions, offsets


class _RelationDirections(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mask_tokens: Tensor, eps: float, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        dtype = torch.float32
        for value in (mask_tokens, *parameters):
            dtype = torch.promote_types(dtype, value.dtype)
        n_channels = mask_tokens.shape[-1]
        weights = RelationWeights(*(parameter.to(dtype) for parameter in parameters))
        with torch.autocast(mask_tokens.device.type, enabled=False):
            tokens = mask_tokens.flatten(0, 1).to(dtype)
            differs = (tokens != tokens[:, :1]).any(-1, keepdim=True)
            m, mean, rstd = torch.native_layer_norm(tokens, (n_channels,), weights.norm_weight, weights.norm_bias, eps)
            query = torch.addmm(weights.query_bias, m, weights.query_weight.mT).mul_(1 / math.sqrt(n_channels))
            u = torch.addmm(m, query, weights.key_weight)
            offsets = query @ weights.key_bias + u @ weights.feature_bias
            directions = u * weights.feature_weight
        ctx.save_for_backward(mask_tokens, *parameters, mean, rstd * differs, query, u)
        return directions.view(mask_tokens.shape), offsets.view(mask_tokens.shape[:2])

    @staticmethod
    def backward(ctx: Any, grad_directions: Tensor, grad_offsets: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("relation_directions", "differentiate a textbook implementation instead")
        mask_tokens, *parameters, mean, rstd, query, u = ctx.saved_tensors
        dtype, scale = query.dtype, 1 / math.sqrt(query.shape[-1])
        weights = RelationWeights(*(parameter.to(dtype) for parameter in parameters))
        with torch.autocast(mask_tokens.device.type, enabled=False):
            unit = (mask_tokens.flatten(0, 1) - mean) * rstd
            m = torch.addcmul(weights.norm_bias, unit, weights.norm_weight)
            dw, dc = grad_directions.flatten(0, 1), grad_offsets.flatten()[:, None]
            du = torch.addcmul(dw * weights.feature_weight, dc, weights.feature_bias)
            dq = torch.addmm(dc * weights.key_bias, du, weights.key_weight.mT).mul_(scale)
            dm = torch.addmm(du, dq, weights.query_weight)
            along = dm * weights.norm_weight
            centred = along - along.mean(-1, keepdim=True)
            grad_tokens = (centred - unit * (along * unit).mean(-1, keepdim=True)) * rstd
            gradients = RelationWeights(
                norm_weight=(dm * unit).sum(0),
                norm_bias=dm.sum(0),
                query_weight=dq.mT @ m,
                query_bias=dq.sum(0),
                key_weight=query.mT @ du,
                key_bias=(dc * query).sum(0),
                feature_weight=(dw * u).sum(0),
                feature_bias=(dc * u).sum(0),
            )
        grad_parameters = (gradient.to(p.dtype) for gradient, p in zip(gradients, parameters, strict=True))
        return grad_tokens.view(mask_tokens.shape).to(mask_tokens.dtype), None, *grad_parameters
