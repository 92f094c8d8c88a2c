"""Directions and offsets of mask tokens against the formula under autograd."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from renyi_kd.ops.relation_directions import RelationWeights, relation_directions
from tests.support import randn
from tests.support.tolerance import assert_close_on_scale, assert_within_budget

EPS = 1e-5
NAMES = ("mask_tokens", *RelationWeights._fields)


def inputs(s: int, n: int, d: int, dtype: torch.dtype = torch.float64, draw: int = 0) -> tuple[Tensor, ...]:
    """Return tokens and weights that require gradients; biases and LayerNorms are not at their initial values."""
    shapes = [(s, n, d), (d,), (d,), (d, d), (d,), (d, d), (d,), (d,), (d,)]
    values = [randn(*shape, seed=seed) for seed, shape in enumerate(shapes, draw * len(shapes))]
    return tuple((value / math.sqrt(d) if value.shape == (d, d) else value).to(dtype) for value in values)


def textbook(mask_tokens: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
    w, d = RelationWeights(*parameters), mask_tokens.shape[-1]
    m = F.layer_norm(mask_tokens, (d,), w.norm_weight, w.norm_bias, EPS)
    q = F.linear(m, w.query_weight, w.query_bias) / math.sqrt(d)
    u = q @ w.key_weight + m
    return u * w.feature_weight, q @ w.key_bias + u @ w.feature_bias


def collapsed(mask_tokens: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
    return relation_directions(mask_tokens, RelationWeights(*parameters), eps=EPS)


def value_and_gradients(function, values: tuple[Tensor, ...]) -> dict[str, Tensor]:
    leaves = [value.detach().clone().requires_grad_() for value in values]
    directions, offsets = function(*leaves)
    upstream = [randn(*out.shape, seed=20 + i).to(out) * -1.7 for i, out in enumerate((directions, offsets))]
    gradients = torch.autograd.grad([directions, offsets], leaves, upstream)
    named = {f"gradient of {name}": gradient for name, gradient in zip(NAMES, gradients, strict=True)}
    return {"directions": directions, "offsets": offsets, **named}


@pytest.mark.parametrize("shape", [(2, 1, 3), (1, 1, 8), (4, 1, 256), (3, 4, 33), (16, 3, 64)], ids=str)
def test_values_and_gradients(shape):
    values = inputs(*shape)
    exact = value_and_gradients(textbook, values)
    for name, value in value_and_gradients(collapsed, values).items():
        assert_close_on_scale(value, exact[name], name=name, rtol=1e-13)


@pytest.mark.parametrize("shape", [(2, 1, 3), (4, 1, 256), (16, 3, 64)], ids=str)
def test_values_and_gradients_in_fp32(shape):
    values = inputs(*shape, torch.float32)
    exact = value_and_gradients(textbook, tuple(value.double() for value in values))
    eager = value_and_gradients(textbook, values)
    for name, value in value_and_gradients(collapsed, values).items():
        assert value.dtype == torch.float32
        assert_within_budget(value, eager[name], exact[name].detach(), name=name)


def test_gradients_by_differences():
    torch.autograd.gradcheck(collapsed, tuple(value.requires_grad_() for value in inputs(2, 2, 5)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_tokens_and_weights_are_computed_in_fp32(dtype):
    values = inputs(3, 2, 16, dtype)
    directions, offsets = collapsed(*values)
    expected = collapsed(*(value.float() for value in values))
    assert directions.dtype == offsets.dtype == torch.float32
    assert torch.equal(directions, expected[0])
    assert torch.equal(offsets, expected[1])
    gradients = value_and_gradients(collapsed, values)
    assert {gradients[f"gradient of {name}"].dtype for name in NAMES} == {dtype}


def test_a_token_without_direction_gets_no_gradient_and_takes_none_from_the_others():
    tokens, *weights = inputs(3, 1, 16, torch.float32)
    tokens[1] = 7.0
    gradients = value_and_gradients(collapsed, (tokens, *weights))["gradient of mask_tokens"]
    assert torch.equal(gradients[1], torch.zeros_like(gradients[1]))
    others = value_and_gradients(collapsed, inputs(3, 1, 16, torch.float32))["gradient of mask_tokens"]
    torch.testing.assert_close(gradients[::2], others[::2])


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_no_bit_forward_or_backward(low):
    values = inputs(3, 1, 16, torch.float32)
    expected = value_and_gradients(collapsed, values)
    with torch.autocast("cpu", low):
        actual = value_and_gradients(collapsed, values)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_a_second_derivative_is_refused():
    tokens, *weights = inputs(2, 1, 8)
    directions, _ = collapsed(tokens.requires_grad_(), *weights)
    with pytest.raises(NotImplementedError, match="relation_directions: backward must run without create_graph=True"):
        torch.autograd.grad(directions.sum(), tokens, create_graph=True)
