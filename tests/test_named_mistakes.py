"""Gradients that are not there or pile up, parts that are called past their hooks, compilers: each is named."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from renyi_kd import CachedTeacher, InfoSAMLoss, tap
from tests.support.loops import MiniSam
from tests.support.models import DIM, IMAGE_SIZE, hf_batch, hf_sam, meta_batch, meta_forward, meta_sam
from tests.support.stand_ins import samed

peft = pytest.importorskip("peft")


# gradients that are not there


def checkpoint_layers(model: nn.Module, reentrant: bool) -> None:
    """Checkpoint the layers of the encoder, as transformers does under ``use_reentrant``."""

    def checkpointed(forward: Callable[..., Any], x: Tensor, **settings: Any) -> Any:
        # The reentrant form takes no names.
        return torch.utils.checkpoint.checkpoint(partial(forward, **settings), x, use_reentrant=reentrant)

    for layer in model.base_model.model.vision_encoder.layers:
        layer.forward = partial(checkpointed, layer.forward)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("decoder", [True, False])
def test_an_encoder_whose_adapters_get_no_gradient_is_named(reentrant, decoder):
    saved = ["mask_decoder"] if decoder else None
    config = peft.LoraConfig(target_modules=["qkv"], init_lora_weights=False, modules_to_save=saved)
    model = peft.get_peft_model(hf_sam(1), config).train()
    checkpoint_layers(model, reentrant)
    teacher, student, batch, loss = tap(hf_sam(0)), tap(model), hf_batch(3), InfoSAMLoss(DIM)
    if reentrant:
        with pytest.warns(UserWarning, match="None of the inputs have requires_grad"):
            student(batch)
        with pytest.raises(RuntimeError, match=r"image features must have a gradient.*use_reentrant=False"):
            loss(teacher, student, batch)
    else:
        student(batch)
        loss(teacher, student, batch).backward()
        assert all(p.grad is not None for name, p in model.named_parameters() if "lora_" in name)


def test_an_encoder_that_the_loop_runs_without_gradient_is_its_own_choice():
    model = meta_sam(1)
    student, batch = tap(model), meta_batch(2)
    with torch.no_grad():
        maps = model.image_encoder(torch.stack([item["image"] for item in batch]))
    for feature, item in zip(maps, batch, strict=True):
        sparse, dense = model.prompt_encoder(points=None, boxes=item["boxes"], masks=None)
        model.mask_decoder(feature[None], model.prompt_encoder.get_dense_pe(), sparse, dense, multimask_output=False)
    assert InfoSAMLoss(DIM)(tap(meta_sam(0), call=meta_forward), student, batch).isfinite()


def test_an_encoder_that_detaches_its_output_is_named():
    class Detaching(MiniSam):
        def __init__(self) -> None:
            super().__init__()
            encoder = self.image_encoder
            self.image_encoder = nn.Sequential(encoder, Detach())

    with pytest.raises(RuntimeError, match="image features must have a gradient where the image encoder is trained"):
        InfoSAMLoss(4)(tap(MiniSam()), tap(Detaching()), torch.randn(3, 3, 3, 3))


class Detach(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.detach()


# gradients that nobody clears


def test_gradients_of_the_relation_module_that_pile_up_are_named():
    teacher, student, batch, loss = tap(hf_sam(0)), tap(hf_sam(1)), hf_batch(2), InfoSAMLoss(DIM)
    loss(teacher, student, batch).backward()
    student.model.zero_grad()
    loss(teacher, student, batch).backward()
    student.model.zero_grad()
    with pytest.warns(UserWarning, match="gradients must be cleared in every step.*infosam_loss.zero_grad"):
        value = loss(teacher, student, batch)
    # Once: warnings are errors here.
    for _ in range(2):
        value.backward()
        student.model.zero_grad()
        value = loss(teacher, student, batch)


def test_gradients_that_are_accumulated_or_cleared_together_are_fine():
    teacher, student, batch, loss = tap(hf_sam(0)), tap(hf_sam(1)), hf_batch(2), InfoSAMLoss(DIM)
    optimizer = torch.optim.SGD([*student.model.parameters(), *loss.parameters()], lr=0.0)
    for step in range(6):
        loss(teacher, student, batch).backward()
        if step % 2:
            optimizer.step()
            optimizer.zero_grad()


# parts that are called past their hooks


def test_a_decoder_that_is_run_past_its_call_raises_at_the_loss_and_not_in_the_loop():
    sam = meta_sam()
    student, boxes = tap(sam), torch.tensor([[2.0, 2, 20, 20], [4, 4, 30, 30]])
    sparse, dense = sam.prompt_encoder(points=None, boxes=boxes, masks=None)
    arguments = {
        "image_embeddings": torch.randn(1, DIM, 4, 4),
        "image_pe": sam.prompt_encoder.get_dense_pe(),
        "sparse_prompt_embeddings": sparse,
        "dense_prompt_embeddings": dense,
    }
    for run in (
        lambda: sam.mask_decoder.forward(**arguments, multimask_output=False),
        lambda: sam.mask_decoder.predict_masks(**arguments),
        lambda: sam.mask_decoder.output_hypernetworks_mlps[0](torch.randn(2, DIM)),
    ):
        run()
        with pytest.raises(RuntimeError, match=r"mask decoder must be called, got a run of its parts past its call"):
            student.take(torch.zeros(1))
        student.clear()


class Split(nn.Module):
    """finetune-anything's form: the parts of the decoder run in a neck and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.sam, self.runs = meta_sam(), 0

    def forward(self, image: Tensor) -> Tensor:
        self.runs += 1
        decoder, maps = self.sam.mask_decoder, self.sam.image_encoder(image)
        tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])[None].expand(len(maps), -1, -1)
        position = self.sam.prompt_encoder.get_dense_pe().expand(len(maps), -1, -1, -1)
        return decoder.transformer(maps, position, tokens)[0][:, 1:5].mean()


@pytest.mark.parametrize("given", [True, False])
def test_decoders_that_were_found_and_never_called_are_named_without_another_run(given):
    model, image = Split(), torch.randn(2, 3, 32, 32)
    teacher, student = tap(copy.deepcopy(model)), tap(model)
    model(image)
    with pytest.raises(
        RuntimeError, match=r"it ran, and none of its decoders \(sam.mask_decoder\) was called; name the"
    ):
        InfoSAMLoss(DIM)(teacher, student, image if given else None)
    assert model.runs == 1


def test_the_places_of_a_split_decoder_can_be_named():
    places = {
        "image_features": "sam.image_encoder",
        "mask_tokens": ("sam.mask_decoder.transformer", lambda output: output[0][:, 1:5]),
    }
    model, image = Split(), torch.randn(2, 3, 32, 32)
    teacher, student = tap(copy.deepcopy(model), **places), tap(model, **places)
    model(image)
    assert InfoSAMLoss(DIM)(teacher, student, image).isfinite()


# whose error it is


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_an_error_names_the_model_that_raised_it(role):
    models = {"teacher": hf_sam(0), "student": hf_sam(1)}
    models[role].to(torch.bfloat16)
    with pytest.raises(RuntimeError) as caught:
        InfoSAMLoss(DIM)(tap(models["teacher"]), tap(models["student"]), hf_batch(2))
    (note,) = caught.value.__notes__
    assert f"while the {role} ran (SamModel, torch.bfloat16 on cpu)" in note
    assert f"{role}.model.to(device, dtype)" in note


def test_a_batch_of_one_and_a_dropped_id_name_the_settings_that_help(tmp_path):
    teacher, student, batch = tap(hf_sam(0)), tap(hf_sam(1)), hf_batch(1)
    with pytest.raises(ValueError, match="drop_last=True .*dataloader_drop_last"):
        InfoSAMLoss(DIM)(teacher, student, batch)
    with pytest.raises(ValueError, match="remove_unused_columns=False"):
        InfoSAMLoss(DIM)(CachedTeacher(teacher, tmp_path), student, hf_batch(2))


# compilers


def test_an_exported_model_leaves_nothing_behind():
    model, images = samed(1).eval(), torch.randn(3, 3, IMAGE_SIZE, IMAGE_SIZE)
    teacher, student = tap(samed(0)), tap(model)
    torch.export.export(model, (images,), strict=False)
    assert not student.pending
    student(images)
    assert InfoSAMLoss(DIM)(teacher, student, images).isfinite()


def test_a_run_on_tensors_without_numbers_leaves_nothing_behind():
    from torch._subclasses.fake_tensor import FakeTensorMode

    model, images = samed(1), torch.randn(3, 3, IMAGE_SIZE, IMAGE_SIZE)
    student = tap(model)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model(mode.from_tensor(images))
    assert not student.pending
    student(images)
    assert student.take().mask_tokens.isfinite().all()


@pytest.mark.usefixtures("fresh_compiler")
def test_fullgraph_says_what_it_needs():
    model = MiniSam()
    student = tap(model)
    with pytest.raises(Exception, match="must be compiled without fullgraph=True"):
        torch.compile(model, backend="eager", fullgraph=True)(torch.randn(3, 3, 3, 3))
    student.close()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_models_made_by_jit_are_refused():
    traced = torch.jit.trace(nn.Linear(3, 3), torch.randn(2, 3))
    for model in (traced, nn.Sequential(traced)):
        with pytest.raises(TypeError, match=r"must be made of Python modules, got .*torch\.jit"):
            tap(model)


@pytest.mark.parametrize("own", ["tap", "InfoSAMLoss", "CachedTeacher"])
def test_an_error_of_this_package_within_a_model_is_left_as_it_is(own):
    def call(_model: nn.Module, _batch: object) -> None:
        raise ValueError(f"{own}: something must be something else")

    with pytest.raises(ValueError, match="something else") as caught:
        InfoSAMLoss(DIM)(tap(hf_sam(0)), tap(hf_sam(1), call=call), hf_batch(2))
    assert not hasattr(caught.value, "__notes__")
