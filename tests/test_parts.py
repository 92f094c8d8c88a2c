"""How decoders hand their mask tokens to the hypernetworks, and what of a model a tensor is a part of."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from renyi_kd.sam.decoder_call import are_one, hold
from renyi_kd.sam.parts import FAMILIES, Decoder
from renyi_kd.sam.reads import is_view_of
from renyi_kd.sam.recording import Recording


def decoder(n_tokens: int, *, shared: bool, embedding: nn.Module | None = None) -> Decoder:
    module = nn.Module()
    module.mask_tokens = embedding or nn.Embedding(n_tokens, 8)
    module.output_hypernetworks_mlps = nn.Linear(8, 8) if shared else nn.ModuleList([nn.Linear(8, 8)] * n_tokens)
    return Decoder("", module, FAMILIES[0])


def numbers(of: Decoder, value: Tensor, number: int = 0) -> list[tuple[int | None, list[int]]]:
    return [(each, list(tokens.shape)) for each, tokens in of.mask_tokens(number, value)]


def test_a_hypernetwork_for_each_token_gets_one():
    of = decoder(4, shared=False)
    assert numbers(of, torch.zeros(3, 8), 2) == [(2, [3, 8])]
    # As many prompts of an image as there are tokens are no tokens.
    assert numbers(of, torch.zeros(2, 4, 8), 2) == [(2, [2, 4, 8])]
    # All at once, as AutoGluon's Conv-LoRA passes them.
    assert numbers(of, torch.zeros(2, 3, 4, 8)) == [(number, [2, 3, 8]) for number in range(4)]


@pytest.mark.parametrize("n_tokens", [2, 4])
def test_a_hypernetwork_for_all_tokens_gets_them_at_once_or_one_by_one(n_tokens):
    of = decoder(n_tokens, shared=True)
    assert numbers(of, torch.zeros(3, n_tokens, 8)) == [(number, [3, 8]) for number in range(n_tokens)]
    assert numbers(of, torch.zeros(3, 8)) == [(None, [3, 8])]
    assert numbers(of, torch.zeros(3, n_tokens + 1, 8)) == [(None, [3, n_tokens + 1, 8])]


def test_the_only_token_is_the_first():
    of = decoder(1, shared=True)
    assert numbers(of, torch.zeros(3, 8)) == [(0, [3, 8])]
    assert numbers(of, torch.zeros(3, 1, 8)) == [(0, [3, 1, 8])]
    # What says nothing of their number stands for one.
    assert decoder(1, shared=True, embedding=nn.Identity()).n_tokens == 1


def test_tokens_without_numbers_are_counted_up_to_their_number():
    recording = Recording()
    recording.begin_forward((), {}, ())
    recording.begin_call(torch.zeros(1, 8, 2, 2))
    tokens = [torch.full((1, 8), float(value)) for value in range(6)]
    for value in tokens:
        recording.add_tokens(None, value, 3)
    recording.end_call()
    (call,) = recording.calls
    assert [{number: held.value[0, 0].item() for number, held in group.items()} for group in call.groups] == [
        {0: 0.0, 1: 1.0, 2: 2.0},
        {0: 3.0, 1: 4.0, 2: 5.0},
    ]


def test_tokens_with_numbers_begin_a_group_where_a_number_comes_again():
    recording = Recording()
    recording.begin_forward((), {}, ())
    recording.begin_call(torch.zeros(1, 8, 2, 2))
    first, second = torch.zeros(1, 8), torch.ones(1, 8)
    # One that is read twice is there once.
    for number, value in ((0, first), (0, first), (1, first), (0, second), (1, second)):
        recording.add_tokens(number, value, 1)
    recording.end_call()
    (call,) = recording.calls
    assert [{number: held.value[0, 0].item() for number, held in group.items()} for group in call.groups] == [
        {0: 0.0, 1: 0.0},
        {0: 1.0, 1: 1.0},
    ]


def test_a_view_of_a_tensor_is_told_from_what_was_computed():
    leaf = torch.randn(2, 3, 4, requires_grad=True)
    source = leaf * 1
    assert is_view_of(source, source)
    assert is_view_of(source[:, 1].transpose(0, 1), source)
    assert is_view_of(source.unbind(1)[2], source)
    assert not is_view_of(source * 2, source)
    assert not is_view_of(source.clone(), source)
    # In the same memory, and another tensor to autograd.
    assert not is_view_of(source.detach().requires_grad_(), source)
    assert not is_view_of(source[0], source[1])
    assert is_view_of(leaf[0], leaf)


def test_two_views_are_one_where_autograd_sees_the_same_values():
    leaf = torch.randn(2, 3, requires_grad=True)
    source = leaf * 1
    assert are_one(hold(source), hold(source))
    assert are_one(hold(source[0]), hold(source[0]))
    assert not are_one(hold(source[0]), hold(source[1]))
    assert not are_one(hold(source), hold(source.detach()))
    assert not are_one(hold(source.clone()), hold(source.clone()))
    plain = torch.randn(2, 3)
    assert are_one(hold(plain.view(3, 2)), hold(plain.view(3, 2)))
    assert not are_one(hold(plain.view(3, 2)), hold(plain.view(6)))
    assert not are_one(hold(plain.view(torch.int32)), hold(plain))
    before = hold(plain)
    plain.add_(1)
    assert not are_one(before, hold(plain))
