"""A batch of any kind gives the loss of its values, or an error of tap or model that leaves both as they were."""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import sys
import threading
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from renyi_kd import InfoSAMLoss, Tap, tap
from renyi_kd.sam.memory import differ, leaves, snapshot, storage_of
from renyi_kd.sam.step import Call
from tests.support.models import DIM, hf_batch, hf_sam, hooks_of


class AnyBatch(nn.Module):
    """A SAM whose forward takes images and boxes out of whatever it is given."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.sam = hf_sam(seed)

    def forward(self, batch: Any) -> object:
        if isinstance(batch, list | tuple) and not hasattr(batch, "_fields"):
            values = batch[0], batch[1]
        elif isinstance(batch, Mapping):
            values = batch["pixel_values"], batch["input_boxes"]
        else:
            values = batch.pixel_values, batch.input_boxes
        images, boxes = (value if isinstance(value, Tensor) else torch.as_tensor(value) for value in values)
        return self.sam(pixel_values=images, input_boxes=boxes)


class Setup(NamedTuple):
    teacher: Tap
    student: Tap
    infosam: InfoSAMLoss
    n_hooks: int
    plain: float


@functools.cache
def models() -> Setup:
    teacher, student, infosam = tap(AnyBatch(0)), tap(AnyBatch(1)), InfoSAMLoss(DIM)
    student.model(batch())
    n_hooks = hooks_of(student.model) + hooks_of(teacher.model)
    return Setup(teacher, student, infosam, n_hooks, infosam(teacher, student, batch()).item())


@functools.cache
def values() -> tuple[Tensor, Tensor]:
    whole = hf_batch(2)
    return whole["pixel_values"], whole["input_boxes"]


# Of models and of PyTorch.
ERRORS = (TypeError, ValueError, RuntimeError, KeyError, IndexError, AttributeError)


def batch(**more: Any) -> dict[str, Any]:
    images, boxes = values()
    return {"pixel_values": images, "input_boxes": boxes, **more}


def loss_of(given: Any, through_the_tap: bool = False) -> float:
    teacher, student, infosam, *_ = models()
    (student if through_the_tap else student.model)(given)
    loss = infosam(teacher, student, given)
    loss.backward()
    return loss.item()


def assert_plain_or_refused(given: Any, is_plain: bool, through_the_tap: bool = False) -> None:
    """Run a step, whose loss must be the plain one or which an error must end; and after it, a good step."""
    teacher, student, infosam, n_hooks, plain = models()
    try:
        loss = loss_of(given, through_the_tap)
        assert loss == plain or not is_plain
    except ERRORS:
        assert not through_the_tap or not student.pending
        student.clear()
    assert not student.pending
    assert hooks_of(student.model) + hooks_of(teacher.model) == n_hooks
    assert student.model.training
    student(batch())
    assert infosam(teacher, student, batch()).item() == plain


@dataclasses.dataclass
class Plain:
    pixel_values: Any
    input_boxes: Any
    more: Any = None


@dataclasses.dataclass(slots=True)
class Slots:
    pixel_values: Any
    input_boxes: Any
    more: Any = None


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    pixel_values: Any
    input_boxes: Any
    more: Any = None


class Pair(NamedTuple):
    pixel_values: Any
    input_boxes: Any


class OwnNew(collections.namedtuple("OwnNew", "pixel_values input_boxes")):
    def __new__(cls, both: Any) -> OwnNew:
        return super().__new__(cls, *both)


class ReadOnly(Mapping):
    def __init__(self, **items: Any) -> None:
        self.items_ = items

    def __getitem__(self, name: str) -> Any:
        return self.items_[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.items_)

    def __len__(self) -> int:
        return len(self.items_)


class NoCopies(ReadOnly):
    def __copy__(self) -> NoCopies:
        raise TypeError("no copies")


class OwnList(list):
    pass


class OwnTuple(tuple):
    __slots__ = ()


def itself(holder: Any) -> Any:
    """Return a container that holds itself."""
    if isinstance(holder, list):
        holder.append(holder)
    elif isinstance(holder, dict):
        holder["itself"] = holder
    else:
        holder.more = holder
    return holder


CONTAINERS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "a dataclass": Plain,
    "one with slots": Slots,
    "a frozen one": Frozen,
    "a named tuple": Pair,
    "one with a constructor of its own": lambda *both: OwnNew(both),
    "a list of a class of its own": lambda *both: OwnList(both),
    "a tuple of a class of its own": lambda *both: OwnTuple(both),
    "a read-only mapping": lambda x, b: ReadOnly(pixel_values=x, input_boxes=b),
    "one that cannot be copied": lambda x, b: NoCopies(pixel_values=x, input_boxes=b, more=[1]),
    "a proxy": lambda x, b: types.MappingProxyType({"pixel_values": x, "input_boxes": b, "more": [1]}),
    "a user's dict": lambda x, b: collections.UserDict(pixel_values=x, input_boxes=b, more=[1]),
    "a chain": lambda x, b: collections.ChainMap({"pixel_values": x}, {"input_boxes": b, "more": [1]}),
    "attributes": lambda x, b: types.SimpleNamespace(pixel_values=x, input_boxes=b),
    "a dict that holds itself": lambda x, b: itself({"pixel_values": x, "input_boxes": b}),
    "a dataclass that holds itself": lambda x, b: itself(Plain(x, b)),
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_a_container_gives_the_loss_of_what_it_holds(kind):
    assert loss_of(CONTAINERS[kind](*values())) == models().plain


@pytest.mark.parametrize(
    "kind", ["a read-only mapping", "one that cannot be copied", "a proxy", "a user's dict", "a chain"]
)
def test_every_mapping_is_one_for_a_tap(kind):
    assert loss_of(CONTAINERS[kind](*values()), through_the_tap=True) == models().plain


class Finished(dict):
    """Takes nothing any more, and says so by an error of its own, as configurations do."""

    def __setitem__(self, name: str, value: object) -> None:
        raise RuntimeError("finished")


class Incomplete(dict):
    """Lacks a value that somebody has to give yet."""

    def __getitem__(self, name: str) -> object:
        raise RuntimeError("missing")

    def values(self):
        raise RuntimeError("missing")


def beside(depth: int = 2000) -> dict[str, Any]:
    """Return what may lie in a batch beside what the model takes."""
    nested: Any = 1
    for _ in range(depth):
        nested = [nested]
    x = values()[0]
    with torch.inference_mode():
        inferred = x + 1
    return {
        "nothing": None,
        "a huge number": 2**200,
        "infinity": float("inf"),
        "text": "a",
        "bytes": b"a",
        "a list in itself": itself([]),
        "a mapping in itself": {1: itself({})},
        "a deep list": nested,
        "a generator": (x for _ in range(2)),
        "a set": {1, 2},
        "a function": len,
        "a class": np.ndarray,
        "a module": sys,
        "a network": nn.Linear(1, 1),
        "a lock": threading.Lock(),
        "an array of objects": np.array([None, x], dtype=object),
        "an array of text": np.array(["a"]),
        "a masked array": np.ma.masked_array([1, 2], [0, 1]),
        "a structured array": np.zeros(2, [("a", int)]),
        "a numpy number": np.float32(3),
        "a picture": Image.new("L", (2, 2)),
        "a sparse tensor": x[0, 0].to_sparse(),
        "a meta tensor": x.to("meta"),
        "a nested tensor": torch.nested.nested_tensor([x[0], x[1]], layout=torch.jagged),
        "fp8": x.to(torch.float8_e4m3fn),
        "complex": (x + 1j).conj(),
        "a negative view": (x + 1j).conj().imag,
        "an inferred tensor": inferred,
        "an empty tensor": torch.empty(0),
        "a leaf": x.clone().requires_grad_(),
        "a proxy": types.MappingProxyType({"a": [x]}),
        "a dataclass with slots": Slots(x, [x]),
        "a frozen dataclass": Frozen(x, [x]),
        "a class of dataclasses": Slots,
        "keys that are no names": {1: x, (2, 3): x, None: 3},
        "a mapping that is finished": Finished({"a": {"b": x}}),
        "a configuration that is not complete": Incomplete({"a": x}),
    }


@pytest.mark.parametrize("kind", beside())
def test_what_lies_in_a_batch_beside_it_does_not_matter(kind):
    for held in (batch(more=beside()[kind]), Plain(*values(), more=beside()[kind])):
        assert loss_of(held) == models().plain


def test_keys_that_are_no_names_are_left_out():
    assert loss_of({**batch(), 1: 2, None: 3, (1, 2): values()[0]}, through_the_tap=True) == models().plain


@pytest.mark.parametrize(
    "form",
    [
        lambda x: x.mT.contiguous().mT,
        lambda x: x.flip(-1).flip(-1),
        lambda x: torch.stack([x, x], -1)[..., 1],
        lambda x: x.clone().requires_grad_(),
        nn.Parameter,
        lambda x: x.as_subclass(type("Own", (Tensor,), {})),
        lambda x: x.numpy(),
        lambda x: np.asfortranarray(x.numpy()),
        lambda x: torch.complex(x, -x).conj().real,
        lambda x: torch.complex(x, -x).conj().imag,
    ],
    ids=["turned", "flipped", "strided", "leaf", "parameter", "subclass", "array", "fortran", "real", "negative view"],
)
@pytest.mark.parametrize("through_the_tap", [False, True])
def test_numbers_of_any_layout_are_the_numbers(form, through_the_tap):
    images, boxes = values()
    held = {"pixel_values": form(images), "input_boxes": boxes}
    assert loss_of(held, through_the_tap) == pytest.approx(models().plain, abs=1e-6)


@pytest.mark.parametrize("through_the_tap", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        lambda x, b: (x[:0], b[:0]),
        lambda x, b: (x, b[:, :0]),
        lambda x, b: (x.double(), b),
        lambda x, b: (x.half(), b),
        lambda x, b: (x > 0, b),
        lambda x, b: (x + 0j, b),
        lambda x, b: (x.to(torch.float8_e4m3fn), b),
        lambda x, b: (x.to("meta"), b),
        lambda x, b: (x.to_sparse(), b),
        lambda x, b: (x[0], b),
        lambda x, b: (x.new_zeros(()), b),
        lambda x, b: (None, b),
        lambda x, b: ("x", b),
        lambda x, b: (x[..., :5], b),
    ],
)
def test_an_error_of_the_model_is_its_own_and_leaves_nothing(change, through_the_tap):
    images, boxes = change(*values())
    _, student, _, n_hooks, plain = models()
    with pytest.raises(ERRORS) as caught:
        loss_of({"pixel_values": images, "input_boxes": boxes}, through_the_tap)
    assert not str(caught.value).startswith(("tap:", "InfoSAMLoss:"))
    assert not student.pending
    assert loss_of(batch(), through_the_tap) == plain
    assert hooks_of(student.model) + hooks_of(models().teacher.model) == n_hooks


@pytest.mark.parametrize(
    "given",
    [None, 3, 2**100, "x", b"x", {1, 2}, (x for x in ()), Plain(1, 2), Slots(1, 2), np.zeros(3), (), [], object()],
    ids=lambda given: type(given).__name__,
)
def test_what_no_tap_runs_on_is_refused_in_its_name(given):
    with pytest.raises(TypeError, match=r"tap: batch must be a mapping, a tensor.*got .*; for anything else pass tap"):
        models().student(given)
    assert loss_of(batch(), through_the_tap=True) == models().plain


@pytest.mark.parametrize(
    "hold",
    [
        lambda x, b: OwnList([x, b, [1]]),
        lambda x, b: Slots(x, b, [1]),
        lambda x, b: collections.UserDict(pixel_values=x, input_boxes=b),
        lambda x, b: itself({"pixel_values": x, "input_boxes": b}),
    ],
    ids=["list", "slots", "mapping", "itself"],
)
def test_what_a_container_is_given_later_is_no_part_of_the_step(hold):
    """The teacher runs on the batch as it was when the student ran."""
    teacher, student, infosam, _, plain = models()
    images, boxes = values()
    held, other = hold(images, boxes), torch.flip(images, (0,))
    student.model(held)
    if isinstance(held, list):
        held[0] = other
    elif isinstance(held, Slots):
        held.pixel_values = other
    else:
        held["pixel_values"] = other
    assert infosam(teacher, student).item() == plain


def test_tensors_in_slots_that_are_overwritten_are_named():
    teacher, student, infosam, *_ = models()
    images, boxes = (value.clone() for value in values())
    student.model(Slots(images, boxes))
    images.zero_()
    with pytest.raises(RuntimeError, match="what the student ran on must stay as it is"):
        infosam(teacher, student)
    student.clear()


def test_a_snapshot_holds_what_it_was_made_of():
    inner = [1, [2]]
    for value in (OwnNew(([1], inner)), Slots(1, inner), OwnList([inner]), types.MappingProxyType({"a": inner})):
        copied = snapshot(value).value
        assert type(copied) is type(value)
        kept = copy.deepcopy(list(leaves(copied)))
        inner[1].append(3)
        assert list(leaves(copied)) == kept
        inner[1].pop()


def test_only_an_array_has_the_memory_of_one():
    array = np.zeros((4, 5))
    for value in (np.ndarray, np.ma.MaskedArray, Image.new("L", (2, 2)), object(), 3):
        assert storage_of(value) is None
    assert storage_of(array[1:, ::2]) == storage_of(array) == array.ctypes.data
    assert storage_of(np.ma.masked_array(array)) == array.ctypes.data


# whatever may be

TENSORS = [
    lambda: values()[0],
    lambda: values()[1],
    lambda: values()[0].numpy(),
    lambda: values()[0].double(),
    lambda: values()[0][:1],
    lambda: values()[0][:0],
    lambda: values()[0].to("meta"),
    lambda: values()[0].to_sparse(),
    lambda: values()[0].tolist(),
    lambda: values()[1].long(),
    lambda: values()[1][:, :0],
    lambda: torch.zeros(()),
    lambda: torch.zeros(2, 1, 4, requires_grad=True),
]
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.binary(max_size=3)
LEAVES = SCALARS | st.sampled_from(TENSORS).map(lambda make: make())
WRAPS = [
    lambda items: dict(enumerate(items)),
    list,
    tuple,
    OwnList,
    OwnTuple,
    lambda items: OwnNew((*items, None, None)[:2]),
    lambda items: Slots(*(*items, None, None)[:2]),
    lambda items: Plain(*(*items, None, None)[:2]),
    lambda items: types.MappingProxyType(dict(enumerate(items))),
    lambda items: ReadOnly(**{f"n{number}": item for number, item in enumerate(items)}),
    lambda items: collections.UserDict({"a": items}),
    lambda items: itself(list(items)),
    lambda items: itself(dict(enumerate(items))),
    lambda items: types.SimpleNamespace(items=items),
    iter,
]
NESTED = st.recursive(
    LEAVES,
    lambda inner: st.tuples(st.sampled_from(WRAPS), st.lists(inner, max_size=3)).map(lambda each: each[0](each[1])),
    max_leaves=8,
)
# Whether a value is as it should be, and the value.
IMAGES, BOXES = (
    st.one_of(*[st.just((True, number))] * 2, NESTED.map(lambda value: (False, value))) for number in range(2)
)


@st.composite
def batches(draw: st.DrawFn) -> tuple[Any, bool]:
    """Draw a batch, and whether it holds images and boxes as they should be."""
    parts = [draw(IMAGES), draw(BOXES)]
    images, boxes = (values()[value] if as_it_should_be else value for as_it_should_be, value in parts)
    is_plain = all(as_it_should_be for as_it_should_be, _ in parts)
    if draw(st.integers(0, 9)) == 0:
        return draw(NESTED), False
    if draw(st.booleans()):
        return draw(st.sampled_from([*CONTAINERS.values()]))(images, boxes), is_plain
    more = draw(st.dictionaries(st.text(max_size=4) | st.integers() | st.none(), NESTED, max_size=3))
    return {**more, "pixel_values": images, "input_boxes": boxes}, is_plain


@given(batches(), st.booleans())
@settings(max_examples=8)
def test_any_batch(held, through_the_tap):
    assert_plain_or_refused(*held, through_the_tap)


@pytest.mark.long
@given(batches(), st.booleans())
@settings(max_examples=1500)
def test_any_batch_in_thousands(held, through_the_tap):
    assert_plain_or_refused(*held, through_the_tap)


@pytest.mark.parametrize(
    "container", [lambda x: {"a": x}, lambda x: [x], lambda x: (x,)], ids=["dict", "list", "tuple"]
)
def test_tensors_are_found_in_eight_containers_and_copied_with_them(container):
    tensor = torch.zeros(1)
    value = functools.reduce(lambda inner, _: container(inner), range(8), tensor)
    assert list(leaves(value)) == [tensor]
    kept = snapshot(value)
    assert not kept.changed()
    tensor.add_(1)
    assert kept.changed()
    # Whatever lies deeper is one value.
    assert list(leaves(container(value))) == [container(tensor)]


def test_objects_are_looked_into_twice():
    def held(value: object, depth: int) -> object:
        return types.SimpleNamespace(x=held(value, depth - 1)) if depth else value

    tensor = torch.zeros(1)
    assert list(leaves(held(tensor, 3))) == [tensor]
    assert not any(leaf is tensor for leaf in leaves(held(tensor, 4)))


def test_a_call_is_of_what_it_was_given_alone_or_by_name():
    x, other = torch.zeros(2), torch.zeros(2)
    call = Call(arguments=snapshot(((x,), {})), names=("x", "y"))
    for batch in (x, {"x": x}):
        assert not call.is_of_another(batch)
    for batch in (other, {"x": other}, x[:1]):
        assert call.is_of_another(batch)
    assert not Call().is_of_another(other)
    # Of two arguments neither is the batch.
    both = Call(arguments=snapshot(((x,), {"y": other})), names=("x", "y"))
    for batch in (x, other, {"x": x, "y": other}):
        assert not both.is_of_another(batch)
    assert both.is_of_another({"x": other, "y": x})
    x.add_(1)
    for batch in (x, {"x": x}):
        assert call.is_of_another(batch)
        assert both.is_of_another(batch)


@pytest.mark.parametrize(
    ("a", "b", "apart"),
    [
        (1, 2, True),
        (1, 1, False),
        (0.5, 1, True),
        ("a", "b", True),
        ("a", "a", False),
        (1, None, False),
        ([1], [1, 1], True),
    ],
)
def test_plain_values_tell_batches_apart(a, b, apart):
    assert differ(a, b) is apart
    assert differ(b, a) is apart
    assert differ({"x": a, "y": 0}, {"x": b}) is apart


def test_what_a_mapping_of_another_class_holds_is_copied_too():
    sizes = [1, 2]
    kept = snapshot(collections.OrderedDict(sizes=sizes, name="a"))
    sizes.append(3)
    assert kept.value == collections.OrderedDict(sizes=[1, 2], name="a")
    assert type(kept.value) is collections.OrderedDict
