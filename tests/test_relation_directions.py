"""Directions and offsets of mask tokens against the formula under autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from renyi_kd.ops.relation_directions import RelationWeights, relation_directions
from tests.support.directions import EPS, NAMES, directions_and_gradients, directions_inputs, textbook_directions
from tests.support.tolerance import assert_close_on_scale, assert_within_budget


def collapsed(mask_tokens: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
    return relation_directions(mask_tokens, RelationWeights(*parameters), eps=EPS)


@pytest.mark.parametrize("shape", [(2, 1, 3), (1, 1, 8), (4, 1, 256), (3, 4, 33), (16, 3, 64)], ids=str)
def test_values_and_gradients(shape):
    values = directions_inputs(*shape)
    exact = directions_and_gradients(textbook_directions, values)
    for name, value in directions_and_gradients(collapsed, values).items():
        assert_close_on_scale(value, exact[name], name=name, rtol=1e-13)


@pytest.mark.parametrize("shape", [(2, 1, 3), (4, 1, 256), (16, 3, 64)], ids=str)
def test_values_and_gradients_in_fp32(shape):
    values = directions_inputs(*shape, torch.float32)
    exact = directions_and_gradients(textbook_directions, tuple(value.double() for value in values))
    eager = directions_and_gradients(textbook_directions, values)
    for name, value in directions_and_gradients(collapsed, values).items():
        assert value.dtype == torch.float32
        assert_within_budget(value, eager[name], exact[name].detach(), name=name)


def test_gradients_by_differences():
    torch.autograd.gradcheck(collapsed, tuple(value.requires_grad_() for value in directions_inputs(2, 2, 5)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_tokens_and_weights_are_computed_in_fp32(dtype):
    values = directions_inputs(3, 2, 16, dtype)
    directions, offsets = collapsed(*values)
    expected = collapsed(*(value.float() for value in values))
    assert directions.dtype == offsets.dtype == torch.float32
    assert torch.equal(directions, expected[0])
    assert torch.equal(offsets, expected[1])
    gradients = directions_and_gradients(collapsed, values)
    assert {gradients[f"gradient of {name}"].dtype for name in NAMES} == {dtype}


def test_a_token_without_direction_gets_no_gradient_and_takes_none_from_the_others():
    tokens, *weights = directions_inputs(3, 1, 16, torch.float32)
    tokens[1] = 7.0
    gradients = directions_and_gradients(collapsed, (tokens, *weights))["gradient of mask_tokens"]
    assert torch.equal(gradients[1], torch.zeros_like(gradients[1]))
    others = directions_and_gradients(collapsed, directions_inputs(3, 1, 16, torch.float32))["gradient of mask_tokens"]
    torch.testing.assert_close(gradients[::2], others[::2])


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_no_bit_forward_or_backward(low):
    values = directions_inputs(3, 1, 16, torch.float32)
    expected = directions_and_gradients(collapsed, values)
    with torch.autocast("cpu", low):
        actual = directions_and_gradients(collapsed, values)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_a_second_derivative_is_refused():
    tokens, *weights = directions_inputs(2, 1, 8)
    directions, _ = collapsed(tokens.requires_grad_(), *weights)
    with pytest.raises(NotImplementedError, match="relation_directions: backward must run without create_graph=True"):
        torch.autograd.grad(directions.sum(), tokens, create_graph=True)
