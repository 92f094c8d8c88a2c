"""Whatever a loop does in whatever order, a loss gets the features that plain hooks see, or says why there are none."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple
from unittest import mock

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor, nn

import renyi_kd.loss
from renyi_kd import InfoSAMLoss, SAMFeatures, Tap, tap

DIM, N_TOKENS, SPOTS = 4, 2, ("encoder", "prompts", "transformer", "after tokens")


# a model


class FaultError(Exception):
    """Raised in the middle of a forward."""


class Fuse:
    """Raises at a spot of the model, after so many passes of it."""

    def __init__(self) -> None:
        self.spot, self.left = "", 0

    def pass_by(self, spot: str) -> None:
        if spot == self.spot:
            self.left -= 1
            if self.left < 0:
                raise FaultError


class Encoder(nn.Conv2d):
    def __init__(self, fuse: Fuse) -> None:
        super().__init__(3, DIM, 2)
        self.fuse = fuse

    def forward(self, image: Tensor) -> Tensor:
        self.fuse.pass_by("encoder")
        return super().forward(image).tanh()


class PromptEncoder(nn.Module):
    """Meta's form: points are a pair of coordinates and labels."""

    def __init__(self, fuse: Fuse) -> None:
        super().__init__()
        self.fuse, self.coordinates, self.corners = fuse, nn.Linear(2, DIM), nn.Linear(4, DIM)

    def forward(self, points: tuple[Tensor, Tensor] | None, boxes: Tensor | None) -> Tensor:
        self.fuse.pass_by("prompts")
        parts = [] if boxes is None else [self.corners(boxes)[..., None, :]]
        if points is not None:
            parts.append(self.coordinates(points[0]) * points[1][..., None])
        return torch.cat(parts, -2)


class Transformer(nn.Linear):
    """Takes prompts ``[b, p, k, d]`` and returns tokens ``[b, p, n, d]``."""

    def forward(self, image: Tensor, tokens: Tensor, prompts: Tensor) -> Tensor:
        context = image.mean((2, 3))[:, None, None] + prompts.mean(-2, keepdim=True)
        return super().forward(tokens + context).tanh()


class Decoder(nn.Module):
    def __init__(self, fuse: Fuse) -> None:
        super().__init__()
        self.fuse, self.transformer = fuse, Transformer(DIM, DIM)
        self.iou_token, self.mask_tokens = nn.Embedding(1, DIM), nn.Embedding(N_TOKENS, DIM)
        self.output_hypernetworks_mlps = nn.ModuleList([nn.Linear(DIM, DIM) for _ in range(N_TOKENS)])

    def forward(self, image_embeddings: Tensor, sparse_prompt_embeddings: Tensor) -> Tensor:
        self.fuse.pass_by("transformer")
        own = torch.cat([self.iou_token.weight, self.mask_tokens.weight])
        tokens = self.transformer(image_embeddings, own, sparse_prompt_embeddings)
        kernels = [mlp(tokens[:, :, 1 + number]) for number, mlp in enumerate(self.output_hypernetworks_mlps)]
        self.fuse.pass_by("after tokens")
        return torch.einsum("bpnd,bdhw->bpnhw", torch.stack(kernels, 2), image_embeddings)


class TinySam(nn.Module):
    """Decodes image after image, or all at once; every prompt as often as there are clicks."""

    def __init__(self, seed: int, at_once: bool) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.at_once, self.fuse = at_once, Fuse()
        self.image_encoder, self.prompt_encoder = Encoder(self.fuse), PromptEncoder(self.fuse)
        self.mask_decoder = Decoder(self.fuse)

    def forward(self, image: Tensor, boxes: Tensor | None, points: Any, n_calls: int) -> list[Tensor]:
        return by_parts(self, {"image": image, "boxes": boxes, "points": points, "n_calls": n_calls})


def by_parts(model: TinySam, batch: dict[str, Any]) -> list[Tensor]:
    maps = model.image_encoder(batch["image"])
    n_images, masks = len(maps), []
    for part in [slice(None)] if model.at_once else [slice(i, i + 1) for i in range(n_images)]:
        for _ in range(batch["n_calls"]):
            points = None if batch["points"] is None else tuple(x[part] for x in batch["points"])
            boxes = None if batch["boxes"] is None else batch["boxes"][part]
            prompts = model.prompt_encoder(points, boxes)
            masks.append(model.mask_decoder(image_embeddings=maps[part], sparse_prompt_embeddings=prompts))
    return masks


def make_batch(number: int) -> dict[str, Any]:
    """Return batch ``number``; all have one size, so that nothing but values and memory tells them apart."""
    generator = torch.Generator().manual_seed(number)
    shape = (2, 1 + number % 2)
    points = torch.rand(*shape, 2, 2, generator=generator), torch.ones(*shape, 2)
    return {
        "image": torch.randn(2, 3, 3, 3, generator=generator),
        "boxes": torch.rand(*shape, 4, generator=generator),
        "points": points if number < 2 else None,
        "n_calls": 2 if number == 3 else 1,
    }


# what must be collected


class Unit(NamedTuple):
    """A run that the loss must know of.

    Attributes:
        kind: through the tap, by a call of the model, or by its parts.
        batch: the number of what it ran on.
        version: how often that had been written to.
        features: what plain hooks saw.
        masks: what it returned.
        collected: image features and mask tokens of its last call.

    """

    kind: str
    batch: int
    version: int
    features: SAMFeatures
    masks: list[Tensor]
    collected: tuple[Tensor, Tensor]


@contextmanager
def plain_hooks(model: TinySam) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Give a list that fills with the image features and mask tokens of every decoder call that ends."""
    calls: list[tuple[Tensor, Tensor]] = []
    last: list[Tensor] = []
    handles = [
        model.mask_decoder.transformer.register_forward_hook(
            lambda _module, _args, output: last.append(output[:, :, 1 : 1 + N_TOKENS])
        ),
        model.mask_decoder.register_forward_hook(
            lambda _module, _args, kwargs, _output: calls.append((kwargs["image_embeddings"], last[-1])),
            with_kwargs=True,
        ),
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def features_of(calls: list[tuple[Tensor, Tensor]], at_once: bool, n_calls: int) -> SAMFeatures:
    """Return the features of one run, whose calls are known to come image by image, each ``n_calls`` times."""
    maps = [image.detach().clone() for image, _ in calls[::n_calls]]
    tokens = [token.detach().clone().flatten(0, 1) for _, token in calls]
    n_prompts = calls[0][1].shape[1]
    if at_once:
        index = torch.arange(len(maps[0])).repeat_interleave(n_prompts).repeat(n_calls)
    else:
        index = torch.arange(len(maps)).repeat_interleave(n_calls * n_prompts)
    return SAMFeatures(torch.cat(maps), torch.cat(tokens), index)


def joined(parts: list[SAMFeatures]) -> SAMFeatures:
    maps, tokens, index = zip(*parts, strict=True)
    before = [sum(map(len, maps[:number])) for number in range(len(maps))]
    return SAMFeatures(
        torch.cat(maps), torch.cat(tokens), torch.cat([n + x for n, x in zip(before, index, strict=True)])
    )


def assert_equal(actual: SAMFeatures, expected: SAMFeatures) -> None:
    assert torch.equal(actual.image_features, expected.image_features)
    assert torch.equal(actual.mask_tokens, expected.mask_tokens)
    index = torch.arange(len(actual.mask_tokens)) if actual.image_index is None else actual.image_index
    assert torch.equal(index, expected.image_index)


NUMBERS = st.integers(0, 3)
KINDS = st.sampled_from(["tap", "model", "parts"])
THEN = st.sampled_from(["backward", "keep", "drop"])
NO_GRADIENT = st.sampled_from([torch.no_grad, torch.inference_mode])


class AnyOrder(RuleBasedStateMachine):
    """A training loop that does anything next; beside it, what it must have left behind."""

    @initialize(at_once=st.booleans(), with_call=st.booleans(), frozen=st.booleans())
    def begin(self, at_once: bool, with_call: bool, frozen: bool) -> None:
        self.call = by_parts if with_call else None
        self.frozen = frozen
        self.teacher, self.student = (tap(TinySam(seed, at_once), call=self.call) for seed in range(2))
        self.student.model.image_encoder.requires_grad_(not frozen)
        self.loss = InfoSAMLoss(DIM, token="all", compare_inputs="always")
        self.batches = [make_batch(number) for number in range(4)]
        self.waiting: list[Unit] = []
        # A loop by parts that an exception left in the middle: whole calls of a batch that is not whole.
        self.broken = False
        self.differentiated = False
        self.kept: list[Tensor] = []

    # runs

    @rule(number=NUMBERS, kind=KINDS, in_handler=st.booleans())
    def run(self, number: int, kind: str, in_handler: bool) -> None:
        self._forget_what_was_differentiated()
        if in_handler:
            try:
                raise FaultError
            except FaultError:
                unit = self._run(self.student, number, kind)
        else:
            unit = self._run(self.student, number, kind)
        self.waiting.append(unit)

    @rule(number=NUMBERS, kind=KINDS, spot=st.sampled_from(SPOTS), passes=st.integers(0, 1))
    def fail(self, number: int, kind: str, spot: str, passes: int) -> None:
        self._forget_what_was_differentiated()
        model = self.student.model
        model.fuse.spot, model.fuse.left = spot, passes
        raised, n_calls = False, 0
        try:
            with plain_hooks(model) as calls:
                self._call(self.student, number, kind)
        except FaultError:
            raised, n_calls = True, len(calls)
        finally:
            model.fuse.spot = ""
        if not raised:
            self.student.clear()
        if not raised or kind != "parts":
            self._nothing_waits()
        elif n_calls:
            self.broken = True

    @rule(number=NUMBERS, kind=KINDS, mode=NO_GRADIENT)
    def validate(self, number: int, kind: str, mode: Any) -> None:
        self._forget_what_was_differentiated()
        self.student.model.eval()
        with mode():
            self._call(self.student, number, kind)
        self.student.model.train()

    @rule(number=NUMBERS, mode=st.sampled_from([torch.no_grad, nullcontext]), kind=KINDS)
    def encode_alone_before_a_step(self, number: int, mode: Any, kind: str) -> None:
        self._forget_what_was_differentiated()
        with mode():
            self.student.model.image_encoder(self.batches[number]["image"])
        self.step(0, kind, True, "backward")

    @rule(number=NUMBERS, kind=KINDS, with_gradient=st.booleans())
    def run_the_teacher(self, number: int, kind: str, with_gradient: bool) -> None:
        with torch.set_grad_enabled(with_gradient):
            self._call(self.teacher, number, kind)

    @rule(number=NUMBERS, role=st.sampled_from(["teacher", "student"]))
    def observe(self, number: int, role: str) -> None:
        tapped = getattr(self, role)
        assert_equal(tapped.observe(self.batches[number]), self._without_gradient(tapped, number))
        if role == "student":
            self._nothing_waits()

    @rule(number=NUMBERS, kind=KINDS)
    def run_aside(self, number: int, kind: str) -> None:
        with self.student.set_aside():
            unit = self._run(self.student, number, kind)
            assert_equal(self.student.take(), unit.features)

    # what becomes of them

    @precondition(lambda self: self.waiting)
    @rule(given=st.none() | st.just("last") | NUMBERS, then=THEN)
    def take_loss(self, given: int | str | None, then: str) -> None:
        self._take_loss(self.waiting[-1].batch if given == "last" else given, then)

    @precondition(lambda self: not self.waiting)
    @rule(given=st.none() | NUMBERS, then=THEN)
    def take_loss_without_a_run(self, given: int | None, then: str) -> None:
        self._take_loss(given, then)

    @rule(number=NUMBERS, kind=KINDS, is_given=st.booleans(), then=THEN)
    def step(self, number: int, kind: str, is_given: bool, then: str) -> None:
        self.run(number, kind, False)
        self._take_loss(number if is_given else None, then)

    @rule(numbers=st.lists(NUMBERS, min_size=2, max_size=3), kind=KINDS, is_given=st.booleans(), then=THEN)
    def accumulate(self, numbers: list[int], kind: str, is_given: bool, then: str) -> None:
        self.student.clear()
        self._nothing_waits()
        for number in numbers:
            self.run(number, kind, False)
        self._take_loss(numbers[-1] if is_given else None, then)

    def _take_loss(self, given: int | None, then: str) -> None:
        seen: list[SAMFeatures] = []
        compute = renyi_kd.loss.relation_terms

        def spy(function: str, relation: nn.Module, teacher: SAMFeatures, student: SAMFeatures, *rest: Any, **k: Any):
            seen[:] = teacher, student
            return compute(function, relation, teacher, student, *rest, **k)

        batch = None if given is None else self.batches[given]
        error = self._error(given)
        modes = [module.training for module in self.teacher.model.modules()]
        with mock.patch.object(renyi_kd.loss, "relation_terms", spy):
            if error is not None:
                with pytest.raises(error):
                    self.loss(self.teacher, self.student, batch)
                assert not seen
            else:
                if not self.waiting:
                    # The loss runs the student itself.
                    self.waiting.append(self._run(self.student, given, "tap", keep=False))
                value = self.loss(self.teacher, self.student, batch)
                self._check(seen, value, then)
        assert [module.training for module in self.teacher.model.modules()] == modes
        self._nothing_waits()

    def _check(self, seen: list[SAMFeatures], value: Tensor, then: str) -> None:
        assert_equal(seen[0], joined([self._without_gradient(self.teacher, unit.batch) for unit in self.waiting]))
        assert_equal(seen[1], joined([unit.features for unit in self.waiting]))
        assert not seen[0].mask_tokens.requires_grad
        assert seen[1].mask_tokens.requires_grad
        total = value + sum(mask.square().mean() for unit in self.waiting for mask in unit.masks)
        if then == "backward":
            total.backward()
            self.student.model.zero_grad()
            self.loss.zero_grad()
        elif then == "keep" and all(unit.version == self._version(unit.batch) for unit in self.waiting):
            self.kept.append(total)

    @precondition(lambda self: len(self.waiting) > 1 or self.broken)
    @rule()
    def clear(self) -> None:
        self.student.clear()
        self._nothing_waits()

    @rule(number=NUMBERS, kind=KINDS)
    def step_without_the_loss(self, number: int, kind: str) -> None:
        self.run(number, kind, False)
        self.waiting[-1].masks[-1].sum().backward()
        self.student.model.zero_grad()
        self.differentiated = True

    @precondition(lambda self: self.waiting and not self.differentiated)
    @rule(data=st.data())
    def differentiate_before_the_loss(self, data: st.DataObject) -> None:
        unit = data.draw(st.sampled_from([*range(len(self.waiting))]))
        mask = self.waiting[unit].masks[-1]
        if self.waiting[unit].version == self._version(self.waiting[unit].batch):
            mask.sum().backward(retain_graph=True)
            self.student.model.zero_grad()
            self.differentiated = True

    @precondition(lambda self: self.kept)
    @rule()
    def differentiate_an_earlier_step(self) -> None:
        self.kept.pop().backward()
        self.student.model.zero_grad()
        self.loss.zero_grad()

    # what happens to model, tap and batches

    @precondition(lambda self: not self.kept)
    @rule(number=NUMBERS, kind=KINDS, is_given=st.booleans())
    def overwrite(self, number: int, kind: str, is_given: bool) -> None:
        self.run(number, kind, False)
        self.batches[number]["image"].add_(0.25)
        self._take_loss(number if is_given else None, "drop")

    @precondition(lambda self: self.frozen and not self.kept)
    @rule(number=NUMBERS, kind=KINDS, is_given=st.booleans(), what=st.sampled_from([0, 1]))
    def overwrite_what_was_collected(self, number: int, kind: str, is_given: bool, what: int) -> None:
        self.run(number, kind, False)
        with torch.no_grad():
            self.waiting[-1].collected[what].mul_(2)
        with pytest.raises((RuntimeError, ValueError)):
            self.loss(self.teacher, self.student, self.batches[number] if is_given else None)
        self._nothing_waits()

    @rule(number=NUMBERS, with_pickle=st.booleans(), of_tap=st.booleans(), stay=st.booleans())
    def copy(self, number: int, with_pickle: bool, of_tap: bool, stay: bool) -> None:
        original = self.student if of_tap else self.student.model
        made: Any = pickle.loads(pickle.dumps(original)) if with_pickle else copy.deepcopy(original)
        twin: Tap = made if of_tap else tap(made, call=self.call)
        self._run(twin, number, "model")
        unit = self._run(twin, number, "tap")
        twin.clear()
        unit = self._run(twin, number, "tap")
        assert_equal(twin.take(self.batches[number]), unit.features)
        if not stay:
            self.student = twin
            self._nothing_waits()

    @rule(close=st.booleans(), role=st.sampled_from(["teacher", "student"]))
    def tap_again(self, close: bool, role: str) -> None:
        before: Tap = getattr(self, role)
        if close:
            before.close()
            with pytest.raises(RuntimeError, match="must be open"):
                before.take(self.batches[0])
        setattr(self, role, tap(before.model, call=self.call))
        if role == "student":
            self._nothing_waits()

    @invariant()
    def knows_whether_anything_waits(self) -> None:
        if hasattr(self, "waiting") and not self.differentiated:
            assert self.student.pending == bool(self.waiting or self.broken)

    # the loop and its oracle

    def _call(self, tapped: Tap, number: int, kind: str) -> list[Tensor]:
        batch, model = self.batches[number], tapped.model
        if kind == "tap":
            return tapped(batch)
        return model(**batch) if kind == "model" else by_parts(model, batch)

    def _run(self, tapped: Tap, number: int, kind: str, *, keep: bool = True) -> Unit:
        with plain_hooks(tapped.model) as calls:
            masks = self._call(tapped, number, kind)
        if not keep:
            tapped.clear()
        features = features_of(calls, tapped.model.at_once, self.batches[number]["n_calls"])
        return Unit(kind, number, self._version(number), features, masks if keep else [], calls[-1])

    def _without_gradient(self, tapped: Tap, number: int) -> SAMFeatures:
        with torch.no_grad(), plain_hooks(tapped.model) as calls:
            by_parts(tapped.model, self.batches[number])
        return features_of(calls, tapped.model.at_once, self.batches[number]["n_calls"])

    def _version(self, number: int) -> int:
        return self.batches[number]["image"]._version

    def _nothing_waits(self) -> None:
        self.waiting, self.broken, self.differentiated = [], False, False

    def _forget_what_was_differentiated(self) -> None:
        if self.differentiated:
            self._nothing_waits()

    def _error(self, given: int | None) -> type[Exception] | None:
        """Return what the loss must raise."""
        runs = [unit for unit in self.waiting if unit.kind != "parts"]
        parts = [unit for unit in self.waiting if unit.kind == "parts"]
        overwritten = [unit for unit in self.waiting if unit.version != self._version(unit.batch)]
        if self.differentiated:
            return RuntimeError
        if self.broken:
            # Of another batch, or of more images and prompts than the teacher sees.
            return (RuntimeError, ValueError)  # type: ignore[return-value]
        if not self.waiting:
            return RuntimeError if given is None else None
        if given is not None:
            if any(unit.batch != given or unit in overwritten for unit in runs):
                return RuntimeError
            if not runs and len({unit.batch == given for unit in parts}) > 1:
                return RuntimeError
        if any(unit.kind != "parts" for unit in overwritten):
            return RuntimeError
        if overwritten:
            return ValueError
        # What the teacher runs on must be all that the student ran on, once.
        if self.call is not None:
            seen = [unit.batch for unit in runs if unit.kind == "tap"] if given is None else [given]
        else:
            seen = [unit.batch for unit in runs] or ([] if given is None else [given])
        return None if seen == [unit.batch for unit in self.waiting] else ValueError


@pytest.mark.filterwarnings("ignore:tap. 256 decoder calls are waiting")
def test_a_loop_may_do_anything_next():
    settings = hypothesis.settings(max_examples=15, stateful_step_count=20)
    run_state_machine_as_test(AnyOrder, settings=settings)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:tap. 256 decoder calls are waiting")
def test_a_long_loop_may_do_anything_next():
    settings = hypothesis.settings(max_examples=40, stateful_step_count=50)
    run_state_machine_as_test(AnyOrder, settings=settings)
