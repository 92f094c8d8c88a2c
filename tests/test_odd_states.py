"""A state dict is loaded bit for bit, or refused with nothing of it loaded, whatever has become of it."""

from __future__ import annotations

import copy
import functools
import io
import re
from collections.abc import Callable
from itertools import starmap
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from renyi_kd import InfoSAMLoss, RelationModule
from tests.support import in_training, sam_features

DIM = 12
BANK, SHARE = "bank._extra_state", "share_control._extra_state"
KEY = "relation.key_proj.weight"


def step(infosam: InfoSAMLoss, seed: int, dim: int = DIM) -> Tensor:
    student = in_training(sam_features(2, seed=seed + 1000, dim=dim))
    loss = infosam(sam_features(2, seed=seed, dim=dim), student)
    (loss + student.image_features.square().mean() + student.mask_tokens.square().mean()).backward()
    return loss.detach()


def a_loss(n_steps: int, *, dim: int = DIM, first: int = 0) -> InfoSAMLoss:
    infosam = InfoSAMLoss(dim, bank_size=4, gradient_share=0.1)
    for seed in range(first, first + 10 * n_steps, 10):
        step(infosam, seed, dim)
    # Of every loss other weights: all of them begin alike.
    with torch.no_grad():
        for parameter in infosam.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(first)), alpha=0.01)
            parameter.grad = None
    return infosam


@functools.cache
def saved() -> dict[str, Any]:
    return dict(a_loss(3).state_dict())


@functools.cache
def beginning() -> InfoSAMLoss:
    return a_loss(1, first=500)


@functools.cache
def next_loss() -> Tensor:
    return step(copy.deepcopy(beginning()), 30)


def copied(state: Any) -> Any:
    return tree_map(lambda value: value.detach().clone() if isinstance(value, Tensor) else value, dict(state))


def same(a: Any, b: Any) -> bool:
    """Return whether two state dicts are one bit for bit, up to the dtypes that the first has."""
    return all(starmap(is_one, zip(tree_leaves(dict(a)), tree_leaves(dict(b)), strict=True)))


def is_one(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor):
        return type(a) is type(b) and a == b
    if a.is_meta or b.is_meta:
        return a.is_meta and b.is_meta and a.shape == b.shape
    b = b.to_dense().to(a.dtype)
    return a.numel() == b.numel() and torch.equal(a.nan_to_num(7.0), b.reshape(a.shape).nan_to_num(7.0))


def assert_whole_or_as_before(state: dict[str, Any], **how: Any) -> str:
    """Load a state dict, which must be there then, or refused with nothing changed; return what was said."""
    infosam = copy.deepcopy(beginning())
    before = copied(infosam.state_dict())
    parameters = list(infosam.parameters())
    as_given = copied(state)
    try:
        infosam.load_state_dict(state, **how)
    except (RuntimeError, TypeError) as error:
        said = str(error)
    else:
        said = ""
    if said:
        assert same(copied(infosam.state_dict()), before)
        assert all(a is b for a, b in zip(infosam.parameters(), parameters, strict=True))
        # It goes on as if nothing had been.
        assert torch.equal(step(infosam, 30), next_loss())
        assert re.search(r"InfoSAMLoss: .* must be .*, (got|and) .*; ", said, re.DOTALL), said
        return said
    loaded = copied(infosam.state_dict())
    there = sorted(loaded.keys() & as_given.keys())
    assert same({name: loaded[name] for name in there}, {name: as_given[name] for name in there})
    if not any(value.is_meta for value in tree_leaves(loaded) if isinstance(value, Tensor)):
        step(infosam, 30), step(infosam, 40)
    return ""


def changed(name: str, change: Callable[[Any], Any]) -> dict[str, Any]:
    return {**copied(saved()), name: change(copied({0: saved()[name]})[0])}


# what is refused


def with_field(number: int, value: Any) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    return lambda state: (*state[:number], value(state[number]) if callable(value) else value, *state[number + 1 :])


BANKS = {
    "nothing": (lambda state: None, "got one of type NoneType"),
    "a tensor": (lambda state: state[0], "got one of type Tensor"),
    "fields missing": (lambda state: state[:5], "got 5 values in place of 8"),
    "maps missing": (with_field(0, None), "got image_features that are no dense tensor of floating point"),
    "whole numbers": (with_field(2, Tensor.long), "got mask_tokens that are no dense"),
    "complex": (with_field(3, lambda x: x + 0j), "got teacher_scores that are no dense"),
    "sparse": (with_field(0, Tensor.to_sparse), "got image_features that are no dense"),
    "meta": (with_field(4, lambda x: x.to("meta")), "got student_scores without numbers, on the device meta; load"),
    "flat maps": (with_field(0, lambda x: x.flatten(1)), "got image_features of shape [4, 420]"),
    "other channels": (with_field(0, lambda x: x[:, :5]), "got maps, tokens and scores of the shapes [4, 5, 5, 7]"),
    "other pixels": (with_field(4, lambda x: x[..., :9]), "[4, 1, 35], [4, 1, 9]"),
    "other samples": (with_field(2, lambda x: x[:3]), "[3, 1, 12], [4, 1, 35]"),
    "a map missing": (with_field(0, lambda x: x[1:]), "got 3 maps of 4 samples"),
    "no such image": (with_field(1, [0, 1, 2, 4]), "got images [0, 1, 2, 4] of 4 samples and 4 maps"),
    "an image before the first": (with_field(1, [0, 1, 2, -1]), "got images [0, 1, 2, -1] of 4 samples"),
    "images missing": (with_field(1, [0, 1]), "got images [0, 1] of 4 samples"),
    "weights": (with_field(5, torch.ones(4)), "got what no bank keeps of samples"),
}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(("change", "message"), BANKS.values(), ids=BANKS)
def test_what_is_no_bank_is_refused_by_its_name(change, message, assign):
    assert message in assert_whole_or_as_before(changed(BANK, change), assign=assign)


SHARES = {
    "nothing": (SHARE, lambda _: None, "must be the 2 x 2 squares of gradients of a step, got None"),
    "a list": (SHARE, Tensor.tolist, "got [["),
    "a vector": (SHARE, lambda x: x[0], "got a tensor of torch.float32, shape [2]"),
    "complex": (SHARE, lambda x: x + 0j, "got a tensor of torch.complex64"),
    "without numbers": (SHARE, lambda x: x.to("meta"), "got a tensor of"),
    "no weight": (
        "share_control.weight",
        torch.zeros_like,
        "must be a positive weight after some steps, got weight 0.0",
    ),
    "a negative weight": ("share_control.weight", torch.neg, "got weight -"),
    "a weight lost in rounding": ("share_control.weight", Tensor.long, "got weight 0"),
    "no number": ("share_control.mean", lambda x: x * torch.nan, "mean nan"),
    "an infinite mean": ("share_control.mean", lambda x: x * torch.inf, "mean inf"),
    "steps before the first": ("share_control.n_steps", torch.neg, "n_steps -"),
}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(("name", "change", "message"), SHARES.values(), ids=SHARES)
def test_what_is_no_state_of_a_share_is_refused_by_its_name(name, change, message, assign):
    assert message in assert_whole_or_as_before(changed(name, change), assign=assign)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("name", saved())
def test_without_one_of_its_parts_nothing_is_loaded(name, assign):
    state = copied(saved())
    del state[name]
    said = assert_whole_or_as_before(state, assign=assign)
    # A checkpoint from before there was a bank is one of an empty bank.
    assert said == "" if name == BANK else f'Missing key(s) in state_dict: "{name}"' in said
    assert name == BANK or "make the InfoSAMLoss with those of the one that was saved" in said


@pytest.mark.parametrize("dim", [8, 11, 13])
def test_the_state_of_a_loss_of_another_size_is_refused_whole(dim):
    said = assert_whole_or_as_before(a_loss(2, dim=dim).state_dict())
    assert f"torch.Size([{dim}, {dim}]) from checkpoint" in said


def test_a_relation_module_is_loaded_whole_too():
    state = RelationModule(DIM).double().state_dict()
    del state["layer_norm_mask.bias"]
    module = RelationModule(DIM, generator=torch.Generator().manual_seed(1))
    before = copied(module.state_dict())
    with pytest.raises(
        RuntimeError, match=r'Missing key\(s\).*"layer_norm_mask.bias"(?s:.*)\nRelationModule: load_stat'
    ):
        module.load_state_dict(state)
    assert same(module.state_dict(), before)
    with pytest.raises(TypeError, match="Expected state_dict to be dict-like"):
        module.load_state_dict(None)


@pytest.mark.parametrize(
    ("change", "message"),
    [(Tensor.to_sparse, "torch.sparse_coo"), (lambda x: x + 0j, "torch.complex64"), (Tensor.long, "floating point")],
)
def test_no_parameter_becomes_what_the_loss_cannot_compute_with(change, message):
    assert message in assert_whole_or_as_before(changed(KEY, change), assign=True)


class Counting(InfoSAMLoss):
    """A loss with entries that are no numbers to compute with: a counter of its own, one of a BatchNorm and a mask."""

    def __init__(self) -> None:
        super().__init__(DIM)
        self.register_buffer("n_calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("places", torch.eye(3).to_sparse())
        self.relation.normalised = nn.BatchNorm1d(DIM)


@pytest.mark.parametrize("assign", [False, True])
def test_counters_of_a_subclass_are_loaded_with_it(assign):
    infosam, resumed = Counting(), Counting()
    infosam.n_calls += 7
    infosam.relation.normalised.num_batches_tracked += 5
    state = copied(infosam.state_dict())
    resumed.load_state_dict(state, assign=assign)
    assert (resumed.n_calls.item(), resumed.relation.normalised.num_batches_tracked.item()) == (7, 5)
    with pytest.raises(RuntimeError, match="size mismatch for relation.key_proj.bias"):
        resumed.load_state_dict(
            {**state, "n_calls": torch.tensor(8), "relation.key_proj.bias": torch.zeros(1)}, assign=assign
        )
    assert resumed.n_calls.item() == 7


@pytest.mark.parametrize("name", ["mean", "n_steps", "weight"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_what_the_share_follows_stays_in_single_precision(name, dtype):
    infosam = copy.deepcopy(beginning())
    infosam.load_state_dict(changed(f"share_control.{name}", lambda value: value.to(dtype)), assign=True)
    assert torch.finfo(getattr(infosam.share_control, name).dtype).bits >= 32
    step(infosam, 30)


def test_what_holds_a_loss_hears_of_all_that_does_not_fit_at_once():
    both = nn.ModuleList([nn.Linear(1, 1), copy.deepcopy(beginning())])
    state = dict(both.state_dict())
    state[f"1.{BANK}"], state[f"1.{SHARE}"], state["0.weight"] = None, None, torch.zeros(2, 2)
    with pytest.raises(RuntimeError) as caught:
        both.load_state_dict(state)
    for message in ("size mismatch for 0.weight", "state of the bank must be", "state of gradient_share must be"):
        assert message in str(caught.value)
    assert torch.equal(both[1].bank.get_extra_state()[0], beginning().bank.get_extra_state()[0])


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(("name", "change", "message"), SHARES.values(), ids=SHARES)
def test_what_holds_a_loss_leaves_its_share_as_it_was(name, change, message, assign):
    """Its load_state_dict keeps what fits, as PyTorch's does, but no half of what the weight follows."""
    both = nn.ModuleList([copy.deepcopy(beginning())])
    control = both[0].share_control
    before, buffers = copied(control.state_dict()), dict(control.named_buffers())
    waiting = list(control._waiting)
    state = {f"0.{key}": value for key, value in changed(name, change).items()}
    with pytest.raises(RuntimeError, match=re.escape(message)):
        both.load_state_dict(state, assign=assign)
    assert control._waiting == waiting
    assert same(control.state_dict(), before)
    # DDP sends the buffers that it was made with.
    assert all(value is buffers[key] for key, value in control.named_buffers())
    step(both[0], 30)


@pytest.mark.parametrize("name", [KEY, "relation.layer_norm_mask.bias", "share_control.weight", "share_control.mean"])
@pytest.mark.parametrize(
    ("change", "got"),
    [
        (Tensor.to_sparse, "torch.float32, torch.sparse_coo"),
        (lambda x: x + 0j, "torch.complex64, torch.strided"),
        (Tensor.long, "torch.int64, torch.strided"),
    ],
)
def test_what_holds_a_loss_hears_of_tensors_that_the_loss_cannot_compute_with(name, change, got):
    both = nn.ModuleList([nn.Linear(1, 1), copy.deepcopy(beginning())])
    state = {**both.state_dict(), **{f"1.{key}": value for key, value in changed(name, change).items()}}
    state["0.weight"] = torch.zeros(2, 2)
    expected = f"load_state_dict: 1.{name} must be a dense tensor of floating point with assign=True, got {got}; load"
    with pytest.raises(RuntimeError) as caught:
        both.load_state_dict(state, assign=True)
    assert str(caught.value).count(expected) == 1
    assert "size mismatch for 0.weight" in str(caught.value)


# what is loaded


@pytest.mark.parametrize("to", [torch.float16, torch.bfloat16, torch.float64])
def test_a_loss_in_another_precision_goes_on_from_the_same_samples(to):
    infosam = copy.deepcopy(beginning()).to(to)
    infosam.load_state_dict(copied(saved()))
    other = a_loss(3).to(to)
    assert same(infosam.state_dict(), other.state_dict())
    assert torch.equal(step(infosam, 30), step(other, 30))


def test_a_bank_takes_no_graph_from_a_state_dict():
    with_graph = [
        value.requires_grad_() * 1 if isinstance(value, Tensor) else value for value in copied({0: saved()[BANK]})[0]
    ]
    infosam = copy.deepcopy(beginning())
    infosam.load_state_dict({**copied(saved()), BANK: with_graph})
    assert not any(value.requires_grad for value in infosam.bank.get_extra_state() if isinstance(value, Tensor))


@pytest.mark.parametrize("made", [False, True])
@pytest.mark.parametrize("loaded", [False, True])
def test_a_state_dict_that_was_made_or_loaded_in_inference_mode(made, loaded):
    infosam = copy.deepcopy(beginning())
    with torch.inference_mode(made):
        state = copied(saved())
    with torch.inference_mode(loaded):
        infosam.load_state_dict(state)
    assert same(infosam.state_dict(), saved())
    other = a_loss(3)
    for seed in (30, 40):
        assert torch.equal(step(infosam, seed), step(other, seed))


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("to", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("assign", [False, True])
def test_every_precision_comes_back_from_a_file_bit_for_bit(to, assign):
    infosam = a_loss(2).to(to)
    state = infosam.state_dict()
    resumed = InfoSAMLoss(DIM, bank_size=4, gradient_share=0.1).to(to)
    resumed.load_state_dict(through_a_file(state), assign=assign)
    assert same(resumed.state_dict(), state)
    assert torch.equal(step(resumed, 30), step(infosam, 30))


# whatever may be

TENSORS: dict[str, Callable[[Tensor], Any]] = {
    "as it is": lambda x: x,
    "half": Tensor.half,
    "bfloat16": Tensor.bfloat16,
    "double": Tensor.double,
    "whole numbers": Tensor.long,
    "truth": Tensor.bool,
    "meta": lambda x: x.to("meta"),
    "sparse": Tensor.to_sparse,
    "with gradient": lambda x: x.float().requires_grad_(),
    "backwards": lambda x: x.flip(-1) if x.ndim else x,
    "turned": lambda x: x.transpose(0, -1) if x.ndim else x,
    "cut": lambda x: x[..., :-1] if x.ndim else x,
    "deeper": lambda x: x[None].repeat(2, *[1] * x.ndim),
    "empty": lambda x: x.new_empty(0),
    "not a number": lambda x: x * torch.nan,
    "infinite": lambda x: x * torch.inf,
    "none": lambda x: None,
    "a list": Tensor.tolist,
    "an array": lambda x: np.zeros(tuple(x.shape)),
    "a name": lambda x: "x",
    "huge": lambda x: 2**100,
}
VALUES = st.none() | st.integers() | st.text(max_size=3) | st.sampled_from([torch.zeros(2), torch.ones(2, 2), b"\x00"])


def is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta


@st.composite
def states(draw: st.DrawFn) -> dict[str, Any]:
    state = copied(saved())
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted(state)))
        what = draw(st.sampled_from(["change", "change", "change", "drop", "add", "swap"]))
        if what == "drop":
            del state[name]
        elif what == "add":
            state[draw(st.sampled_from(["more", "bank.more", f"{name}.more", "relation"]))] = draw(VALUES)
        elif what == "swap":
            other = draw(st.sampled_from(sorted(state)))
            state[name], state[other] = state[other], state[name]
        elif is_plain(state[name]):
            state[name] = TENSORS[draw(st.sampled_from(sorted(TENSORS)))](state[name])
        elif isinstance(state[name], tuple) and draw(st.booleans()):
            fields = list(state[name])
            number = draw(st.integers(0, len(fields) - 1)) if fields else 0
            if fields and is_plain(fields[number]):
                fields[number] = TENSORS[draw(st.sampled_from(sorted(TENSORS)))](fields[number])
            elif fields:
                fields[number] = draw(VALUES | st.lists(st.integers(-1, 5), min_size=3, max_size=5))
            state[name] = draw(st.sampled_from([tuple(fields), fields, tuple(fields)[: number + 1]]))
        else:
            state[name] = draw(VALUES)
        if not state:
            break
    return state


# Of samples that are not finite a bank keeps zeros, and says so.
def finite(state: Any) -> bool:
    values = state if isinstance(state, tuple | list) else ()
    tensors = (x for x in values if isinstance(x, Tensor) and not x.is_meta)
    return all(x.to_dense().isfinite().all() for x in tensors)


def law(state: dict[str, Any], strict: bool, assign: bool) -> None:
    if finite(state.get(BANK)):
        assert_whole_or_as_before(state, strict=strict, assign=assign)


@given(states(), st.booleans(), st.booleans())
@settings(max_examples=12)
def test_any_change_of_a_state_dict(state, strict, assign):
    law(state, strict, assign)


@pytest.mark.long
@given(states(), st.booleans(), st.booleans())
@settings(max_examples=2000)
def test_any_change_of_a_state_dict_in_thousands(state, strict, assign):
    law(state, strict, assign)
