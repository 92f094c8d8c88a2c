"""Which calls and samples count, and which image each sample belongs to: right, or refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from renyi_kd import InfoSAMLoss, SAMFeatures, tap
from tests.support.models import DIM, IMAGE_SIZE, hf_batch, hf_sam, meta_batch, meta_forward, meta_sam


def token_outputs(model: nn.Module) -> list[Tensor]:
    seen: list[Tensor] = []
    model.mask_decoder.transformer.register_forward_hook(lambda _module, _args, output: seen.append(output[0]))
    return seen


# several groups of tokens in one decoder call


def looping(seed: int = 0) -> nn.Module:
    """Return a Sam whose decoder takes all images and loops over them, as SAM-HQ's training does."""
    from segment_anything.modeling import MaskDecoder

    class Looping(MaskDecoder):
        def forward(self, image_embeddings: Tensor, image_pe: Tensor, sparse: list[Tensor], dense: list[Tensor]) -> Any:
            return [
                self.predict_masks(image_embeddings[i : i + 1], image_pe, sparse[i], dense[i])[0]
                for i in range(len(image_embeddings))
            ]

    model = meta_sam(seed)
    model.mask_decoder.__class__ = Looping
    return model


def run_looping(sam: nn.Module, batch: dict[str, Any]) -> Any:
    sparse, dense = zip(
        *(sam.prompt_encoder(points=None, boxes=boxes, masks=None) for boxes in batch["input_boxes"]), strict=True
    )
    return sam.mask_decoder(sam.image_encoder(batch["pixel_values"]), sam.prompt_encoder.get_dense_pe(), sparse, dense)


def test_a_decoder_that_loops_over_its_images_is_refused_or_taken_at_its_word():
    model, batch = looping(), hf_batch(2, 2)
    student = tap(model, call=run_looping)
    student(batch)
    with pytest.raises(RuntimeError, match=r"2 groups of mask tokens for 2 images.*decoder_loops_over_images=True"):
        student.take()
    student.close()
    tokens, student = token_outputs(model), tap(model, call=run_looping, decoder_loops_over_images=True)
    student(batch)
    features = student.take(batch)
    assert features.image_index.tolist() == [0, 0, 1, 1]
    assert torch.equal(features.mask_tokens, torch.cat(tokens)[:, 1:5])


def test_ragged_prompts_of_a_looping_decoder():
    model, batch = looping(), hf_batch(3, 1)
    batch["input_boxes"] = [batch["input_boxes"][0], torch.cat([batch["input_boxes"][1]] * 3), batch["input_boxes"][2]]
    student = tap(model, call=run_looping, decoder_loops_over_images=True)
    student(batch)
    assert student.take(batch).image_index.tolist() == [0, 1, 1, 1, 2]


def test_a_decoder_that_loops_over_one_images_prompts_needs_no_word():
    model, batch = meta_sam(), hf_batch(1, 3)
    decode = type(model.mask_decoder).predict_masks

    class OneByOne(type(model.mask_decoder)):
        def forward(self, image_embeddings: Tensor, image_pe: Tensor, sparse: Tensor, dense: Tensor) -> Any:
            return [
                decode(self, image_embeddings, image_pe, s[None], d[None]) for s, d in zip(sparse, dense, strict=True)
            ]

    model.mask_decoder.__class__ = OneByOne
    tokens, student = token_outputs(model), tap(model)
    sparse, dense = model.prompt_encoder(points=None, boxes=batch["input_boxes"][0], masks=None)
    image = model.image_encoder(batch["pixel_values"])
    model.mask_decoder(image, model.prompt_encoder.get_dense_pe(), sparse, dense)
    features = student.take()
    assert features.image_index.tolist() == [0, 0, 0]
    assert torch.equal(features.mask_tokens, torch.cat(tokens)[:, 1:5])


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Conv2d(3, DIM, 8, 8), nn.Linear(5, DIM)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        return self.image(image).mean() * self.text(text)


def test_as_many_samples_as_a_multiple_of_the_images_say_nothing_of_whose_they_are():
    student = tap(Towers(), image_features="image", mask_tokens="text")
    student((torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE), torch.randn(4, 5)))
    with pytest.raises(RuntimeError, match="which samples belong to which image, got 4 samples for 2 images"):
        student.take()
    placed = tap(Towers(), image_features="image", mask_tokens=("text", lambda output: output.view(2, 2, 1, DIM)))
    placed((torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE), torch.randn(4, 5)))
    assert placed.take().image_index.tolist() == [0, 0, 1, 1]


def test_fewer_samples_than_images_are_refused():
    student = tap(Towers(), image_features="image", mask_tokens="text")
    student((torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE), torch.randn(1, 5)))
    with pytest.raises(RuntimeError, match="which samples belong to which image, got 1 samples for 2 images"):
        student.take()


@pytest.mark.parametrize("n_told", [2, 3])
def test_flat_tokens_are_of_the_images_that_the_prompts_are_of(n_told):
    from segment_anything.modeling import MaskDecoder

    class Flat(MaskDecoder):
        def forward(self, image_embeddings: Tensor, sparse_prompt_embeddings: Tensor) -> Tensor:
            tokens = sparse_prompt_embeddings.flatten(0, 1).mean(1)
            return sum(module(tokens).mean() for module in self.output_hypernetworks_mlps) * image_embeddings.mean()

    model = meta_sam()
    model.mask_decoder.__class__ = Flat
    student = tap(model)
    images = model.image_encoder(torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE))
    model.mask_decoder(images, sparse_prompt_embeddings=torch.randn(n_told, 6 // n_told, 4, DIM))
    if n_told == 2:
        assert student.take().image_index.tolist() == [0, 0, 0, 1, 1, 1]
        return
    with pytest.raises(RuntimeError, match="which samples belong to which image, got 6 samples for 2 images"):
        student.take()


def test_prompt_sets_of_unequal_number_over_several_calls():
    model, batch = hf_sam(), hf_batch(2, 3)
    student = tap(model)
    embeddings = model.vision_encoder(batch["pixel_values"]).last_hidden_state
    model(image_embeddings=embeddings, input_boxes=batch["input_boxes"][:, :1])
    model(image_embeddings=embeddings, input_boxes=batch["input_boxes"][:, 1:])
    assert student.take().image_index.tolist() == [0, 1, 0, 0, 1, 1]


# padding


def points_with_padding() -> tuple[dict[str, Tensor], Tensor]:
    points, labels = torch.rand(3, 2, 1, 2) * IMAGE_SIZE, torch.ones(3, 2, 1, dtype=torch.long)
    points[2, 1], labels[2, 1] = -10, -10
    batch = {"pixel_values": hf_batch(3)["pixel_values"], "input_points": points, "input_labels": labels}
    return batch, torch.tensor([0, 1, 2, 3, 4])


def boxes_with_padding() -> tuple[dict[str, Tensor], Tensor]:
    batch = hf_batch(3, 2)
    batch["input_boxes"][0, 1] = -10
    return batch, torch.tensor([0, 2, 3, 4, 5])


@pytest.mark.parametrize("make", [points_with_padding, boxes_with_padding])
def test_the_padding_of_processors_is_no_sample(make):
    batch, keep = make()
    teacher, student, loss = tap(hf_sam(0)), tap(hf_sam(1)), InfoSAMLoss(DIM)
    seen = [token_outputs(each.model) for each in (teacher, student)]
    value = loss(teacher, student, batch)
    teacher_tokens, student_tokens = (tokens[0].flatten(0, 1)[keep, 1:5] for tokens in seen)
    index = torch.arange(3).repeat_interleave(2)[keep]
    maps = [tap(hf_sam(seed)).observe(batch).image_features for seed in range(2)]
    by_hand = loss(
        SAMFeatures(maps[0], teacher_tokens, index),
        SAMFeatures(maps[1].requires_grad_(), student_tokens, index),
    )
    torch.testing.assert_close(value, by_hand)


def test_the_padding_of_a_single_image_is_no_sample():
    batch = hf_batch(1, 3)
    batch["input_boxes"][0, 1] = -10
    student = tap(hf_sam())
    student(batch)
    assert student.take().mask_tokens.shape[0] == 2


def test_what_is_filled_in_one_kind_of_prompt_alone_is_a_sample():
    batch = hf_batch(2, 2)
    points, labels = torch.full((2, 2, 1, 2), -10.0), torch.full((2, 2, 1), -10)
    points[0], labels[0] = 5, 1
    batch["input_boxes"][0, 1] = -10
    batch["input_boxes"][1, 0] = -10
    student = tap(hf_sam())
    student({**batch, "input_points": points, "input_labels": labels})
    # The first box of the second image alone is filled, and so are its points.
    assert student.take().image_index.tolist() == [0, 0, 1]


def test_a_prompt_alone_is_a_sample_whatever_it_holds():
    batch = hf_batch(2, 1)
    batch["input_boxes"][1, 0] = -10
    student = tap(hf_sam())
    student(batch)
    assert student.take().mask_tokens.shape[0] == 2


def test_points_that_fill_up_a_prompt_leave_it_a_sample():
    points, labels = torch.rand(2, 2, 3, 2) * IMAGE_SIZE, torch.ones(2, 2, 3, dtype=torch.long)
    points[1, 1, 1:], labels[1, 1, 1:] = -10, -10
    student = tap(hf_sam())
    student({"pixel_values": hf_batch(2)["pixel_values"], "input_points": points, "input_labels": labels})
    assert student.take().image_index.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("n_images", [1, 2])
def test_images_without_any_prompt_are_named(n_images):
    student = tap(Towers(), image_features="image", mask_tokens="text")
    student((torch.randn(n_images, 3, IMAGE_SIZE, IMAGE_SIZE), torch.randn(0, 5)))
    with pytest.raises(RuntimeError, match=f"images of a step must have prompts, got {n_images} images without any"):
        student.take()


# calls without gradient inside a forward


class TwoPasses(nn.Module):
    """Makes masks without gradient first, and takes them as a prompt."""

    def __init__(self, sam: nn.Module) -> None:
        super().__init__()
        self.sam = sam

    def forward(self, pixel_values: Tensor, input_boxes: Tensor) -> object:
        inputs = {"pixel_values": pixel_values, "input_boxes": input_boxes, "multimask_output": False}
        with torch.no_grad():
            masks = self.sam(**inputs).pred_masks
        return self.sam(**inputs, input_masks=masks[:, 0])


def with_no_grad_pass(model: nn.Module, batch: dict[str, Tensor]) -> object:
    inputs = {name: batch[name] for name in ("pixel_values", "input_boxes")}
    with torch.no_grad():
        masks = model(**inputs, multimask_output=False).pred_masks
    return model(**inputs, input_masks=masks[:, 0], multimask_output=False)


@pytest.mark.parametrize("inside", [True, False])
def test_a_first_pass_without_gradient_counts_for_neither(inside):
    batch, models = hf_batch(3), [hf_sam(seed) for seed in range(2)]
    seen = [token_outputs(model) for model in models]
    if inside:
        teacher, student = (tap(TwoPasses(model)) for model in models)
    else:
        teacher, student = (tap(model, call=with_no_grad_pass) for model in models)
    student(batch)
    features, step = student.take_step(batch)
    observed = teacher.observe(step)
    assert len(features.mask_tokens) == len(observed.mask_tokens) == 3
    assert torch.equal(observed.mask_tokens, seen[0][1][:, 0, 1:5])
    assert torch.equal(features.mask_tokens, seen[1][1][:, 0, 1:5])


def test_two_passes_against_a_teacher_of_one_count_the_last():
    batch = hf_batch(3)
    teacher, student = tap(hf_sam(0)), tap(TwoPasses(hf_sam(1)))
    student(batch)
    assert InfoSAMLoss(DIM)(teacher, student, batch).isfinite()


def test_passes_that_are_unlike_in_number_are_refused():
    def three(model: nn.Module, batch: dict[str, Tensor]) -> None:
        for _ in range(3):
            model(pixel_values=batch["pixel_values"], input_boxes=batch["input_boxes"])

    student, batch = tap(TwoPasses(hf_sam(1))), hf_batch(3)
    student(batch)
    with pytest.raises(RuntimeError, match="got 3 calls where the student made 1 with gradient and 1 without"):
        InfoSAMLoss(DIM)(tap(hf_sam(0), call=three), student, batch)


def test_a_validation_by_parts_leaves_nothing_for_the_next_step():
    model, batch = meta_sam(1), torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    boxes = torch.tensor([[2.0, 2, 20, 20]])

    def run(model: nn.Module, images: Tensor) -> None:
        for image in model.image_encoder(images):
            sparse, dense = model.prompt_encoder(points=None, boxes=boxes, masks=None)
            model.mask_decoder(image[None], model.prompt_encoder.get_dense_pe(), sparse, dense, multimask_output=False)

    teacher, student = tap(meta_sam(0), call=run), tap(model)
    with torch.no_grad():
        run(model, torch.randn(5, 3, IMAGE_SIZE, IMAGE_SIZE))
    run(model, batch)
    assert InfoSAMLoss(DIM)(teacher, student, batch).isfinite()


# skipped steps


def listed(seed: int) -> list[dict[str, Tensor]]:
    batch = hf_batch(2, seed=seed)
    return [
        {"image": image, "boxes": boxes}
        for image, boxes in zip(batch["pixel_values"], batch["input_boxes"], strict=True)
    ]


class Forms(nn.Module):
    """Takes a batch in one of several forms."""

    def __init__(self, read: Callable[[Any], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.sam, self.read = hf_sam(), read

    def forward(self, batch: Any) -> object:
        pixel_values, input_boxes = self.read(batch)
        return self.sam(pixel_values=pixel_values, input_boxes=input_boxes)


def read_names(batch: Any) -> tuple[Tensor, Tensor]:
    return batch["pixel_values"], batch["input_boxes"]


def read_list(batch: Any) -> tuple[Tensor, Tensor]:
    return torch.stack([item["image"] for item in batch]), torch.stack([item["boxes"] for item in batch])


def read_arrays(batch: Any) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(batch["pixel_values"]), torch.from_numpy(batch["input_boxes"])


def arrays(seed: int) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in hf_batch(2, seed=seed).items()}


FORMS = {
    "one dict": (read_names, lambda seed: hf_batch(2, seed=seed)),
    "a list of dicts": (read_list, listed),
    "arrays": (read_arrays, arrays),
    "an object": (
        lambda batch: (batch.pixel_values, batch.input_boxes),
        lambda seed: SimpleNamespace(**hf_batch(2, seed=seed)),
    ),
    "a tensor in a list": (lambda batch: (batch[0], batch[1]), lambda seed: list(hf_batch(2, seed=seed).values())[:2]),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_skipped_step_is_noticed_in_every_form_of_a_batch(form):
    read, make = FORMS[form]
    model = Forms(read)
    teacher, student, loss = tap(copy.deepcopy(model)), tap(model), InfoSAMLoss(DIM)
    skipped, batch = make(0), make(1)
    model(skipped)
    model(batch)
    with pytest.raises(RuntimeError, match=r"batch must be all that the model ran on.*clear\(\)"):
        loss(teacher, student, batch)
    model(batch)
    assert loss(teacher, student, batch).isfinite()


def test_a_skipped_step_is_noticed_where_the_loop_calls_the_parts():
    model = meta_sam(1)
    teacher, student = tap(meta_sam(0), call=one_image_at_a_time), tap(model)
    skipped, batch = meta_batch(2), meta_batch(2)
    for item in batch:
        item["image"] = item["image"] + 1
    one_image_at_a_time(model, skipped)
    one_image_at_a_time(model, batch)
    with pytest.raises(RuntimeError, match="batch must be all that the model ran on"):
        InfoSAMLoss(DIM)(teacher, student, batch)


def one_image_at_a_time(model: nn.Module, batch: list[dict[str, Tensor]]) -> None:
    for item in batch:
        image = model.image_encoder(item["image"][None])
        sparse, dense = model.prompt_encoder(points=None, boxes=item["boxes"], masks=None)
        model.mask_decoder(image, model.prompt_encoder.get_dense_pe(), sparse, dense, multimask_output=False)


@pytest.mark.parametrize("through_the_tap", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_a_static_buffer_that_is_filled_anew_is_noticed(through_the_tap, given):
    model = hf_sam(1)
    teacher, student, loss = tap(hf_sam(0)), tap(model), InfoSAMLoss(DIM)
    static, new = hf_batch(3, seed=0), hf_batch(3, seed=7)

    def run() -> None:
        if through_the_tap:
            student(static)
        else:
            model(pixel_values=static["pixel_values"], input_boxes=static["input_boxes"])

    run()
    for name, value in static.items():
        value.copy_(new[name])
    run()
    with pytest.raises(RuntimeError, match="overwritten"):
        loss(teacher, student, static if given else None)
    student.clear()
    run()
    assert torch.equal(loss(teacher, student, static), loss(teacher, student, new))


def test_a_run_with_a_backward_pass_within_counts_from_there():
    def adapt_then_run(model: nn.Module, batch: list[dict[str, Any]]) -> None:
        if len(student._recording.calls):
            sum(mask.sum() for mask in meta_forward(model, batch)).backward()
        meta_forward(model, batch)

    student, batches = tap(meta_sam(1), call=adapt_then_run), [meta_batch(2), meta_batch(2)]
    for batch in batches:
        student(batch)
    features, step = student.take_step()
    assert len(features.mask_tokens) == 2
    assert [call.batch.value[0]["image"] is batches[1][0]["image"] for call in step.ran] == [True]


# a model that is its own decoder


def test_a_decoder_by_itself_is_collected_as_inside_another_module():
    sam, boxes = meta_sam(), torch.tensor([[2.0, 2, 20, 20], [4, 4, 30, 30]])
    sparse, dense = sam.prompt_encoder(points=None, boxes=boxes, masks=None)
    arguments = {
        "image_embeddings": torch.randn(1, DIM, 4, 4),
        "image_pe": sam.prompt_encoder.get_dense_pe(),
        "sparse_prompt_embeddings": sparse.detach(),
        "dense_prompt_embeddings": dense.detach(),
        "multimask_output": False,
    }
    teacher, student, loss = tap(copy.deepcopy(sam.mask_decoder)), tap(sam.mask_decoder), InfoSAMLoss(DIM)
    student.model(**arguments)
    features, step = student.take_step()
    assert features.mask_tokens.shape == (2, 4, DIM)
    assert torch.equal(teacher.observe(step).mask_tokens, features.mask_tokens)
    student(arguments)
    assert loss(teacher, student, arguments).isfinite()
    # Image features with a graph are the student's, and a decoder alone has no images to begin with.
    student.model(**{**arguments, "image_embeddings": arguments["image_embeddings"].requires_grad_()})
    with pytest.raises(ValueError, match="teacher must see the images"):
        loss(teacher, student)
