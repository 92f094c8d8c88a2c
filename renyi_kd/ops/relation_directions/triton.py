r"""Directions and offsets of mask tokens in one launch; backward in two: one program a token, then the weights.

    m = LN(z)    q = (W_Q m + b_Q) / sqrt(d)    u = W_K^T q + m    w = gamma u    c = q . b_K + u . beta
    du = gamma dw + beta dc    dq = (W_K du + b_K dc) / sqrt(d)    dm = du + W_Q^T dq
    dW_Q = dq^T m    dW_K = q^T du    and sums over the tokens for the rest

A program walks the rows of both matrices once, because a stretch of q is all that its row of W_K needs. The sums over
tokens are made by one program per tile of the weights, in the order of the tokens: no atomics, so results repeat bit
for bit. Extra memory: six rows of d numbers for every token. A token whose channels are all alike has gradient 0.

fp16, bf16, fp32, summed in fp32; any sizes >= 1. First derivatives only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from renyi_kd.ops.autograd import second_derivative_refusal
from renyi_kd.ops.relation_directions.types import RelationWeights

# Elements of a tile of a matrix, chosen so that nothing spills on any target; not measured on a GPU yet.
TILE = 4096
BLOCK_R, BLOCK_W = 16, 16
NUM_WARPS = 8


@triton.jit
def _load(ptr, places, inside):
    """Return values in fp32, 0 where they are not there."""
    return tl.load(ptr + places, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _relation_directions_fwd_kernel(
    tokens_ptr, norm_weight_ptr, norm_bias_ptr, query_weight_ptr, query_bias_ptr, key_weight_ptr, key_bias_ptr,
    feature_weight_ptr, feature_bias_ptr, directions_ptr, offsets_ptr, query_ptr, u_ptr, unit_ptr, rstd_ptr,
    n_channels, scale, eps, BLOCK_C: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Write direction and offset of one token, and what its gradient needs."""
    row = tl.program_id(0).to(tl.int64) * n_channels
    channels = tl.arange(0, BLOCK_C)
    inside = channels < n_channels
    x = _load(tokens_ptr, row + channels, inside)
    centred = tl.where(inside, x - tl.sum(x, 0) / n_channels, 0.0)
    alike = tl.max(tl.where(inside, x, -float("inf")), 0) == tl.min(tl.where(inside, x, float("inf")), 0)
    rstd = tl.where(alike, 0.0, 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / n_channels + eps))
    unit = centred * rstd
    m = unit * _load(norm_weight_ptr, channels, inside) + _load(norm_bias_ptr, channels, inside)
    u = m
    offset = 0.0
    for first in range(0, n_channels, BLOCK_J):
        j = first + tl.arange(0, BLOCK_J)
        in_j = j < n_channels
        places = j.to(tl.int64)[:, None] * n_channels + channels[None, :]
        in_tile = in_j[:, None] & inside[None, :]
        query = tl.sum(_load(query_weight_ptr, places, in_tile) * m[None, :], 1)
        query = (query + _load(query_bias_ptr, j, in_j)) * scale
        u += tl.sum(_load(key_weight_ptr, places, in_tile) * query[:, None], 0)
        offset += tl.sum(query * _load(key_bias_ptr, j, in_j), 0)
        tl.store(query_ptr + row + j, query, mask=in_j)
    offset += tl.sum(u * _load(feature_bias_ptr, channels, inside), 0)
    tl.store(directions_ptr + row + channels, u * _load(feature_weight_ptr, channels, inside), mask=inside)
    tl.store(offsets_ptr + tl.program_id(0), offset)
    tl.store(u_ptr + row + channels, u, mask=inside)
    tl.store(unit_ptr + row + channels, unit, mask=inside)
    tl.store(rstd_ptr + tl.program_id(0), rstd)


@triton.jit
def _relation_directions_bwd_kernel(
    norm_weight_ptr, query_weight_ptr, key_weight_ptr, key_bias_ptr, feature_weight_ptr, feature_bias_ptr,
    grad_directions_ptr, grad_offsets_ptr, unit_ptr, rstd_ptr, grad_u_ptr, grad_query_ptr, grad_m_ptr, grad_tokens_ptr,
    n_channels, direction_stride_r, offset_stride_r, scale, BLOCK_C: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Write the gradient of one token, and its shares in those of the weights."""
    token = tl.program_id(0).to(tl.int64)
    row = token * n_channels
    channels = tl.arange(0, BLOCK_C)
    inside = channels < n_channels
    grad_offset = tl.load(grad_offsets_ptr + token * offset_stride_r)
    grad_u = _load(grad_directions_ptr, token * direction_stride_r + channels, inside)
    grad_u *= _load(feature_weight_ptr, channels, inside)
    grad_u += grad_offset * _load(feature_bias_ptr, channels, inside)
    grad_m = grad_u
    for first in range(0, n_channels, BLOCK_J):
        j = first + tl.arange(0, BLOCK_J)
        in_j = j < n_channels
        places = j.to(tl.int64)[:, None] * n_channels + channels[None, :]
        in_tile = in_j[:, None] & inside[None, :]
        grad_query = tl.sum(_load(key_weight_ptr, places, in_tile) * grad_u[None, :], 1)
        grad_query = (grad_query + grad_offset * _load(key_bias_ptr, j, in_j)) * scale
        grad_m += tl.sum(_load(query_weight_ptr, places, in_tile) * grad_query[:, None], 0)
        tl.store(grad_query_ptr + row + j, grad_query, mask=in_j)
    tl.store(grad_u_ptr + row + channels, grad_u, mask=inside)
    tl.store(grad_m_ptr + row + channels, grad_m, mask=inside)
    unit = _load(unit_ptr, row + channels, inside)
    along = grad_m * _load(norm_weight_ptr, channels, inside)
    along_unit = tl.sum(along * unit, 0) / n_channels
    grad = (along - tl.sum(along, 0) / n_channels - unit * along_unit) * tl.load(rstd_ptr + tl.program_id(0))
    tl.store(grad_tokens_ptr + row + channels, grad.to(grad_tokens_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _store_sum(ptr, places, values, inside):
    """Store sums over tokens in the dtype of the weights."""
    tl.store(ptr + places, values.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def _relation_weights_bwd_kernel(
    norm_weight_ptr, norm_bias_ptr, grad_directions_ptr, grad_offsets_ptr, query_ptr, u_ptr, unit_ptr,
    grad_u_ptr, grad_query_ptr, grad_m_ptr,
    grad_norm_weight_ptr, grad_norm_bias_ptr, grad_query_weight_ptr, grad_query_bias_ptr, grad_key_weight_ptr,
    grad_key_bias_ptr, grad_feature_weight_ptr, grad_feature_bias_ptr,
    n_tokens, n_channels, direction_stride_r, offset_stride_r, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Write one tile of both matrices' gradients; the first programs along each side those of the vectors."""
    i = tl.program_id(0) * BLOCK_W + tl.arange(0, BLOCK_W)
    j = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    in_i, in_j = i < n_channels, j < n_channels
    norm_weight, norm_bias = _load(norm_weight_ptr, i, in_i), _load(norm_bias_ptr, i, in_i)
    query_sums = tl.zeros((BLOCK_W, BLOCK_W), tl.float32)
    key_sums = tl.zeros((BLOCK_W, BLOCK_W), tl.float32)
    norm_weight_sums = tl.zeros((BLOCK_W,), tl.float32)
    norm_bias_sums = tl.zeros((BLOCK_W,), tl.float32)
    feature_weight_sums = tl.zeros((BLOCK_W,), tl.float32)
    feature_bias_sums = tl.zeros((BLOCK_W,), tl.float32)
    query_bias_sums = tl.zeros((BLOCK_W,), tl.float32)
    key_bias_sums = tl.zeros((BLOCK_W,), tl.float32)
    for first in range(0, n_tokens, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        in_r = r < n_tokens
        tokens = r.to(tl.int64)
        rows = tokens[:, None] * n_channels
        in_ri, in_rj = in_r[:, None] & in_i[None, :], in_r[:, None] & in_j[None, :]
        grad_offsets = _load(grad_offsets_ptr, tokens * offset_stride_r, in_r)[:, None]
        unit = _load(unit_ptr, rows + i[None, :], in_ri)
        grad_query = _load(grad_query_ptr, rows + j[None, :], in_rj)
        query = _load(query_ptr, rows + j[None, :], in_rj)
        grad_u = _load(grad_u_ptr, rows + i[None, :], in_ri)
        # Past the last token m is the bias, and its gradient 0.
        m = unit * norm_weight[None, :] + norm_bias[None, :]
        query_sums = tl.dot(tl.trans(grad_query), m, query_sums, input_precision="ieee")
        key_sums = tl.dot(tl.trans(query), grad_u, key_sums, input_precision="ieee")
        grad_m = _load(grad_m_ptr, rows + i[None, :], in_ri)
        u = _load(u_ptr, rows + i[None, :], in_ri)
        norm_weight_sums += tl.sum(grad_m * unit, 0)
        norm_bias_sums += tl.sum(grad_m, 0)
        grad_directions = _load(grad_directions_ptr, tokens[:, None] * direction_stride_r + i[None, :], in_ri)
        feature_weight_sums += tl.sum(grad_directions * u, 0)
        feature_bias_sums += tl.sum(grad_offsets * u, 0)
        query_bias_sums += tl.sum(grad_query, 0)
        key_bias_sums += tl.sum(grad_offsets * query, 0)
    places = j.to(tl.int64)[:, None] * n_channels + i[None, :]
    in_tile = in_j[:, None] & in_i[None, :]
    _store_sum(grad_query_weight_ptr, places, query_sums, in_tile)
    _store_sum(grad_key_weight_ptr, places, key_sums, in_tile)
    if tl.program_id(1) == 0:
        _store_sum(grad_norm_weight_ptr, i, norm_weight_sums, in_i)
        _store_sum(grad_norm_bias_ptr, i, norm_bias_sums, in_i)
        _store_sum(grad_feature_weight_ptr, i, feature_weight_sums, in_i)
        _store_sum(grad_feature_bias_ptr, i, feature_bias_sums, in_i)
    if tl.program_id(0) == 0:
        _store_sum(grad_query_bias_ptr, j, query_bias_sums, in_j)
        _store_sum(grad_key_bias_ptr, j, key_bias_sums, in_j)


def block_sizes(n_channels: int) -> dict[str, int]:
    """Return the sizes of a tile of a matrix: all columns, and as many rows as fit beside them."""
    block_c = triton.next_power_of_2(n_channels)
    return {"BLOCK_C": block_c, "BLOCK_J": max(1, min(TILE // block_c, block_c))}


def launch_forward(
    tokens: Tensor, weights: Sequence[Tensor], eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return directions, offsets, and what the backward needs: q, u, the unit tokens and 1 / deviation; one launch."""
    directions, offsets, query, u, unit, rstd = outputs = empty_outputs(tokens)
    n_tokens, n_channels = tokens.shape
    with torch.cuda.device_of(tokens):
        _relation_directions_fwd_kernel[(n_tokens,)](
            tokens, *weights, directions, offsets, query, u, unit, rstd, n_channels, 1 / math.sqrt(n_channels), eps,
            **block_sizes(n_channels), num_warps=NUM_WARPS,
        )  # fmt: skip
    return outputs


def empty_outputs(tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return room for what the forward returns."""
    rows, numbers = tokens.shape, tokens.shape[:1]
    return tuple(  # type: ignore[return-value]
        tokens.new_empty(shape, dtype=torch.float32) for shape in (rows, numbers, rows, rows, rows, numbers)
    )


def launch_backward(
    weights: Sequence[Tensor],
    saved: Sequence[Tensor],
    grad_directions: Tensor,
    grad_offsets: Tensor,
    grad_tokens: Tensor,
    *,
    n_weight_rows: int | None = None,
) -> list[Tensor]:
    """Write the gradient of the tokens and return those of the weights, by two launches; rows given may be strided.

    To tokens after the first ``n_weight_rows``, if given, the weights are constants.
    """
    query, u, unit, rstd = saved
    n_tokens, n_channels = unit.shape
    named = RelationWeights(*weights)
    grad_weights = [weight.new_empty(weight.shape) for weight in weights]
    grad_u, grad_query, grad_m = (torch.empty_like(unit) for _ in range(3))
    strides = grad_directions.stride(0), grad_offsets.stride(0)
    n_tiles = triton.cdiv(n_channels, BLOCK_W)
    with torch.cuda.device_of(unit):
        _relation_directions_bwd_kernel[(n_tokens,)](
            named.norm_weight, named.query_weight, named.key_weight, named.key_bias, named.feature_weight,
            named.feature_bias, grad_directions, grad_offsets, unit, rstd, grad_u, grad_query, grad_m, grad_tokens,
            n_channels, *strides, 1 / math.sqrt(n_channels), **block_sizes(n_channels), num_warps=NUM_WARPS,
        )  # fmt: skip
        _relation_weights_bwd_kernel[(n_tiles, n_tiles)](
            named.norm_weight, named.norm_bias, grad_directions, grad_offsets, query, u, unit,
            grad_u, grad_query, grad_m, *grad_weights,
            n_tokens if n_weight_rows is None else n_weight_rows, n_channels, *strides,
            BLOCK_R=BLOCK_R, BLOCK_W=BLOCK_W, num_warps=NUM_WARPS,
        )  # fmt: skip
    return grad_weights


_forward = torch.library.custom_op("renyi_kd::relation_directions", launch_forward, mutates_args=())


@torch.library.custom_op("renyi_kd::relation_directions_backward", mutates_args=())
def _backward(
    tokens: Tensor, weights: Sequence[Tensor], saved: Sequence[Tensor], grad_directions: Tensor, grad_offsets: Tensor
) -> list[Tensor]:
    """Return the gradients of the tokens and of every weight."""
    grad_tokens = tokens.new_empty(tokens.shape)
    return [grad_tokens, *launch_backward(weights, saved, grad_directions, grad_offsets, grad_tokens)]


@_forward.register_fake
def _(tokens: Tensor, weights: Sequence[Tensor], eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return empty_outputs(tokens)


@_backward.register_fake
def _(
    tokens: Tensor, weights: Sequence[Tensor], saved: Sequence[Tensor], grad_directions: Tensor, grad_offsets: Tensor
) -> list[Tensor]:
    return [value.new_empty(value.shape) for value in (tokens, *weights)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tokens, weights, _ = inputs
    ctx.save_for_backward(tokens, *weights, *output[2:])
    ctx.mark_non_differentiable(*output[2:])
    # What is kept for the backward has no gradient, and zeros for it would be a launch each.
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, grad_directions: Tensor | None, grad_offsets: Tensor | None, *_: None
) -> tuple[Tensor, list[Tensor], None]:
    tokens, *values = ctx.saved_tensors
    if grad_directions is None:
        grad_directions = tokens.new_zeros(tokens.shape, dtype=torch.float32)
    if grad_offsets is None:
        grad_offsets = tokens.new_zeros(tokens.shape[:1], dtype=torch.float32)
    n_weights = len(RelationWeights._fields)
    grad_tokens, *grad_weights = torch.ops.renyi_kd.relation_directions_backward(
        tokens, values[:n_weights], values[n_weights:], grad_directions.contiguous(), grad_offsets.contiguous()
    )
    return grad_tokens, grad_weights, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)
_backward.register_autograd(
    second_derivative_refusal("relation_directions", "differentiate a textbook implementation instead")
)


def relation_directions(mask_tokens: Tensor, weights: RelationWeights, *, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """Return what the reference does."""
    directions, offsets, *_ = torch.ops.renyi_kd.relation_directions(
        mask_tokens.flatten(0, 1).contiguous(), [weight.contiguous() for weight in weights], eps
    )
    return directions.view(mask_tokens.shape), offsets.view(mask_tokens.shape[:2])
