r"""Directions and offsets of mask tokens in one launch; backward in two: a few tokens a program, then the weights.

    m = LN(z)    q = (W_Q m + b_Q) / sqrt(d)    u = W_K^T q + m    w = gamma u    c = q . b_K + u . beta
    du = gamma dw + beta dc    dq = (W_K du + b_K dc) / sqrt(d)    dm = du + W_Q^T dq
    dW_Q = dq^T m    dW_K = q^T du    and sums over the tokens for the rest

A program walks the rows of both matrices once, because a stretch of q is all that its rows of W_K need; what it reads
it uses for all of its tokens. The sums over tokens are made by one program per tile of the weights, in the order of the
tokens: no atomics, so results repeat bit for bit. Extra memory: seven rows of d numbers for every token. A token whose
channels are all alike has gradient 0.

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
from renyi_kd.ops.launches import launcher
from renyi_kd.ops.relation_directions.types import RelationWeights
from renyi_kd.ops.tiles import cdiv, next_power_of_2

# Tokens of a program, elements of a tile of a matrix and its rows, chosen so that nothing spills on any target; and
# stages of loads under way. Not measured on a GPU yet.
BLOCK_T, TILE, BLOCK_J = 2, 4096, 256
STAGES = tl.constexpr(3)
BLOCK_R, BLOCK_W = 16, 16
NUM_WARPS = 16


@triton.jit
def _load(ptr, places, inside):
    """Return values in fp32, 0 where they are not there."""
    return tl.load(ptr + places, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _load_tokens(ptr, rows, n_tokens, stride_s, stride_n, channels, inside):
    """Return tokens ``[BLOCK_T, BLOCK_C]``, numbered through all samples."""
    places = (rows // n_tokens).to(tl.int64) * stride_s + (rows % n_tokens).to(tl.int64) * stride_n
    return _load(ptr, places[:, None] + channels[None, :], inside)


@triton.jit
def _products_with_rows(
    matrix_ptr, vectors_ptr, vectors, in_r, j, n_channels,
    BLOCK_T: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return the products ``[BLOCK_T, BLOCK_J]`` of vectors with rows of a matrix."""
    # In the shape of a tile, so that threads meet once, after the loop.
    sums = tl.zeros((BLOCK_T, BLOCK_J, BLOCK_K), tl.float32)
    rows = j.to(tl.int64)[None, :, None] * n_channels
    for first in tl.range(0, n_channels, BLOCK_K, num_stages=STAGES):
        k = first + tl.arange(0, BLOCK_K)
        in_k = k < n_channels
        matrix = _load(matrix_ptr, rows + k[None, None, :], (j < n_channels)[None, :, None] & in_k[None, None, :])
        places = vectors[:, None, None] + k[None, None, :]
        sums += matrix * _load(vectors_ptr, places, in_r[:, None, None] & in_k[None, None, :])
    return tl.sum(sums, 2)


@triton.jit
def _sums_of_rows(
    matrix_ptr, factors_ptr, vectors, in_r, channels, n_channels,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Return the rows of a matrix times their factors, summed: ``[BLOCK_T, BLOCK_C]``."""
    sums = tl.zeros((BLOCK_T, BLOCK_R, BLOCK_C), tl.float32)
    in_c = (channels < n_channels)[None, None, :]
    for first in tl.range(0, n_channels, BLOCK_R, num_stages=STAGES):
        j = first + tl.arange(0, BLOCK_R)
        in_j = (j < n_channels)[None, :, None]
        matrix = _load(matrix_ptr, j.to(tl.int64)[None, :, None] * n_channels + channels[None, None, :], in_j & in_c)
        places = vectors[:, None, None] + j[None, :, None]
        sums += matrix * _load(factors_ptr, places, in_r[:, None, None] & in_j)
    return tl.sum(sums, 1)


@triton.jit(do_not_specialize=["n_rows", "n_first_rows", "n_tokens"])
def _relation_directions_fwd_kernel(
    first_ptr, second_ptr, norm_weight_ptr, norm_bias_ptr, query_weight_ptr, query_bias_ptr, key_weight_ptr,
    key_bias_ptr, feature_weight_ptr, feature_bias_ptr,
    directions_ptr, offsets_ptr, query_ptr, u_ptr, unit_ptr, rstd_ptr,
    n_rows, n_first_rows, n_tokens, n_channels, first_stride_s, first_stride_n, second_stride_s, second_stride_n,
    scale, eps, BLOCK_T: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write directions and offsets of a few tokens, and what their gradients need; the second tokens follow."""
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    channels = tl.arange(0, BLOCK_C)
    in_r, in_c = rows < n_rows, channels < n_channels
    inside = in_r[:, None] & in_c[None, :]
    x = _load_tokens(
        first_ptr, rows, n_tokens, first_stride_s, first_stride_n, channels, inside & (rows < n_first_rows)[:, None]
    )
    if second_ptr is not None:
        is_second = (rows >= n_first_rows)[:, None]
        second = _load_tokens(
            second_ptr, rows - n_first_rows, n_tokens, second_stride_s, second_stride_n, channels, inside & is_second
        )
        x = tl.where(is_second, second, x)
    centred = tl.where(inside, x - (tl.sum(x, 1) / n_channels)[:, None], 0.0)
    largest = tl.max(tl.where(inside, x, -float("inf")), 1)
    alike = largest == tl.min(tl.where(inside, x, float("inf")), 1)
    rstd = tl.where(alike, 0.0, 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / n_channels + eps))
    unit = centred * rstd[:, None]
    m = unit * _load(norm_weight_ptr, channels, in_c)[None, :] + _load(norm_bias_ptr, channels, in_c)[None, :]
    vectors = rows.to(tl.int64) * n_channels
    places = vectors[:, None] + channels[None, :]
    # The room of u holds m until it is known.
    tl.store(u_ptr + places, m, mask=inside)
    tl.store(unit_ptr + places, unit, mask=inside)
    tl.store(rstd_ptr + rows, rstd, mask=in_r)
    # Those who read a vector are not the threads that wrote it.
    tl.debug_barrier()
    offsets = tl.zeros((BLOCK_T,), tl.float32)
    for first in range(0, n_channels, BLOCK_J):
        j = first + tl.arange(0, BLOCK_J)
        in_j = j < n_channels
        query = _products_with_rows(query_weight_ptr, u_ptr, vectors, in_r, j, n_channels, BLOCK_T, BLOCK_J, BLOCK_K)
        query = (query + _load(query_bias_ptr, j, in_j)[None, :]) * scale
        offsets += tl.sum(query * _load(key_bias_ptr, j, in_j)[None, :], 1)
        tl.store(query_ptr + vectors[:, None] + j[None, :], query, mask=in_r[:, None] & in_j[None, :])
    tl.debug_barrier()
    u = m + _sums_of_rows(key_weight_ptr, query_ptr, vectors, in_r, channels, n_channels, BLOCK_T, BLOCK_R, BLOCK_C)
    offsets += tl.sum(u * _load(feature_bias_ptr, channels, in_c)[None, :], 1)
    tl.store(directions_ptr + places, u * _load(feature_weight_ptr, channels, in_c)[None, :], mask=inside)
    tl.store(offsets_ptr + rows, offsets, mask=in_r)
    tl.store(u_ptr + places, u, mask=inside)


@triton.jit(do_not_specialize=["n_rows", "n_parts"])
def _relation_directions_bwd_kernel(
    norm_weight_ptr, query_weight_ptr, key_weight_ptr, key_bias_ptr, feature_weight_ptr, feature_bias_ptr,
    direction_parts_ptr, offset_parts_ptr, unit_ptr, rstd_ptr,
    grad_directions_ptr, grad_offsets_ptr, grad_u_ptr, grad_query_ptr, grad_m_ptr, grad_tokens_ptr,
    n_rows, n_parts, n_channels, direction_stride_k, offset_stride_k, scale,
    BLOCK_T: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sum what programs found for a few directions; write the gradients of the tokens, and what weights need."""
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    channels = tl.arange(0, BLOCK_C)
    in_r, in_c = rows < n_rows, channels < n_channels
    inside = in_r[:, None] & in_c[None, :]
    tokens = rows.to(tl.int64)
    direction_sums = tl.zeros((BLOCK_T, BLOCK_R, BLOCK_C), tl.float32)
    offset_sums = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for first in range(0, n_parts, BLOCK_R):
        parts = (first + tl.arange(0, BLOCK_R)).to(tl.int64)
        in_k = in_r[:, None] & (parts < n_parts)[None, :]
        all_parts = (tokens * n_parts)[:, None] + parts[None, :]
        starts = all_parts * direction_stride_k
        direction_sums += _load(
            direction_parts_ptr, starts[:, :, None] + channels[None, None, :], in_k[:, :, None] & in_c[None, None, :]
        )
        offset_sums += _load(offset_parts_ptr, all_parts * offset_stride_k, in_k)
    grad_directions, grad_offsets = tl.sum(direction_sums, 1), tl.sum(offset_sums, 1)
    grad_u = grad_directions * _load(feature_weight_ptr, channels, in_c)[None, :]
    grad_u += grad_offsets[:, None] * _load(feature_bias_ptr, channels, in_c)[None, :]
    vectors = tokens * n_channels
    places = vectors[:, None] + channels[None, :]
    tl.store(grad_directions_ptr + places, grad_directions, mask=inside)
    tl.store(grad_offsets_ptr + rows, grad_offsets, mask=in_r)
    tl.store(grad_u_ptr + places, grad_u, mask=inside)
    # Those who read a vector are not the threads that wrote it.
    tl.debug_barrier()
    for first in range(0, n_channels, BLOCK_J):
        j = first + tl.arange(0, BLOCK_J)
        in_j = j < n_channels
        grad_query = _products_with_rows(
            key_weight_ptr, grad_u_ptr, vectors, in_r, j, n_channels, BLOCK_T, BLOCK_J, BLOCK_K
        )
        grad_query = (grad_query + grad_offsets[:, None] * _load(key_bias_ptr, j, in_j)[None, :]) * scale
        tl.store(grad_query_ptr + vectors[:, None] + j[None, :], grad_query, mask=in_r[:, None] & in_j[None, :])
    tl.debug_barrier()
    grad_m = _sums_of_rows(
        query_weight_ptr, grad_query_ptr, vectors, in_r, channels, n_channels, BLOCK_T, BLOCK_R, BLOCK_C
    )
    grad_m += _load(grad_u_ptr, places, inside)
    unit = _load(unit_ptr, places, inside)
    along = grad_m * _load(norm_weight_ptr, channels, in_c)[None, :]
    along_unit = tl.sum(along * unit, 1) / n_channels
    centred = along - (tl.sum(along, 1) / n_channels)[:, None] - unit * along_unit[:, None]
    grad = centred * _load(rstd_ptr, rows, in_r)[:, None]
    tl.store(grad_m_ptr + places, grad_m, mask=inside)
    tl.store(grad_tokens_ptr + places, grad.to(grad_tokens_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _store(ptr, places, values, inside):
    """Store values in the dtype of where they go."""
    tl.store(ptr + places, values.to(ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n_rows"])
def _relation_weights_bwd_kernel(
    norm_weight_ptr, norm_bias_ptr, grad_directions_ptr, grad_offsets_ptr, query_ptr, u_ptr, unit_ptr,
    grad_u_ptr, grad_query_ptr, grad_m_ptr,
    grad_norm_weight_ptr, grad_norm_bias_ptr, grad_query_weight_ptr, grad_query_bias_ptr, grad_key_weight_ptr,
    grad_key_bias_ptr, grad_feature_weight_ptr, grad_feature_bias_ptr,
    n_rows, n_channels, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Write one tile of both matrices' gradients; the first programs along each side those of the vectors."""
    i = tl.program_id(0) * BLOCK_W + tl.arange(0, BLOCK_W)
    j = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    in_i, in_j = i < n_channels, j < n_channels
    norm_weight, norm_bias = _load(norm_weight_ptr, i, in_i), _load(norm_bias_ptr, i, in_i)
    query_sums = tl.zeros((BLOCK_W, BLOCK_W), tl.float32)
    key_sums = tl.zeros((BLOCK_W, BLOCK_W), tl.float32)
    # In the shape of a tile, so that threads meet once, after the loop.
    norm_weight_sums = tl.zeros((BLOCK_R, BLOCK_W), tl.float32)
    norm_bias_sums = tl.zeros((BLOCK_R, BLOCK_W), tl.float32)
    feature_weight_sums = tl.zeros((BLOCK_R, BLOCK_W), tl.float32)
    feature_bias_sums = tl.zeros((BLOCK_R, BLOCK_W), tl.float32)
    query_bias_sums = tl.zeros((BLOCK_R, BLOCK_W), tl.float32)
    key_bias_sums = tl.zeros((BLOCK_R, BLOCK_W), tl.float32)
    for first in range(0, n_rows, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        in_r = r < n_rows
        rows = r.to(tl.int64)[:, None] * n_channels
        in_ri, in_rj = in_r[:, None] & in_i[None, :], in_r[:, None] & in_j[None, :]
        grad_offsets = _load(grad_offsets_ptr, r, in_r)[:, None]
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
        norm_weight_sums += grad_m * unit
        norm_bias_sums += grad_m
        feature_weight_sums += _load(grad_directions_ptr, rows + i[None, :], in_ri) * u
        feature_bias_sums += grad_offsets * u
        query_bias_sums += grad_query
        key_bias_sums += grad_offsets * query
    places = j.to(tl.int64)[:, None] * n_channels + i[None, :]
    in_tile = in_j[:, None] & in_i[None, :]
    _store(grad_query_weight_ptr, places, query_sums, in_tile)
    _store(grad_key_weight_ptr, places, key_sums, in_tile)
    if tl.program_id(1) == 0:
        _store(grad_norm_weight_ptr, i, tl.sum(norm_weight_sums, 0), in_i)
        _store(grad_norm_bias_ptr, i, tl.sum(norm_bias_sums, 0), in_i)
        _store(grad_feature_weight_ptr, i, tl.sum(feature_weight_sums, 0), in_i)
        _store(grad_feature_bias_ptr, i, tl.sum(feature_bias_sums, 0), in_i)
    if tl.program_id(0) == 0:
        _store(grad_query_bias_ptr, j, tl.sum(query_bias_sums, 0), in_j)
        _store(grad_key_bias_ptr, j, tl.sum(key_bias_sums, 0), in_j)


def config(n_channels: int) -> dict[str, int]:
    """Return the sizes of a tile of a matrix: many rows and a stretch of their columns, and whole rows."""
    block_c = next_power_of_2(n_channels)
    block_j = min(BLOCK_J, block_c)
    # Rows that are not loaded as vectors, or are very long, take registers of their own.
    block_t, tile = (BLOCK_T, TILE) if n_channels % 16 == 0 and block_c < TILE else (1, TILE // 4)
    return {
        "BLOCK_T": block_t, "BLOCK_J": block_j, "BLOCK_K": min(tile // block_j, block_c),
        "BLOCK_R": max(1, min(tile // block_c, block_c)), "BLOCK_C": block_c,
        "num_warps": NUM_WARPS,
    }  # fmt: skip


def launch_forward(
    first: Tensor, second: Tensor | None, weights: Sequence[Tensor], eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return directions, offsets, and what the backward needs: q, u, the unit tokens and 1 / deviation; one launch.

    Tokens are ``[s, n, d]``; those of the second, if given, follow those of the first, of the same shape.
    """
    n_samples, n_tokens, n_channels = first.shape
    n_first_rows = n_samples * n_tokens
    n_rows = n_first_rows if second is None else 2 * n_first_rows
    first = first if first.stride(2) == 1 else first.contiguous()
    second = second if second is None or second.stride(2) == 1 else second.contiguous()
    directions, offsets, query, u, unit, rstd = outputs = empty_outputs(first, n_rows)
    settings = config(n_channels)
    with torch.cuda.device_of(first):
        launcher(_relation_directions_fwd_kernel, (cdiv(n_rows, settings["BLOCK_T"]),))(
            first, second, *weights, directions, offsets, query, u, unit, rstd,
            n_rows, n_first_rows, n_tokens, n_channels, *first.stride()[:2],
            *(first if second is None else second).stride()[:2], 1 / math.sqrt(n_channels), eps,
            **settings,
        )  # fmt: skip
    return outputs


def empty_outputs(tokens: Tensor, n_rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return room for what the forward returns."""
    rows, numbers = (n_rows, tokens.shape[-1]), (n_rows,)
    return tuple(  # type: ignore[return-value]
        tokens.new_empty(shape, dtype=torch.float32) for shape in (rows, numbers, rows, rows, rows, numbers)
    )


def launch_backward(
    weights: Sequence[Tensor],
    saved: Sequence[Tensor],
    direction_parts: Tensor,
    offset_parts: Tensor,
    grad_tokens: Tensor,
    *,
    n_weight_rows: int | None = None,
) -> list[Tensor]:
    """Write the gradient of the tokens and return those of the weights, by two launches.

    The gradients of directions ``[rows, parts, d]`` and offsets ``[rows, parts]`` are sums of parts, which may be
    strided but follow each other through all rows. To tokens after the first ``n_weight_rows``, if given, the weights
    are constants.
    """
    query, u, unit, rstd = saved
    n_rows, n_channels = unit.shape
    named = RelationWeights(*weights)
    grad_weights = [weight.new_empty(weight.shape) for weight in weights]
    grad_directions, grad_u, grad_query, grad_m = (torch.empty_like(unit) for _ in range(4))
    grad_offsets = torch.empty_like(rstd)
    n_tiles = cdiv(n_channels, BLOCK_W)
    settings = config(n_channels)
    with torch.cuda.device_of(unit):
        launcher(_relation_directions_bwd_kernel, (cdiv(n_rows, settings["BLOCK_T"]),))(
            named.norm_weight, named.query_weight, named.key_weight, named.key_bias, named.feature_weight,
            named.feature_bias, direction_parts, offset_parts, unit, rstd,
            grad_directions, grad_offsets, grad_u, grad_query, grad_m, grad_tokens,
            n_rows, direction_parts.shape[1], n_channels, direction_parts.stride(1), offset_parts.stride(1),
            1 / math.sqrt(n_channels), **settings,
        )  # fmt: skip
        launcher(_relation_weights_bwd_kernel, (n_tiles, n_tiles))(
            named.norm_weight, named.norm_bias, grad_directions, grad_offsets, query, u, unit,
            grad_u, grad_query, grad_m, *grad_weights,
            n_rows if n_weight_rows is None else n_weight_rows, n_channels,
            BLOCK_R=BLOCK_R, BLOCK_W=BLOCK_W, num_warps=NUM_WARPS // 2,
        )  # fmt: skip
    return grad_weights


@torch.library.custom_op("renyi_kd::relation_directions", mutates_args=())
def _forward(
    tokens: Tensor, weights: Sequence[Tensor], eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return launch_forward(tokens, None, weights, eps)


@torch.library.custom_op("renyi_kd::relation_directions_backward", mutates_args=())
def _backward(
    tokens: Tensor, weights: Sequence[Tensor], saved: Sequence[Tensor], grad_directions: Tensor, grad_offsets: Tensor
) -> list[Tensor]:
    """Return the gradients of the tokens and of every weight."""
    grad_tokens = tokens.new_empty(tokens.shape)
    parts = grad_directions.unsqueeze(1), grad_offsets.unsqueeze(1)
    return [grad_tokens, *launch_backward(weights, saved, *parts, grad_tokens)]


@_forward.register_fake
def _(tokens: Tensor, weights: Sequence[Tensor], eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return empty_outputs(tokens, tokens.shape[:2].numel())


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
        grad_directions = tokens.new_zeros(tokens.shape, dtype=torch.float32).flatten(0, 1)
    if grad_offsets is None:
        grad_offsets = tokens.new_zeros(tokens.shape[:2].numel(), dtype=torch.float32)
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
        mask_tokens, [weight.contiguous() for weight in weights], eps
    )
    return directions.view(mask_tokens.shape), offsets.view(mask_tokens.shape[:2])
