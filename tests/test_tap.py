"""Taps on real SAMs with tiny random weights: what is read, when it counts, and that the model is left alone."""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys
import weakref

import pytest
import torch
from torch import nn

from renyi_kd import InfoSAMLoss, SAMFeatures, tap
from renyi_kd.sam.rehearsal import rehearsing
from tests.support import module_gradients
from tests.support.memory import living
from tests.support.models import (
    DIM,
    GRID,
    IMAGE_SIZE,
    hf_batch,
    hf_sam,
    hooks_of,
    meta_batch,
    meta_forward,
    meta_sam,
    with_lora,
)


def spy_on_transformer(decoder: nn.Module) -> list[torch.Tensor]:
    """Return a list that fills with the transformer's token outputs, the definition of a mask token."""
    seen: list[torch.Tensor] = []
    decoder.transformer.register_forward_hook(lambda _module, _args, output: seen.append(output[0]))
    return seen


# what is read


@pytest.mark.parametrize("n_prompts", [1, 3])
def test_hf_features_equal_what_the_model_computed(n_prompts):
    model, batch = hf_sam(), hf_batch(2, n_prompts)
    tokens, images = spy_on_transformer(model.mask_decoder), []
    model.vision_encoder.register_forward_hook(lambda _module, _args, output: images.append(output.last_hidden_state))
    student = tap(model)
    student(batch)
    features = student.take(batch)
    assert torch.equal(features.image_features, images[0])
    assert features.image_features.shape == (2, DIM, GRID, GRID)
    assert torch.equal(features.mask_tokens, tokens[0][:, :, 1:5].flatten(0, 1))
    expected = None if n_prompts == 1 else [0, 0, 0, 1, 1, 1]
    assert (None if features.image_index is None else features.image_index.tolist()) == expected


def test_meta_decoder_calls_per_image_accumulate():
    model, batch = meta_sam(), meta_batch(3, 2)
    tokens, images = spy_on_transformer(model.mask_decoder), []
    model.image_encoder.register_forward_hook(lambda _module, _args, output: images.append(output))
    student = tap(model, call=meta_forward)
    student(batch)
    features = student.take(batch)
    assert len(tokens) == 3
    assert torch.equal(features.image_features, images[0])
    assert torch.equal(features.mask_tokens, torch.cat(tokens)[:, 1:5])
    assert features.image_index.tolist() == [0, 0, 1, 1, 2, 2]


def test_clicks_on_one_image_share_its_features():
    model = meta_sam()
    student = tap(model)
    feature = model.image_encoder(torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE))
    for n_points in (1, 2, 3):
        points = torch.rand(1, n_points, 2) * IMAGE_SIZE, torch.ones(1, n_points)
        sparse, dense = model.prompt_encoder(points=points, boxes=None, masks=None)
        model.mask_decoder(feature, model.prompt_encoder.get_dense_pe(), sparse, dense, multimask_output=False)
    features = student.take()
    assert features.image_features.data_ptr() == feature.data_ptr()
    assert features.mask_tokens.shape == (3, 4, DIM)
    assert features.image_index.tolist() == [0, 0, 0]


def test_precomputed_embeddings_need_no_encoder():
    model, batch = hf_sam(), hf_batch()
    embeddings = model.get_image_embeddings(batch["pixel_values"]).detach()
    calls = []
    model.vision_encoder.register_forward_hook(lambda *_: calls.append(1))
    student, teacher = tap(model), tap(hf_sam(1))
    batch = {"image_embeddings": embeddings, "input_boxes": batch["input_boxes"]}
    student(batch)
    loss = InfoSAMLoss(DIM)(teacher, student, batch)
    assert calls == []
    reached = module_gradients(loss, model)
    assert any("mask_decoder" in name and value.abs().max() > 0 for name, value in reached.items())


@pytest.mark.parametrize(("make", "batch"), [(hf_sam, hf_batch), (meta_sam, meta_batch)], ids=["hf", "meta"])
def test_gradients_reach_encoder_decoder_and_module_as_by_hand(make, batch):
    call = meta_forward if make is meta_sam else None
    teacher, student, batch = make(0), make(1), batch(3, 2)
    loss_module = InfoSAMLoss(DIM)
    tapped_teacher, tapped_student = tap(teacher, call=call), tap(student, call=call)
    tapped_student(batch)
    loss = loss_module(tapped_teacher, tapped_student, batch)
    of_student, again = module_gradients(loss, student), loss_module(tapped_teacher, tapped_student, batch)
    got = {**of_student, **module_gradients(again, loss_module)}
    tapped_teacher.close(), tapped_student.close()

    def by_hand(model: nn.Module) -> SAMFeatures:
        tokens, images = spy_on_transformer(model.mask_decoder), []
        encoder = model.vision_encoder if make is hf_sam else model.image_encoder
        take = (lambda output: output.last_hidden_state) if make is hf_sam else (lambda output: output)
        encoder.register_forward_hook(lambda _module, _args, output: images.append(take(output)))
        meta_forward(model, batch) if call else model(batch["pixel_values"], input_boxes=batch["input_boxes"])
        mask_tokens = torch.cat([value.reshape(-1, *value.shape[-2:]) for value in tokens])[:, 1:5]
        return SAMFeatures(images[0], mask_tokens, torch.arange(3).repeat_interleave(2))

    with torch.no_grad():
        teacher.eval()
        expected_teacher = by_hand(teacher)
    expected = loss_module(expected_teacher, by_hand(student))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    of_student, again = module_gradients(expected, student), loss_module(expected_teacher, by_hand(student))
    wanted = {**of_student, **module_gradients(again, loss_module)}
    scale = max(value.abs().max() for value in wanted.values())
    for name in ("relation.key_proj.weight", *[n for n in wanted if "attn.qkv" in n or "hypernetworks" in n]):
        torch.testing.assert_close(got.get(name), wanted.get(name), rtol=1e-3, atol=float(1e-5 * scale))
    assert any("attn.qkv" in name for name in got)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_explicit_places_give_the_same_features_as_the_family():
    model, batch = hf_sam(), hf_batch(2, 3)
    found = tap(model)
    found(batch)
    expected = found.take(batch)
    found.close()
    named = tap(
        model,
        image_features=("vision_encoder", lambda output: output.last_hidden_state),
        mask_tokens=("mask_decoder.transformer", lambda output: output[0][:, :, 1:5]),
    )
    named(batch)
    features = named.take(batch)
    assert torch.equal(features.image_features, expected.image_features)
    assert torch.equal(features.mask_tokens, expected.mask_tokens)
    assert torch.equal(features.image_index, expected.image_index)


class TwoTowers(nn.Module):
    """A model that is no SAM: an image tower with tokens, a text tower with one vector."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Conv2d(3, DIM, 8, 8)
        self.text = nn.Linear(5, DIM)

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return self.image(image).mean((2, 3)) * self.text(text)


def test_explicit_places_on_a_model_that_is_no_sam():
    teacher, student = (tap(TwoTowers(), image_features="image", mask_tokens="text") for _ in range(2))
    batch = (torch.randn(4, 3, 32, 32), torch.randn(4, 5))
    student(batch)
    loss = InfoSAMLoss(DIM)(teacher, student, batch)
    assert module_gradients(loss, student.model).keys() == {"image.weight", "image.bias", "text.weight", "text.bias"}


# wrappers


def test_peft_lora_with_a_saved_copy_of_the_decoder():
    model, batch = with_lora(hf_sam()), hf_batch()
    student, teacher = tap(model), tap(hf_sam())
    student(batch)
    loss = InfoSAMLoss(DIM)(teacher, student, batch)
    reached = module_gradients(loss, model)
    assert any("lora_B" in name and value.abs().max() > 0 for name, value in reached.items())
    assert any("modules_to_save" in name and value.abs().max() > 0 for name, value in reached.items())
    assert not any("original_module" in name for name in reached)


def test_explicit_paths_are_found_behind_wrappers():
    model = with_lora(hf_sam())
    student = tap(
        model,
        image_features=("vision_encoder", lambda output: output.last_hidden_state),
        mask_tokens=("mask_decoder.transformer", lambda output: output[0][:, :, 1:2]),
    )
    student(hf_batch())
    assert student.take().mask_tokens.shape == (2, 1, DIM)


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_ddp():
    model = nn.parallel.DistributedDataParallel(hf_sam(), find_unused_parameters=True)
    plain, batch, loss = hf_sam(), hf_batch(), InfoSAMLoss(DIM)
    values = []
    for module in (model, plain):
        student, teacher = tap(module), tap(hf_sam(1))
        output = student(batch)
        value = loss(teacher, student, batch)
        (value + output.pred_masks.square().mean()).backward()
        values.append((value.item(), module.get_parameter("module.vision_encoder.layers.0.attn.qkv.weight").grad
                       if module is model else module.vision_encoder.layers[0].attn.qkv.weight.grad))  # fmt: skip
    assert values[0][0] == values[1][0]
    torch.testing.assert_close(values[0][1], values[1][1])


@pytest.mark.usefixtures("process_group")
def test_processes_of_ddp_exchange_nothing_in_a_rehearsal():
    model = nn.parallel.DistributedDataParallel(hf_sam(), find_unused_parameters=True)
    settings = ("require_forward_param_sync", "require_backward_grad_sync")
    for exchanges in (True, False):
        model.require_forward_param_sync = exchanges
        with rehearsing(nn.ModuleList([model])):
            assert [getattr(model, name) for name in settings] == [False, False]
        assert [getattr(model, name) for name in settings] == [exchanges, True]


# torch.compile looks at .grad of every tensor it meets.
compiles = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@compiles
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_after_tapping():
    model, batch, loss = hf_sam(), hf_batch(), InfoSAMLoss(DIM)
    teacher = tap(hf_sam(1))
    student = tap(model)
    student(batch)
    expected = loss(teacher, student, batch)
    student.close()
    compiled = torch.compile(model, backend="eager")
    student = tap(compiled)
    for _ in range(2):
        student(batch)
        torch.testing.assert_close(loss(teacher, student, batch), expected)


@compiles
@pytest.mark.usefixtures("fresh_compiler")
def test_a_tap_after_the_first_compiled_call_says_why_it_finds_nothing():
    compiled, batch = torch.compile(hf_sam(), backend="eager"), hf_batch()
    compiled(pixel_values=batch["pixel_values"], input_boxes=batch["input_boxes"])
    student = tap(compiled)
    student(batch)
    with pytest.raises(RuntimeError, match="tap a compiled model before its first call"):
        student.take()


def test_non_reentrant_checkpointing_gives_the_same_gradients_and_counts_no_call_twice():
    model, batch, loss = meta_sam(), meta_batch(2, 2), InfoSAMLoss(DIM)
    teacher = tap(meta_sam(1), call=meta_forward)

    def checkpointed(model: nn.Module, batch: list) -> list[torch.Tensor]:
        return torch.utils.checkpoint.checkpoint(meta_forward, model, batch, use_reentrant=False)

    values = []
    for call in (meta_forward, checkpointed):
        with tap(model, call=call) as student:
            masks = student(batch)
            value = loss(teacher, student, batch)
            (value + sum(mask.square().mean() for mask in masks)).backward()
            assert not student.pending
            with pytest.raises(RuntimeError, match="got no batch and nothing collected"):
                student.take()
        values.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    for name, value in values[0].items():
        torch.testing.assert_close(values[1][name], value, msg=name)


def test_reentrant_checkpointing_is_refused():
    batch = meta_batch(2, 2)
    image = batch[0]["image"].requires_grad_()

    def checkpointed(model: nn.Module, batch: list) -> list[torch.Tensor]:
        return torch.utils.checkpoint.checkpoint(lambda _: meta_forward(model, batch), image, use_reentrant=True)

    student = tap(meta_sam(), call=checkpointed)
    student(batch)
    with pytest.raises(RuntimeError, match="reentrant checkpointing.*use_reentrant=False"):
        student.take()


# when it counts


def test_student_is_run_when_it_has_not_run():
    teacher, student, batch, loss = tap(hf_sam()), tap(hf_sam(1)), hf_batch(), InfoSAMLoss(DIM)
    run_here = loss(teacher, student, batch)
    student(batch)
    assert torch.equal(loss(teacher, student, batch), run_here)


def test_of_two_taps_on_a_model_the_one_that_observes_listens_alone():
    model = hf_sam()
    first, second = tap(model), tap(model)
    first.observe(hf_batch())
    with pytest.raises(RuntimeError, match="got no batch and nothing collected; pass a batch or run the model$"):
        second.take()


def test_users_own_call_of_the_model_is_seen():
    model, batch = hf_sam(1), hf_batch()
    teacher, student, loss = tap(hf_sam()), tap(model), InfoSAMLoss(DIM)
    expected = loss(teacher, student, batch)
    model(batch["pixel_values"], input_boxes=batch["input_boxes"])
    assert torch.equal(loss(teacher, student, batch), expected)


def test_several_batches_of_one_make_a_loss_without_naming_them():
    teacher, student, loss = tap(hf_sam()), tap(hf_sam(1)), InfoSAMLoss(DIM)
    whole = hf_batch(2)
    singles = [{name: value[i : i + 1] for name, value in whole.items()} for i in range(2)]
    with pytest.raises(ValueError, match="at least two samples"):
        loss(teacher, student, singles[0])
    for single in singles:
        student(single)
    torch.testing.assert_close(loss(teacher, student), loss(teacher, student, whole), rtol=1e-4, atol=1e-5)


def test_a_capture_is_taken_once():
    student, batch = tap(hf_sam()), hf_batch()
    student(batch)
    student.take(batch)
    with pytest.raises(RuntimeError, match="must call its mask decoder before the loss"):
        student.take()


def test_the_batch_must_be_the_one_that_the_model_ran_on():
    teacher, student, loss = tap(hf_sam()), tap(hf_sam(1)), InfoSAMLoss(DIM)
    student(hf_batch(seed=1))
    with pytest.raises(RuntimeError, match="batch must be all that the model ran on.*stale"):
        loss(teacher, student, hf_batch(seed=2))
    batch = hf_batch()
    student(batch)
    assert loss(teacher, student, dict(batch)).isfinite()


@pytest.mark.parametrize("output", ["pred_masks", "iou_scores"])
def test_a_capture_after_backward_is_stale(output):
    student, batch = tap(hf_sam()), hf_batch()
    getattr(student(batch), output).sum().backward()
    with pytest.raises(RuntimeError, match="must be computed before backward"):
        student.take(batch)
    assert student.take(batch).mask_tokens.shape == (2, 4, DIM)


def test_own_calls_are_held_against_the_batch_of_the_loss():
    model, batch, other = hf_sam(1), hf_batch(seed=1), hf_batch(seed=2)
    teacher, student, loss = tap(hf_sam()), tap(model), InfoSAMLoss(DIM)
    for run in (
        lambda: model(batch["pixel_values"], input_boxes=batch["input_boxes"]),
        lambda: student(pixel_values=batch["pixel_values"], input_boxes=batch["input_boxes"]),
    ):
        run()
        with pytest.raises(RuntimeError, match="batch must be all that the model ran on"):
            loss(teacher, student, other)
        run()
        with torch.no_grad():
            torch.testing.assert_close(loss(teacher, student, other), loss(teacher, tap(model), other))


def test_the_teacher_gets_the_prompts_that_were_made_in_the_loop():
    model, batch = hf_sam(1), hf_batch(2, 1)
    teacher, student, loss = tap(hf_sam()), tap(model), InfoSAMLoss(DIM)
    expected = loss(teacher, student, batch)
    model(pixel_values=batch["pixel_values"], input_boxes=batch["input_boxes"])
    without_prompts = {"pixel_values": batch["pixel_values"], "boxes": batch["input_boxes"]}
    assert torch.equal(loss(teacher, student, without_prompts), expected)
    model(pixel_values=batch["pixel_values"], input_boxes=batch["input_boxes"])
    assert torch.equal(loss(teacher, student), expected)


def test_models_that_share_modules_cannot_teach_each_other():
    model, batch, loss = hf_sam(), hf_batch(), InfoSAMLoss(DIM)
    teacher = tap(model)
    student = tap(with_lora(model))
    with pytest.raises(ValueError, match=r"models of their own, got models that share.*copy\.deepcopy"):
        loss(teacher, student, batch)
    with pytest.raises(ValueError, match="models of their own"):
        loss(teacher, teacher, batch)


def test_features_that_are_overwritten_in_place_are_never_used():
    model = meta_sam()
    student = tap(model)
    buffer = torch.randn(1, DIM, GRID, GRID)
    sparse, dense = model.prompt_encoder(points=None, boxes=torch.tensor([[4.0, 4, 20, 20]]), masks=None)
    for _ in range(2):
        model.mask_decoder(buffer, model.prompt_encoder.get_dense_pe(), sparse, dense, multimask_output=False)
        buffer.copy_(torch.randn_like(buffer))
    with pytest.raises(RuntimeError, match="must stay as they are until the loss.*overwritten in place"):
        student.take()


@pytest.mark.parametrize("inference", [False, True])
def test_a_loop_over_images_and_prompts_keeps_each_map_once_for_teacher_and_student(inference):
    def one_by_one(model: nn.Module, batch: list) -> None:
        features = model.image_encoder(torch.stack([item["image"] for item in batch]))
        for index, item in enumerate(batch):
            for box in item["boxes"]:
                sparse, dense = model.prompt_encoder(points=None, boxes=box[None], masks=None)
                pe = model.prompt_encoder.get_dense_pe()
                model.mask_decoder(features[index][None], pe, sparse, dense, multimask_output=False)

    def inferring(model: nn.Module, batch: list) -> None:
        with torch.inference_mode():
            one_by_one(model, batch)

    batch = meta_batch(2, 3)
    teacher, student = tap(meta_sam(), call=inferring if inference else one_by_one), tap(meta_sam(1), call=one_by_one)
    student(batch)
    features = student.take(batch)
    assert features.image_features.shape == (2, DIM, GRID, GRID)
    assert features.image_index.tolist() == [0, 0, 0, 1, 1, 1]
    loss = InfoSAMLoss(DIM)
    value = loss(teacher, student, batch)
    expected = loss(tap(teacher.model, call=meta_forward), tap(student.model, call=meta_forward), batch)
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)


def test_maps_that_are_parts_of_one_are_not_copied():
    model, seen = meta_sam(), []
    model.image_encoder.register_forward_hook(lambda _module, _args, output: seen.append(output))
    student = tap(model, call=meta_forward)
    student(meta_batch(3, 1))
    taken = student.take().image_features
    assert taken.data_ptr() == seen[0].data_ptr()
    assert taken.shape == seen[0].shape


def test_a_frozen_encoder_without_gradient_in_the_explicit_form():
    class Frozen(TwoTowers):
        def forward(self, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                features = self.image(image)
            return features.mean((2, 3)) * self.text(text)

    teacher, student = (tap(Frozen(), image_features="image", mask_tokens="text") for _ in range(2))
    batch = (torch.randn(4, 3, 32, 32), torch.randn(4, 5))
    for _ in range(2):
        student(batch)
        loss = InfoSAMLoss(DIM)(teacher, student, batch)
        assert module_gradients(loss, student.model).keys() == {"text.weight", "text.bias"}
    with torch.no_grad():
        student(batch)
    student.model.text(batch[1])
    with pytest.raises(RuntimeError, match="image_features must be seen before mask_tokens in every forward"):
        student.take()


def test_a_model_that_returns_nothing_while_an_error_is_handled_keeps_its_capture():
    class Silent(TwoTowers):
        def forward(self, image: torch.Tensor, text: torch.Tensor) -> None:
            super().forward(image, text)

    student = tap(Silent(), image_features="image", mask_tokens="text")
    batch = (torch.randn(4, 3, 32, 32), torch.randn(4, 5))
    try:
        raise MemoryError
    except MemoryError:
        student.model(*batch)
    assert student.take().mask_tokens.shape == (4, 1, DIM)


def test_an_exception_in_whose_handler_the_model_ran_is_not_kept():
    class FailedError(Exception):
        pass

    student, batch = tap(hf_sam()), hf_batch()
    try:
        raise FailedError
    except FailedError as error:
        kept = weakref.ref(error)
        student(batch)
    gc.collect()
    assert kept() is None
    assert student.pending


def test_batches_are_compared_by_memory_and_plain_values():
    batch = meta_batch(2, 1)
    for item in batch:
        item["original_size"] = (1000, 1000)
    student = tap(meta_sam(), call=meta_forward)
    student(batch)
    rebuilt = [{**item, "original_size": tuple([1000, 1000])} for item in batch]  # noqa: C409
    assert student.take(rebuilt).mask_tokens.shape == (2, 4, DIM)


def test_point_prompts_and_hf_batch_features():
    from transformers import BatchFeature

    plain = hf_batch(2)
    points = torch.rand(2, 3, 1, 2) * IMAGE_SIZE
    batch = BatchFeature({"pixel_values": plain["pixel_values"], "input_points": points})
    teacher, student = tap(hf_sam()), tap(hf_sam(1))
    assert student(batch).pred_masks.shape[:2] == (2, 3)
    assert InfoSAMLoss(DIM)(teacher, student, batch).isfinite()


def test_steps_without_the_loss_leave_nothing_behind():
    teacher, student, batch, loss = tap(hf_sam()), tap(hf_sam(1)), hf_batch(), InfoSAMLoss(DIM)
    for _ in range(3):
        student(batch).pred_masks.sum().backward()
    student(batch)
    assert loss(teacher, student, batch).isfinite()


def test_a_skipped_step_is_named():
    teacher, student, loss = tap(hf_sam()), tap(hf_sam(1)), InfoSAMLoss(DIM)
    for seed in (1, 2):
        batch = hf_batch(seed=seed)
        student(batch)
    with pytest.raises(RuntimeError, match=r"got another or one of 2 .*clear\(\)"):
        loss(teacher, student, batch)
    student(hf_batch())
    student.clear()
    assert loss(teacher, student, batch).isfinite()


def test_validation_without_gradient_is_not_collected():
    student, batch = tap(hf_sam()), hf_batch()
    with torch.no_grad():
        for seed in range(3):
            student(hf_batch(seed=seed))
    student(batch)
    assert student.take(batch).mask_tokens.shape == (2, 4, DIM)


def test_the_loss_can_be_computed_in_a_validation():
    teacher, student, batch, loss = tap(hf_sam()), tap(hf_sam(1).eval()), hf_batch(), InfoSAMLoss(DIM)
    expected = loss(teacher, student, batch)
    with torch.no_grad():
        torch.testing.assert_close(loss(teacher, student, batch), expected)


def test_many_forgotten_calls_are_warned_of_once():
    model = meta_sam()
    student = tap(model)
    features, positions = torch.randn(1, DIM, GRID, GRID), model.prompt_encoder.get_dense_pe()
    prompts = model.prompt_encoder(points=None, boxes=torch.rand(1, 4), masks=None)

    def decode() -> None:
        model.mask_decoder(features, positions, *prompts, multimask_output=False)

    for _ in range(255):
        decode()
    with pytest.warns(UserWarning, match="256 decoder calls are waiting for a loss"):
        decode()
    decode()
    assert len(student.take().mask_tokens) == 257


def test_metas_own_forward_is_refused_as_student_and_fine_as_teacher():
    batch = meta_batch()
    student = tap(meta_sam())
    student(batch)
    with pytest.raises(RuntimeError, match=r"ran without gradient.*Meta's Sam\.forward"):
        student.take(batch)
    assert tap(meta_sam()).observe(batch).mask_tokens.shape == (2, 4, DIM)


def test_features_of_a_teacher_under_inference_mode_can_be_trained_against():
    def inferring(model: nn.Module, batch: dict) -> object:
        with torch.inference_mode():
            return model(batch["pixel_values"], input_boxes=batch["input_boxes"])

    teacher, student, batch = tap(hf_sam(), call=inferring), tap(hf_sam(1)), hf_batch()
    InfoSAMLoss(DIM)(teacher, student, batch).backward()


def test_the_teacher_runs_in_eval_mode_without_gradient_and_gets_its_modes_back():
    model = hf_sam()
    model.vision_encoder.eval()
    model.vision_encoder.layers[0].train()
    before = {name: module.training for name, module in model.named_modules()}
    seen = []
    model.mask_decoder.register_forward_hook(
        lambda module, *_: seen.append((torch.is_grad_enabled(), any(m.training for m in model.modules())))
    )
    features = tap(model).observe(hf_batch())
    assert seen == [(False, False)]
    assert not features.mask_tokens.requires_grad
    assert {name: module.training for name, module in model.named_modules()} == before


@pytest.mark.parametrize("own_loop", [False, True])
def test_an_exception_leaves_no_half_capture(own_loop):
    model, batch = meta_sam(), meta_batch(3, 1)

    class Sam(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sam = model

        def forward(self, batch: list) -> list[torch.Tensor]:
            return meta_forward(self.sam, batch)

    wrapped = Sam()
    student = tap(wrapped)
    failing = [*batch[:2], {**batch[2], "boxes": torch.full((1, 4), float("nan")).reshape(2, 2)}]
    with pytest.raises(RuntimeError, match="shape|size"):
        (wrapped if own_loop else student)(failing)
    (wrapped if own_loop else student)(batch)
    assert student.take().mask_tokens.shape == (3, 4, DIM)


def test_gradient_accumulation_takes_each_micro_batch_apart():
    model, loss = hf_sam(1), InfoSAMLoss(DIM)
    teacher, student = tap(hf_sam()), tap(model)
    batches = [hf_batch(seed=seed) for seed in range(2)]
    for batch in batches:
        (student(batch).pred_masks.mean() + loss(teacher, student, batch)).backward()
    accumulated = model.mask_decoder.iou_token.weight.grad.clone()
    model.zero_grad(), loss.zero_grad()
    sum(student(batch).pred_masks.mean() + loss(teacher, student, batch) for batch in batches).backward()
    torch.testing.assert_close(model.mask_decoder.iou_token.weight.grad, accumulated, rtol=1e-4, atol=1e-6)


# the model is left alone


def test_state_dict_and_outputs_are_as_before():
    model, batch = hf_sam().eval(), hf_batch()
    keys, output = list(model.state_dict()), model(batch["pixel_values"], input_boxes=batch["input_boxes"])
    student = tap(model)
    assert list(model.state_dict()) == keys
    assert torch.equal(student(batch).pred_masks, output.pred_masks)


def test_close_with_and_collection_remove_every_hook():
    model = hf_sam()
    student = tap(model)
    assert hooks_of(model) > 0
    student.close()
    assert hooks_of(model) == 0
    with pytest.raises(RuntimeError, match="must be open, got one that was closed"):
        student.take(hf_batch())
    with pytest.raises(ZeroDivisionError), tap(model):
        raise ZeroDivisionError
    assert hooks_of(model) == 0
    tap(model)
    gc.collect()
    assert hooks_of(model) == 0


def test_a_deep_copy_of_a_tapped_model_is_a_model_of_its_own():
    model, batch = hf_sam(), hf_batch()
    student = tap(model)
    twin = copy.deepcopy(model)
    twin(batch["pixel_values"], input_boxes=batch["input_boxes"])
    with pytest.raises(RuntimeError, match="nothing collected"):
        student.take()
    tapped_twin = tap(twin)
    tapped_twin(batch)
    assert tapped_twin.take(batch).mask_tokens.shape == (2, 4, DIM)
    again = copy.deepcopy(copy.deepcopy(twin))
    with tap(again):
        assert hooks_of(again) == hooks_of(model)
    assert hooks_of(again) == 0


def test_a_tapped_model_pickles_and_loads_where_the_package_is_not(tmp_path):
    model, batch = TwoTowers(), (torch.randn(2, 3, 32, 32), torch.randn(2, 5))
    student = tap(model, image_features="image", mask_tokens="text")
    layer = model.text
    assert len(layer._forward_hooks) == 1
    path = tmp_path / "layer.pt"
    torch.save(layer, path)
    script = (
        "import sys, torch; sys.modules['renyi_kd'] = None\n"
        f"layer = torch.load({str(path)!r}, weights_only=False); print(layer(torch.zeros(2, 5)).shape)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "torch.Size([2, 16])", result.stderr
    assert pickle.loads(pickle.dumps(model))(*batch).shape == (2, DIM)
    assert student(batch).shape == (2, DIM)


def test_nothing_stays_of_the_hooks_in_a_pickle_once_it_was_tapped():
    """In another process a hook may get the number of an old one, and would be called as that was."""
    model = TwoTowers()
    student = tap(model, image_features="image", mask_tokens="text")
    loaded = pickle.loads(pickle.dumps(model))
    student.close()
    tap(loaded, image_features="image", mask_tokens="text").close()
    for module in loaded.modules():
        for name, held in vars(module).items():
            if name.startswith(("_forward_hooks", "_forward_pre_hooks")):
                assert not held, (type(module), name)


@pytest.mark.parametrize(
    ("places", "error"),
    [
        ({}, "mask decoder"),
        ({"image_features": "image"}, "given together"),
        ({"image_features": "image", "mask_tokens": "txet"}, "txet"),
        ({"image_features": "nowhere", "mask_tokens": "text"}, "nowhere"),
    ],
)
def test_a_tap_that_fails_leaves_the_model_as_it_was_also_where_the_error_is_kept(places, error):
    model = TwoTowers()
    with pytest.raises(ValueError, match=error) as kept:
        tap(model, **places)
    # As in a shell: the error holds the frames, and these the tap.
    assert kept.value.__traceback__ is not None
    assert hooks_of(model) == 0


def test_a_copy_of_a_tap_taps_the_copy_of_its_model():
    student, batch = tap(hf_sam()), hf_batch()
    for twin in (copy.deepcopy(student), pickle.loads(pickle.dumps(student))):
        assert twin.model is not student.model
        twin(batch)
        assert twin.take(batch).mask_tokens.shape == (2, 4, DIM)
        with pytest.raises(RuntimeError, match="nothing collected"):
            student.take()


def test_a_tap_adds_nothing_to_the_module_that_holds_it():
    holder = nn.Module()
    holder.teacher = tap(hf_sam())
    assert list(holder.parameters()) == []
    assert holder.state_dict() == {}


def test_a_taken_capture_is_freed_with_the_loss():
    teacher, student, batch, loss = tap(hf_sam()), tap(hf_sam(1)), hf_batch(), InfoSAMLoss(DIM)
    kept = []
    student.model.mask_decoder.register_forward_hook(lambda _module, _args, output: kept.append(weakref.ref(output[0])))
    student.model.vision_encoder.register_forward_hook(
        lambda _module, _args, output: kept.append(weakref.ref(output.last_hidden_state))
    )
    gc.disable()
    try:
        student(batch)
        loss(teacher, student, batch).backward()
        assert len(kept) == 2
        assert [reference() for reference in kept] == [None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize("make", [hf_sam, pytest.param(meta_sam, marks=pytest.mark.long)], ids=["hf", "meta"])
def test_memory_does_not_grow_over_many_steps(make):
    call, batch = (meta_forward, meta_batch()) if make is meta_sam else (None, hf_batch())
    # The encoder runs but is frozen: what could pile up are captures, the decoder's graph and the loss.
    models = [make(seed).requires_grad_(False) for seed in range(2)]
    models[1].mask_decoder.requires_grad_(True)
    (teacher, student), loss = (tap(model, call=call) for model in models), InfoSAMLoss(DIM)

    for step in range(70):
        output = student(batch)
        task = output.pred_masks.mean() if call is None else sum(mask.mean() for mask in output)
        # Every seventh step goes without the loss, every fifth of those without backward.
        if step % 7:
            (task + loss(teacher, student, batch)).backward()
        elif step % 5:
            task.backward()
        else:
            student.clear()
        student.model.zero_grad(), loss.zero_grad()
        del output, task
        if step == 20:
            before = living()[1]
    assert living()[1] <= before


# refusals


def test_an_unknown_model_lists_what_was_sought_and_the_way_out():
    with pytest.raises(
        ValueError,
        match=r"TwoTowers with the parts image \(Conv2d\), text \(Linear\).*output_hypernetworks_mlps.*tap\(",
    ):
        tap(TwoTowers())


@pytest.mark.parametrize(
    ("error", "pattern", "arguments"),
    [
        (TypeError, "model must be a torch.nn.Module, got str", {"model": "facebook/sam-vit-base"}),
        (ValueError, "must be given together", {"image_features": "image"}),
        (ValueError, "must name a module of the model, got 'images'.*named_modules",
         {"image_features": "images", "mask_tokens": "text"}),
        (ValueError, "must name a module of the model, got 'tower.text'; near it are text",
         {"image_features": "image", "mask_tokens": "tower.text"}),
        (TypeError, "image_features must be a path", {"image_features": (1, 2), "mask_tokens": "text"}),
        (TypeError, "call must be a function of model and batch, got 3", {"call": 3}),
    ],
)  # fmt: skip
def test_bad_arguments_of_tap(error, pattern, arguments):
    with pytest.raises(error, match=pattern):
        tap(arguments.pop("model", None) or TwoTowers(), **arguments)


def test_an_output_that_is_no_tensor_asks_for_a_function():
    student = tap(hf_sam(), image_features="vision_encoder", mask_tokens="mask_decoder.transformer")
    with pytest.raises(TypeError, match="image_features must be a tensor, got SamVisionEncoderOutput.*lambda output"):
        student(hf_batch())


def test_tokens_before_image_features_are_refused():
    student = tap(TwoTowers(), image_features="text", mask_tokens="image")
    student((torch.randn(4, 3, 32, 32), torch.randn(4, 5)))
    with pytest.raises(RuntimeError, match="image_features must be seen before mask_tokens"):
        student.take()


def test_tokens_that_are_a_vector_are_refused():
    student = tap(TwoTowers(), image_features="image", mask_tokens=("text", lambda output: output.flatten()))
    with pytest.raises(ValueError, match=r"mask_tokens must have shape \[s, n, d\].*got \(64,\)"):
        student((torch.randn(4, 3, 32, 32), torch.randn(4, 5)))


def test_samples_that_do_not_divide_among_images_are_refused():
    student = tap(TwoTowers(), image_features="image", mask_tokens=("text", lambda output: output[:3]))
    student.model.image(torch.randn(2, 3, 32, 32))
    student.model.text(torch.randn(5, 5))
    with pytest.raises(RuntimeError, match="which samples belong to which image, got 3 samples for 2 images"):
        student.take()


def test_image_sizes_that_differ_within_a_step_are_refused():
    student = tap(TwoTowers(), image_features="image", mask_tokens="text")
    student((torch.randn(2, 3, 32, 32), torch.randn(2, 5)))
    student((torch.randn(2, 3, 16, 16), torch.randn(2, 5)))
    with pytest.raises(RuntimeError, match=r"must have one size, got \[\(2, 16, 4, 4\), \(2, 16, 2, 2\)\]"):
        student.take()


@pytest.mark.parametrize(
    ("error", "pattern", "batch"),
    [
        (ValueError, r"batch must hold arguments of the model's forward, got the names \['images'\]", {"images": 1}),
        (TypeError, "batch must be a mapping, a tensor, a tuple, or a list of dicts, got int", 7),
    ],
)
def test_batches_that_no_model_takes(error, pattern, batch):
    with pytest.raises(error, match=pattern):
        tap(hf_sam())(batch)


def test_other_batches_and_plain_calls():
    student = tap(TwoTowers(), image_features="image", mask_tokens="text")
    image, text = torch.randn(2, 3, 32, 32), torch.randn(2, 5)
    for run in (
        lambda: student((image, text)),
        lambda: student([image, text]),
        lambda: student(image, text),
        lambda: student(image=image, text=text),
        lambda: student({"image": image, "text": text, "label": 1}),
    ):
        run()
        assert student.take().mask_tokens.shape == (2, 1, DIM)


def test_the_loss_without_a_batch_says_that_the_teacher_needs_one():
    model = meta_sam(1)
    teacher, student = tap(meta_sam()), tap(model)
    meta_forward(model, meta_batch())
    with pytest.raises(ValueError, match="batch must be given for the teacher to run on"):
        InfoSAMLoss(DIM)(teacher, student)
