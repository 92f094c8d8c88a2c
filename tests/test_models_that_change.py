"""Captured values, models and teachers that change: noticed and named, never used in silence."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from renyi_kd import AdapterDisabled, CachedTeacher, InfoSAMLoss, tap
from renyi_kd.teachers.model_pair import ModelPair
from tests.support.loops import MiniDecoder, MiniSam
from tests.support.models import DIM, hf_batch, hf_sam

peft = pytest.importorskip("peft")


def lora(**settings: Any) -> Any:
    return peft.LoraConfig(**{"r": 2, "target_modules": ["qkv"], "init_lora_weights": False, **settings})


# captured tokens


class Recycling(MiniDecoder):
    def forward(self, image_embeddings: Tensor) -> Tensor:
        token = self.transformer(image_embeddings.mean((2, 3)) + self.mask_tokens.weight)
        masks = torch.einsum("bc,bchw->bhw", self.output_hypernetworks_mlps[0](token), image_embeddings)
        with torch.no_grad():
            token.zero_()
        return masks


def test_tokens_that_are_overwritten_are_never_used():
    sam = MiniSam()
    sam.mask_decoder = Recycling(4)
    with pytest.raises(RuntimeError, match="mask tokens must stay as they are.*overwritten in place"):
        tap(sam).observe({"image": torch.randn(3, 3, 8, 8)})


def test_tokens_that_a_loop_changes_before_the_loss_are_never_used():
    sam, seen = hf_sam(1), []
    sam.mask_decoder.output_hypernetworks_mlps[0].register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    student, batch = tap(sam), hf_batch(2)
    student(batch)
    with torch.no_grad():
        seen[0].mul_(2)
    with pytest.raises(RuntimeError, match="mask tokens must stay as they are"):
        student.take(batch)


# a tap that was made before the model changed


@pytest.mark.parametrize("which", [0, 3])
def test_a_hypernetwork_that_is_replaced_after_the_tap_is_named(which):
    model, batch = hf_sam(1), hf_batch(2)
    student = tap(model)
    mlps = model.mask_decoder.output_hypernetworks_mlps
    mlps[which] = copy.deepcopy(mlps[which])
    student(batch)
    with pytest.raises(RuntimeError, match="must have the hypernetworks that it was tapped with.*tap the model again"):
        student.take(batch)


def test_a_hypernetwork_that_peft_copies_after_the_tap_is_named():
    model, batch = hf_sam(1), hf_batch(2)
    student = tap(model)
    wrapped = peft.get_peft_model(model, lora(modules_to_save=["output_hypernetworks_mlps.0"]))
    wrapped(pixel_values=batch["pixel_values"], input_boxes=batch["input_boxes"])
    with pytest.raises(RuntimeError, match="must have the hypernetworks that it was tapped with"):
        student.take(batch)


def test_a_decoder_that_peft_copies_after_the_tap_is_named():
    model, batch = hf_sam(1), hf_batch(2)
    student = tap(model)
    wrapped = peft.get_peft_model(model, lora(modules_to_save=["mask_decoder"]))
    wrapped(pixel_values=batch["pixel_values"], input_boxes=batch["input_boxes"])
    with pytest.raises(
        RuntimeError, match=r"without hooks at 'mask_decoder.modules_to_save.default'.*tap the model again"
    ):
        student.take(batch)


def test_a_decoder_that_is_set_anew_after_the_tap_is_named():
    model, batch = hf_sam(1), hf_batch(2)
    student = tap(model)
    model.mask_decoder = copy.deepcopy(model.mask_decoder)
    student(batch)
    with pytest.raises(RuntimeError, match="without hooks at 'mask_decoder'.*tap the model again"):
        student.take()


@pytest.mark.parametrize("name", ["default", "my-task", "task 2"])
def test_places_are_found_under_any_name_of_an_adapter(name):
    model = peft.get_peft_model(hf_sam(1), lora(modules_to_save=["mask_decoder"]), adapter_name=name)
    student = tap(
        model,
        image_features=("vision_encoder", lambda output: output.last_hidden_state),
        mask_tokens=("mask_decoder.transformer", lambda output: output[0][:, :, 1:2]),
    )
    student(hf_batch(3))
    assert len(student.take().mask_tokens) == 3


class Renamed(MiniDecoder):
    def forward(self, features: Tensor, scale: float = 1.0) -> Tensor:
        return super().forward(features * scale)


def test_the_image_of_a_decoder_that_names_it_otherwise_is_its_first_argument():
    student, teacher = MiniSam(), MiniSam()
    student.mask_decoder = Renamed(4)
    images = torch.randn(3, 3, 4, 4)
    tapped = tap(student)
    student(images)
    assert torch.equal(tapped.take(images).image_features, student.image_encoder(images))
    assert InfoSAMLoss(4)(tap(teacher), tapped, images).isfinite()


# forwards that belong to another model


@pytest.mark.parametrize("bind", ["compile", "lambda", "wraps"])
def test_a_copy_that_runs_the_original_is_refused(bind):
    model = hf_sam()
    encoder = model.vision_encoder
    if bind == "compile":
        encoder.forward = torch.compile(encoder.forward, backend="eager")
    elif bind == "lambda":
        bound = encoder.forward
        encoder.forward = functools.wraps(bound)(lambda *args, **kwargs: bound(*args, **kwargs))
    else:
        original = encoder.forward

        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return original(*args, **kwargs)

        encoder.forward = forward
    tap(model).close()
    with pytest.raises(ValueError, match="'vision_encoder' with a forward of its own that runs another model's"):
        tap(copy.deepcopy(model))


def wrapped_thrice(function: Callable[..., Any], wrap: str) -> Callable[..., Any]:
    for _ in range(3):
        if wrap == "partial":
            function = functools.partial(function)
        else:
            function = functools.wraps(function)(lambda *args, function=function, **kwargs: function(*args, **kwargs))
    return function


@pytest.mark.parametrize("wrap", ["partial", "wraps"])
def test_a_forward_of_another_model_is_found_in_three_wrappers(wrap):
    model, other = hf_sam(), hf_sam()
    model.vision_encoder.forward = wrapped_thrice(model.vision_encoder.forward, wrap)
    tap(model).close()
    model.vision_encoder.forward = wrapped_thrice(other.vision_encoder.forward, wrap)
    with pytest.raises(ValueError, match="'vision_encoder' with a forward of its own that runs another model's"):
        tap(model)


# teacher and student that share


@pytest.mark.parametrize("how", ["assign", "data", "view", "tied"])
def test_memory_that_the_student_trains_is_not_the_teachers(how):
    student, teacher = hf_sam(1), hf_sam(0)
    pairs = list(zip(teacher.parameters(), student.parameters(), strict=True))
    if how == "assign":
        teacher.load_state_dict(student.state_dict(), assign=True)
    elif how == "tied":
        teacher.vision_encoder.patch_embed.projection.weight = student.vision_encoder.patch_embed.projection.weight
    else:
        for a, b in pairs:
            a.data = b.data if how == "data" else b.data.view(-1).view(b.shape)
    with pytest.raises(
        ValueError, match="models of their own, got models that share the memory of .*, which is trained"
    ):
        InfoSAMLoss(DIM)(tap(teacher), tap(student), hf_batch(2))


def test_memory_that_comes_to_be_shared_or_trained_later_is_noticed():
    student, teacher, batch = hf_sam(1), hf_sam(0), hf_batch(2)
    tapped, loss = (tap(teacher), tap(student)), InfoSAMLoss(DIM)
    teacher.prompt_encoder = student.prompt_encoder.requires_grad_(False)
    tapped = tap(teacher), tap(student)
    assert loss(*tapped, batch).isfinite()
    student.prompt_encoder.requires_grad_(True)
    with pytest.raises(ValueError, match="share the memory of prompt_encoder"):
        loss(*tapped, batch)


def test_a_frozen_encoder_may_be_one_module_of_both():
    student, teacher, batch, loss = hf_sam(1), hf_sam(0), hf_batch(3), InfoSAMLoss(DIM)
    student.vision_encoder.requires_grad_(False)
    apart = copy.deepcopy(student.vision_encoder)
    teacher.vision_encoder = student.vision_encoder
    values = [loss(tap(teacher), tap(student), batch)]
    tapped = tap(teacher), tap(student)
    for _ in range(3):
        tapped[1](batch)
        values.append(loss(*tapped, batch))
        values[-1].backward()
    teacher.vision_encoder = apart
    expected = loss(tap(teacher), tap(student), batch)
    assert all(torch.equal(value, expected) for value in values)


def test_running_statistics_of_a_shared_encoder_are_trained():
    class WithNorm(nn.Module):
        def __init__(self, encoder: nn.Module) -> None:
            super().__init__()
            self.image_encoder, self.mask_decoder = encoder, MiniDecoder(4)

        def forward(self, image: Tensor) -> Tensor:
            return self.mask_decoder(self.image_encoder(image))

    encoder = nn.Sequential(nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4)).requires_grad_(False)
    teacher, student = WithNorm(encoder), WithNorm(encoder)
    with pytest.raises(ValueError, match="share the memory of image_encoder.1.running_mean, which is trained"):
        InfoSAMLoss(4)(tap(teacher), tap(student), torch.randn(3, 3, 8, 8))
    encoder.eval()
    assert InfoSAMLoss(4)(tap(teacher), tap(student), torch.randn(3, 3, 8, 8)).isfinite()


# teachers that people want


def test_an_average_of_the_student_is_a_teacher_that_moves():
    student, ema, loss = hf_sam(1), hf_sam(0), InfoSAMLoss(DIM)
    tapped, batch = (tap(ema), tap(student)), hf_batch(3)
    before = tapped[0].observe(batch).mask_tokens
    for _ in range(2):
        loss(*tapped, batch).backward()
        for p, q in zip(ema.parameters(), student.parameters(), strict=True):
            p.data.mul_(0.5).add_(q.data, alpha=0.5)
    assert not torch.equal(tapped[0].observe(batch).mask_tokens, before)
    averaged = torch.optim.swa_utils.AveragedModel(student)
    assert loss(tap(averaged), tapped[1], batch).isfinite()


def test_a_teacher_of_another_architecture():
    from tests.support.stand_ins import tiny_vit_sam

    teacher, student = tap(tiny_vit_sam(), call=run_meta), tap(hf_sam(1))
    batch = {**hf_batch(3), "boxes": None}
    value = InfoSAMLoss(DIM, compare_inputs="always")(teacher, student, batch)
    assert value.isfinite()


def run_meta(model: nn.Module, batch: dict[str, Tensor]) -> None:
    for feature, boxes in zip(model.image_encoder(batch["pixel_values"]), batch["input_boxes"], strict=True):
        sparse, dense = model.prompt_encoder(points=None, boxes=boxes, masks=None)
        model.mask_decoder(feature[None], model.prompt_encoder.get_dense_pe(), sparse, dense, multimask_output=False)


def test_adapters_that_transformers_adds_can_be_disabled():
    pretrained, batch = hf_sam(0), hf_batch(3)
    frozen, model = tap(copy.deepcopy(pretrained)), pretrained
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.add_adapter(lora())
    student, loss = tap(model), InfoSAMLoss(DIM)
    teacher = AdapterDisabled(student)
    states = [parameter.requires_grad for parameter in model.parameters()]
    student(batch)
    value = loss(teacher, student, batch)
    student(batch)
    torch.testing.assert_close(value, loss(frozen, student, batch))
    assert [parameter.requires_grad for parameter in model.parameters()] == states
    assert not torch.equal(student.observe(batch).image_features, teacher.observe(batch).image_features)


# caches of a teacher that is no longer the one it was


@pytest.mark.parametrize("write", ["data", "under no_grad", "one block"])
def test_a_cache_of_weights_that_were_averaged_is_refused(write, tmp_path):
    ema, student = hf_sam(0), hf_sam(1)
    batch = {**hf_batch(3), "sample_id": ["a", "b", "c"]}
    cached = CachedTeacher(tap(ema), tmp_path)
    cached.observe(batch)
    pairs = list(zip(ema.vision_encoder.parameters(), student.vision_encoder.parameters(), strict=True))
    for p, q in pairs[-1:] if write == "one block" else pairs:
        if write == "under no_grad":
            with torch.no_grad():
                p.lerp_(q, 0.5)
        else:
            p.data.mul_(0.5).add_(q.data, alpha=0.5)
    with pytest.raises(ValueError, match="the encoder weights of .* must be"):
        cached.observe(batch)


@pytest.mark.parametrize("change", ["other", "disabled", "merged"])
def test_a_cache_of_another_adapter_is_refused(change, tmp_path):
    model = peft.get_peft_model(hf_sam(0), lora(r=4))
    model.add_adapter("other", lora(r=4))
    batch = {**hf_batch(3), "sample_id": ["a", "b", "c"]}
    cached = CachedTeacher(tap(model.eval()), tmp_path)
    before = cached.observe(batch)
    if change == "other":
        model.set_adapter("other")
    elif change == "disabled":
        model.base_model.disable_adapter_layers()
    else:
        model.merge_adapter()
    with pytest.raises(ValueError, match="the encoder weights of .* must be"):
        cached.observe(batch)
    if change == "other":
        model.set_adapter("default")
        assert torch.equal(cached.observe(batch).image_features, before.image_features)


# the student without its adapters


def test_base_weights_that_are_trained_between_are_named():
    model = peft.get_peft_model(hf_sam(0), lora())
    student, batch = tap(model), hf_batch(2)
    teacher = AdapterDisabled(student)
    teacher.observe(batch)
    weight = model.base_model.model.mask_decoder.iou_token.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="got parameters that stay on: .*iou_token.weight"):
        teacher.observe(batch)
    student.observe(batch)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    model(pixel_values=batch["pixel_values"], input_boxes=batch["input_boxes"]).iou_scores.sum().backward()
    optimizer.step()
    weight.requires_grad_(False)
    with pytest.raises(
        ValueError, match="must stay as they were when it was made, got .*iou_token.weight written to since"
    ):
        teacher.observe(batch)
    assert AdapterDisabled(student).observe(batch).mask_tokens.isfinite().all()


def test_adapters_that_come_later_and_move_the_weights_are_named():
    model = peft.get_peft_model(hf_sam(0), lora())
    teacher, batch = AdapterDisabled(tap(model)), hf_batch(2)
    teacher.observe(batch)
    model.add_adapter("later", lora(init_lora_weights="pissa"))
    with pytest.raises(ValueError, match="got init_lora_weights='pissa' of adapter 'later'"):
        teacher.observe(batch)


def test_a_copy_of_the_student_without_adapters_begins_anew():
    model = peft.get_peft_model(hf_sam(0), lora())
    teacher, batch = AdapterDisabled(tap(model)), hf_batch(2)
    twin = copy.deepcopy(teacher)
    assert torch.equal(twin.observe(batch).mask_tokens, teacher.observe(batch).mask_tokens)


# adapters in the build


class Adapted(MiniSam):
    """A network whose adapters are part of its class."""

    def __init__(self) -> None:
        super().__init__()
        self.adapter = nn.Linear(3, 3)

    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image + self.adapter(image.movedim(1, -1)).movedim(-1, 1))


def test_a_copy_with_the_students_adapters_is_said_to_be_no_pretrained_model():
    student = Adapted()
    teacher = copy.deepcopy(student)
    with pytest.warns(
        UserWarning, match="teacher must be the pre-trained model, got one with adapters.*adapter.weight"
    ):
        InfoSAMLoss(4)(tap(teacher), tap(student), torch.randn(3, 3, 3, 3))
    student.adapter.requires_grad_(False)
    InfoSAMLoss(4)(tap(teacher), tap(student), torch.randn(3, 3, 3, 3))


@pytest.mark.parametrize("starts_at_zero", [True, False])
def test_a_copy_made_after_peft_is_pretrained_only_while_its_adapters_are_zero(starts_at_zero):
    student = peft.get_peft_model(hf_sam(0), lora(init_lora_weights=starts_at_zero))
    teacher, batch, loss = copy.deepcopy(student), hf_batch(2), InfoSAMLoss(DIM)
    if starts_at_zero:
        loss(tap(teacher), tap(student), batch)
    else:
        with pytest.warns(UserWarning, match="got one with adapters that are trained in the student, such as .*lora_B"):
            loss(tap(teacher), tap(student), batch)


def test_adapters_of_a_teacher_are_warned_of_once_for_each_pair_of_models():
    students = [peft.get_peft_model(hf_sam(0), lora()) for _ in range(2)]
    teachers = [copy.deepcopy(student) for student in students]
    pair = ModelPair()
    for teacher, student in [(0, 0), (1, 0), (1, 1), (0, 0)]:
        with pytest.warns(UserWarning, match="teacher must be the pre-trained model"):
            pair.check(teachers[teacher], students[student])
        # Warnings are errors here.
        pair.check(teachers[teacher], students[student])
