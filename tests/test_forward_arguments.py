"""However a forward takes its arguments, the teacher is called as the student was, and nothing is dropped."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from renyi_kd import AdapterDisabled, InfoSAMLoss, tap
from renyi_kd.sam.run import unwrapped
from tests.support.models import DIM, hf_batch, hf_sam, meta_batch, meta_forward, meta_sam


class Wrapper(nn.Module):
    """Keeps what its forward was called with."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.sam = hf_sam(seed)
        self.got: dict[str, Any] = {}

    def run(self, pixel_values: Tensor, **prompts: Any) -> object:
        self.got = prompts
        return self.sam(pixel_values=pixel_values, **prompts)


class NamedPrompts(Wrapper):
    def forward(self, pixel_values: Tensor, **prompts: Any) -> object:
        return self.run(pixel_values, **prompts)


class AnyNames(Wrapper):
    """Its first child with named arguments takes other ones."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.sam = hf_sam(seed)
        self.vision_encoder = self.sam.vision_encoder

    def forward(self, **batch: Any) -> object:
        return self.run(batch["pixel_values"], input_boxes=batch["input_boxes"])


class PositionalOnly(Wrapper):
    def forward(self, pixel_values: Tensor, input_boxes: Tensor, /) -> object:
        return self.run(pixel_values, input_boxes=input_boxes)


class AnyArguments(Wrapper):
    def forward(self, *args: Tensor) -> object:
        return self.run(args[0], input_boxes=args[1])


class WithDefault(Wrapper):
    def forward(self, pixel_values: Tensor, input_boxes: Tensor | None = None) -> object:
        return self.run(pixel_values, **({} if input_boxes is None else {"input_boxes": input_boxes}))


class Whole(Wrapper):
    def forward(self, batch: Any) -> object:
        if isinstance(batch, dict):
            return self.run(batch["pixel_values"], input_boxes=batch["input_boxes"])
        return self.run(batch.pixel_values, input_boxes=batch.input_boxes)


class Pair(NamedTuple):
    pixel_values: Tensor
    input_boxes: Tensor


@dataclass
class Batch:
    pixel_values: Tensor
    input_boxes: Tensor


OWN_CALLS = {
    "named and any": (NamedPrompts, lambda model, x, boxes: model(x, input_boxes=boxes)),
    "any names": (AnyNames, lambda model, x, boxes: model(pixel_values=x, input_boxes=boxes)),
    "positional only": (PositionalOnly, lambda model, x, boxes: model(x, boxes)),
    "any arguments": (AnyArguments, lambda model, x, boxes: model(x, boxes)),
    "a default": (WithDefault, lambda model, x, boxes: model(x, boxes)),
    "one dict": (Whole, lambda model, x, boxes: model({"pixel_values": x, "input_boxes": boxes})),
    "a named tuple": (Whole, lambda model, x, boxes: model(Pair(x, boxes))),
    "a dataclass": (Whole, lambda model, x, boxes: model(Batch(x, boxes))),
}


@pytest.mark.parametrize("form", OWN_CALLS)
@pytest.mark.parametrize("given", [False, True])
def test_the_teacher_is_called_as_the_student_was(form, given):
    kind, call = OWN_CALLS[form]
    models, batch = [kind(seed) for seed in range(2)], hf_batch(3)
    teacher, student = map(tap, models)
    call(models[1], batch["pixel_values"], batch["input_boxes"])
    loss = InfoSAMLoss(DIM)
    value = loss(teacher, student, batch if given else None)
    assert models[0].got.keys() == models[1].got.keys() == {"input_boxes"}
    assert models[0].got["input_boxes"] is models[1].got["input_boxes"]
    assert torch.equal(value, loss(tap(models[0].sam), tap(models[1].sam), batch))


@pytest.mark.parametrize("kind", [NamedPrompts, AnyNames, Whole])
def test_a_mapping_reaches_a_forward_that_takes_any_names_or_the_whole(kind):
    models = [kind(seed) for seed in range(2)]
    batch = {name: value for name, value in hf_batch(3).items() if name != "ground_truth"}
    teacher, student = map(tap, models)
    student(batch)
    assert models[1].got.keys() == {"input_boxes"}
    assert InfoSAMLoss(DIM)(teacher, student, batch).isfinite()
    assert models[0].got.keys() == {"input_boxes"}


class Strict(NamedPrompts):
    def run(self, pixel_values: Tensor, *, input_boxes: Tensor) -> object:
        return super().run(pixel_values, input_boxes=input_boxes)


def test_what_a_forward_with_any_names_refuses_names_the_student():
    with pytest.raises(TypeError, match="unexpected keyword argument") as caught:
        tap(Strict(0))(hf_batch(3))
    assert any("while the student ran (Strict" in note for note in caught.value.__notes__)


def test_arguments_of_peft_task_types_are_those_of_the_model_inside():
    import peft

    config = peft.LoraConfig(target_modules=["qkv"], task_type="FEATURE_EXTRACTION", init_lora_weights=False)
    sam, batch, loss = hf_sam(0), hf_batch(3), InfoSAMLoss(DIM)
    model = peft.get_peft_model(copy.deepcopy(sam), config)
    teacher, student = tap(sam), tap(model)
    model(pixel_values=batch["pixel_values"], input_boxes=batch["input_boxes"])
    expected = loss(teacher, student, batch)
    student(batch)
    assert torch.equal(loss(teacher, student, batch), expected)
    student(batch)
    torch.testing.assert_close(loss(AdapterDisabled(student), student, batch), expected)


def test_wrappers_are_looked_through_and_models_of_the_users_are_not():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    sam = hf_sam()
    assert unwrapped(torch.compile(checkpoint_wrapper(sam), backend="eager")) is sam
    holder = Wrapper(0)
    assert unwrapped(holder) is holder


class Renamed(nn.Module):
    """A wrapped student beside a plain teacher."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.sam = hf_sam(seed)

    def forward(self, images: Tensor, boxes: Tensor) -> object:
        return self.sam(pixel_values=images, input_boxes=boxes)


def test_a_plain_teacher_of_a_wrapped_student_runs_on_the_batch_or_says_why_not():
    teacher, student, batch, loss = tap(hf_sam(0)), tap(Renamed(1)), hf_batch(3), InfoSAMLoss(DIM)
    student.model(batch["pixel_values"], batch["input_boxes"])
    assert torch.equal(loss(teacher, student, batch), loss(teacher, tap(student.model.sam), batch))
    student.model(batch["pixel_values"], batch["input_boxes"])
    with pytest.raises(ValueError, match=r"teacher must take what the student was called with, got SamModel.*call="):
        loss(teacher, student)


def test_a_name_that_nearly_is_a_prompts_is_pointed_at():
    batch = hf_batch(2)
    without = {"pixel_values": batch["pixel_values"], "boxes": batch["input_boxes"]}
    with pytest.warns(UserWarning, match="'boxes' of the batch is left out.*'input_boxes' is meant, rename it"):
        tap(hf_sam())(without)
    with pytest.warns(UserWarning, match="'input_box' of the batch.*'input_boxes' is meant"):
        tap(hf_sam())({"pixel_values": batch["pixel_values"], "input_box": batch["input_boxes"]})
    # With a prompt there is nothing to point at.
    tap(hf_sam())({**batch, "points": torch.zeros(1), "masks": torch.zeros(1)})


def test_metas_list_of_dicts_is_the_one_argument_of_a_forward():
    class Listed(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.sam = meta_sam(seed)

        def forward(self, batched_input: list[dict[str, Any]]) -> None:
            meta_forward(self.sam, batched_input)

    models, batch = [Listed(seed) for seed in range(2)], meta_batch(2, 2)
    teacher, student = map(tap, models)
    student(batch)
    assert InfoSAMLoss(DIM)(teacher, student, batch).isfinite()
    models[1](tuple(batch))
    assert InfoSAMLoss(DIM)(teacher, student).isfinite()
