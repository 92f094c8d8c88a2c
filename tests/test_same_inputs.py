"""The teacher sees what the student saw, as it was then, and nothing that the student made; or the loss says so."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from torch import Tensor, nn

from renyi_kd import AdapterDisabled, InfoSAMLoss, Tap, tap
from renyi_kd.sam.inputs import Comparison, Inputs, Seen, _is_one, seen
from tests.support.models import (
    DIM,
    IMAGE_SIZE,
    hf_batch,
    hf_sam,
    meta_batch,
    meta_forward,
    meta_sam,
    needs_transformers_with,
)


def maps_of_decoder(model: nn.Module) -> list[Tensor]:
    """Return a list that fills with the image features that the decoder is given."""
    seen: list[Tensor] = []
    model.mask_decoder.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(kwargs["image_embeddings"]), with_kwargs=True
    )
    return seen


# image features that the student's encoder computed


def by_hand(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model.vision_encoder(batch["pixel_values"]).last_hidden_state


def by_its_method(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model.get_image_embeddings(batch["pixel_values"])


def without_gradient_and_copied(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model.vision_encoder(batch["pixel_values"]).last_hidden_state.clone()


ENCODERS = [by_hand, by_its_method, without_gradient_and_copied]


@pytest.mark.parametrize("encode", ENCODERS)
@pytest.mark.parametrize("positional", [False, True])
def test_the_teacher_runs_its_own_encoder_where_the_student_was_given_embeddings(encode, positional):
    batch, loss = hf_batch(3, 2), InfoSAMLoss(DIM)
    teacher, student = tap(hf_sam(0)), tap(hf_sam(1))
    expected = teacher.observe(batch)
    seen = maps_of_decoder(teacher.model)
    embeddings = encode(student.model, batch)
    if positional:
        student.model(None, None, None, batch["input_boxes"], None, embeddings)
    else:
        student.model(image_embeddings=embeddings, input_boxes=batch["input_boxes"])
    loss(teacher, student, batch)
    assert torch.equal(seen[-1], expected.image_features)


@pytest.mark.parametrize("encode", ENCODERS)
@pytest.mark.parametrize("given", [None, {"names": ["a", "b", "c"]}])
def test_without_the_images_the_loss_refuses_the_students_embeddings(encode, given):
    batch = hf_batch(3, 2)
    teacher, student = tap(hf_sam(0)), tap(hf_sam(1))
    student.model(image_embeddings=encode(student.model, batch), input_boxes=batch["input_boxes"])
    with pytest.raises(ValueError, match=r"teacher must see the images, got image features that the student's own"):
        InfoSAMLoss(DIM)(teacher, student, given)


def test_embeddings_of_sam_2_are_the_students_too():
    needs_transformers_with("Sam2Model")
    from tests.support.families import CASES

    family = next(case for case in CASES if case.name == "transformers Sam2Model")
    teacher, student, batch = tap(family.make(0)), tap(family.make(1)), family.batch(2, 1)
    expected = teacher.observe(batch)
    seen = maps_of_decoder(teacher.model)
    prompts = {name: value for name, value in batch.items() if name != "pixel_values"}
    student.model(image_embeddings=student.model.get_image_embeddings(batch["pixel_values"]), **prompts)
    InfoSAMLoss(expected.image_features.shape[1])(teacher, student, batch)
    assert torch.equal(seen[-1], expected.image_features)


def test_without_adapters_the_encoder_runs_on_the_images_again():
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["qkv"], modules_to_save=["mask_decoder"], init_lora_weights=False)
    pretrained, batch = hf_sam(0), hf_batch(3)
    frozen = tap(copy.deepcopy(pretrained)).observe(batch)
    model = get_peft_model(pretrained, config)
    student = tap(model)
    embeddings = model.base_model.model.vision_encoder(batch["pixel_values"]).last_hidden_state
    model(image_embeddings=embeddings, input_boxes=batch["input_boxes"])
    features, step = student.take_step(batch)
    observed = AdapterDisabled(student).observe(step)
    assert torch.equal(observed.image_features, frozen.image_features)
    assert not torch.equal(observed.image_features, features.image_features)


def test_a_teacher_that_is_handed_the_students_map_by_the_loop_is_refused():
    batch = meta_batch(2)
    student = tap(meta_sam(1))
    maps = student.model.image_encoder(torch.stack([item["image"] for item in batch]))

    def decode(model: nn.Module, batch: list) -> None:
        for feature, item in zip(maps, batch, strict=True):
            sparse, dense = model.prompt_encoder(points=None, boxes=item["boxes"], masks=None)
            model.mask_decoder(
                feature[None], model.prompt_encoder.get_dense_pe(), sparse, dense, multimask_output=False
            )

    decode(student.model, batch)
    with pytest.raises(ValueError, match="teacher must see images, got the student's image features"):
        InfoSAMLoss(DIM)(tap(meta_sam(0), call=decode), student, batch)


# preprocessing, order and prompts that differ


def test_a_teacher_that_normalises_what_the_student_was_given_raw_is_named():
    student, batch = tap(meta_sam(1)), meta_batch(2, 2)
    meta_forward(student.model, batch)
    with pytest.raises(ValueError, match=r"must see what the student saw, got other images.*tap\(model, call="):
        InfoSAMLoss(DIM)(tap(meta_sam(0)), student, batch)
    meta_forward(student.model, batch)
    assert InfoSAMLoss(DIM)(tap(meta_sam(0), call=meta_forward), student, batch).isfinite()


class Flipping(nn.Module):
    """Augments in its forward, at random or in train mode alone."""

    def __init__(self, sam: nn.Module, at_random: bool) -> None:
        super().__init__()
        self.sam, self.at_random = sam, at_random

    def forward(self, pixel_values: Tensor, input_boxes: Tensor) -> object:
        flips = torch.rand(()) < 2 / 3 if self.at_random else self.training
        return self.sam(pixel_values=pixel_values.flip(-1) if flips else pixel_values, input_boxes=input_boxes)


@pytest.mark.parametrize("at_random", [False, True])
def test_images_that_a_forward_augments_differ(at_random):
    torch.manual_seed(3)
    teacher, student = (tap(Flipping(hf_sam(seed), at_random)) for seed in range(2))
    loss = InfoSAMLoss(DIM)
    with pytest.raises(ValueError, match="got other images"):
        [loss(teacher, student, hf_batch(2, seed=seed)) for seed in range(3)]


class Clicking(nn.Module):
    """Draws its clicks, as transformers' example of interactive training does."""

    def __init__(self, sam: nn.Module) -> None:
        super().__init__()
        self.sam, self.points = sam, torch.empty(0)

    def forward(self, pixel_values: Tensor) -> object:
        self.points = torch.rand(len(pixel_values), 1, 1, 2) * IMAGE_SIZE
        return self.sam(pixel_values=pixel_values, input_points=self.points)


def test_a_forward_that_draws_its_prompts_is_noticed_and_its_prompts_can_be_replayed():
    batch, models = hf_batch(3), [Clicking(hf_sam(seed)) for seed in range(2)]
    student = tap(models[1])
    with pytest.raises(ValueError, match=r"got other points.*replay_prompts=True"):
        InfoSAMLoss(DIM)(tap(models[0]), student, batch)
    seen = []
    models[0].sam.prompt_encoder.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(kwargs["input_points"]), with_kwargs=True
    )
    teacher = tap(models[0], replay_prompts=True)
    for _ in range(2):
        assert InfoSAMLoss(DIM)(teacher, student, batch).isfinite()
        assert torch.equal(seen[-1], models[1].points)


class Video(nn.Module):
    """Takes its frames in another order in train mode, or clicks where it has boxes in eval mode, as SAM2Train does."""

    def __init__(self, sam: nn.Module, clicks: bool) -> None:
        super().__init__()
        self.sam, self.clicks = sam, clicks

    def forward(self, frames: Tensor, boxes: Tensor) -> None:
        order = [0, 2, 1, 3] if self.training and not self.clicks else [0, 1, 2, 3]
        for frame in order:
            centre = boxes[frame : frame + 1].unflatten(-1, (2, 2)).mean(1, keepdim=True)
            clicks = self.clicks and not self.training
            prompts = {"points": (centre, torch.ones(1, 1))} if clicks else {"boxes": boxes[frame : frame + 1]}
            sparse, dense = self.sam.prompt_encoder(**{"points": None, "boxes": None, "masks": None, **prompts})
            image = self.sam.image_encoder(frames[frame : frame + 1])
            position = self.sam.prompt_encoder.get_dense_pe()
            self.sam.mask_decoder(image, position, sparse, dense, multimask_output=False)


@pytest.mark.parametrize(("clicks", "difference"), [(False, "other images"), (True, "0 numbers as boxes")])
def test_a_forward_that_does_other_things_in_eval_mode_is_named(clicks, difference):
    model = Video(meta_sam(), clicks).train()
    teacher, student = tap(copy.deepcopy(model)), tap(model)
    boxes = torch.tensor([[2.0, 2, 20, 20]]).repeat(4, 1) + torch.arange(4)[:, None]
    model(torch.randn(4, 3, IMAGE_SIZE, IMAGE_SIZE), boxes)
    with pytest.raises(ValueError, match=f"must see what the student saw, got {difference}"):
        InfoSAMLoss(DIM)(teacher, student)


def test_clicks_in_place_of_boxes_are_replayed_as_boxes():
    model = Video(meta_sam(), clicks=True).train()
    teacher, student = tap(copy.deepcopy(model), replay_prompts=True), tap(model)
    boxes = torch.tensor([[2.0, 2, 20, 20]]).repeat(4, 1) + torch.arange(4)[:, None]
    model(torch.randn(4, 3, IMAGE_SIZE, IMAGE_SIZE), boxes)
    features, step = student.take_step()
    torch.testing.assert_close(teacher.observe(step).mask_tokens, features.mask_tokens.detach(), rtol=1e-5, atol=1e-5)


def test_replaying_needs_as_many_calls():
    class Once(Clicking):
        def forward(self, pixel_values: Tensor, twice: bool = False) -> object:
            for _ in range(2 if self.training else 1):
                output = super().forward(pixel_values)
            return output

    teacher, student = tap(Once(hf_sam(0)), replay_prompts=True), tap(Once(hf_sam(1)))
    with pytest.raises(ValueError, match="as many calls of both prompt encoders, got 2 of the student's and 1"):
        InfoSAMLoss(DIM)(teacher, student, hf_batch(3))


def test_replaying_needs_a_student_with_a_tap():
    teacher = tap(hf_sam(0), replay_prompts=True)
    with pytest.raises(
        ValueError, match="must have a prompt encoder of the teacher and the tap of a student, got no tap"
    ):
        teacher.observe(hf_batch())


# what a loop changes between the call and the loss


class Trainable(nn.Module):
    """micro-sam's form: dicts with one image and its prompts each."""

    def __init__(self) -> None:
        super().__init__()
        self.sam = meta_sam()

    def forward(self, batched_inputs: list[dict[str, Tensor]]) -> None:
        for record in batched_inputs:
            points = record["points"], record["labels"]
            sparse, dense = self.sam.prompt_encoder(points=points, boxes=None, masks=None)
            image = self.sam.image_encoder(record["image"][None])
            position = self.sam.prompt_encoder.get_dense_pe()
            self.sam.mask_decoder(image, position, sparse, dense, multimask_output=False)


def records() -> list[dict[str, Tensor]]:
    return [
        {
            "image": torch.randn(3, IMAGE_SIZE, IMAGE_SIZE),
            "points": torch.rand(1, 1, 2) * IMAGE_SIZE,
            "labels": torch.ones(1, 1),
        }
        for _ in range(2)
    ]


@pytest.mark.parametrize("through_the_tap", [False, True])
def test_prompts_count_as_they_were_at_each_call(through_the_tap):
    model = Trainable().eval()
    teacher, student, batch = tap(copy.deepcopy(model)), tap(model), records()
    for click in range(2):
        for record in batch if click else []:
            record["points"] = torch.cat([record["points"], torch.rand(1, 1, 2) * IMAGE_SIZE], 1)
            record["labels"] = torch.ones(1, 2)
        (student if through_the_tap else model)(batch)
    features, step = student.take_step()
    assert torch.equal(teacher.observe(step).mask_tokens, features.mask_tokens)
    assert len(features.mask_tokens) == 4


@pytest.mark.parametrize("name", ["pixel_values", "input_boxes"])
@pytest.mark.parametrize("given", [False, True])
def test_tensors_that_are_overwritten_before_the_loss_are_named(name, given):
    teacher, student, batch = tap(hf_sam(0)), tap(hf_sam(1)), hf_batch(3)
    student(batch)
    batch[name].add_(1)
    with pytest.raises(RuntimeError, match="overwritten"):
        InfoSAMLoss(DIM)(teacher, student, batch if given else None)


def test_parts_that_are_fed_from_a_buffer_which_changes_are_named():
    student, batch = tap(meta_sam(1)), meta_batch(2)
    images = torch.stack([item["image"] for item in batch])
    maps = student.model.image_encoder(images)
    for feature, item in zip(maps, batch, strict=True):
        sparse, dense = student.model.prompt_encoder(points=None, boxes=item["boxes"], masks=None)
        position = student.model.prompt_encoder.get_dense_pe()
        student.model.mask_decoder(feature[None], position, sparse, dense, multimask_output=False)
    images.zero_()
    with pytest.raises(ValueError, match="inputs must stay as they are until the loss is computed"):
        InfoSAMLoss(DIM)(tap(meta_sam(0), call=meta_forward), student, batch)


# runs of the encoders alone


def through_the_tap(student: Tap, batch: list) -> None:
    student(batch)


def by_its_parts(student: Tap, batch: list) -> None:
    meta_forward(student.model, batch)


@pytest.mark.parametrize("run", [through_the_tap, by_its_parts])
@pytest.mark.parametrize("with_gradient", [False, True])
def test_images_that_are_encoded_and_not_decoded_belong_to_no_step(run, with_gradient):
    teacher, student = (tap(meta_sam(seed), call=meta_forward) for seed in range(2))
    loss, other, batch = InfoSAMLoss(DIM), torch.randn(3, 3, IMAGE_SIZE, IMAGE_SIZE), meta_batch(2, 2)
    for _ in range(2):
        with torch.set_grad_enabled(with_gradient):
            student.model.image_encoder(other)
        run(student, batch)
        assert loss(teacher, student, batch).isfinite()


def test_maps_that_are_computed_in_advance_bring_their_own_images_alone():
    teacher, student = (tap(meta_sam(seed), call=meta_forward) for seed in range(2))
    batches, loss = [meta_batch(1, 2), meta_batch(2, 1), meta_batch(2, 3)], InfoSAMLoss(DIM)
    images = [torch.stack([item["image"] for item in batch]) for batch in batches]
    with torch.no_grad():
        maps = [student.model.image_encoder(each) for each in images]
    for batch, of_batch in zip(batches, maps, strict=True):
        decode_maps(student.model, of_batch, batch)
        assert loss(teacher, student, batch).isfinite()
    with torch.no_grad():
        later = [student.model.image_encoder(images[number] + number) for number in range(2)]
    decode_maps(student.model, later[1], batches[1])
    with pytest.raises(ValueError, match="got other images"):
        loss(teacher, student, batches[1])


def decode_maps(model: nn.Module, maps: Tensor, batch: list) -> None:
    for feature, item in zip(maps, batch, strict=True):
        sparse, dense = model.prompt_encoder(points=None, boxes=item["boxes"], masks=None)
        model.mask_decoder(feature[None], model.prompt_encoder.get_dense_pe(), sparse, dense, multimask_output=False)


def test_images_of_maps_that_are_computed_in_advance_do_not_stay_in_memory():
    student, alive = tap(meta_sam()), []
    for _ in range(100):
        images = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE)
        alive.append(weakref.ref(images))
        with torch.no_grad():
            student.model.image_encoder(images)
    del images
    assert sum(each() is not None for each in alive) <= 32
    batch = meta_batch(2)
    meta_forward(student.model, batch)
    assert InfoSAMLoss(DIM)(tap(meta_sam(), call=meta_forward), student, batch).isfinite()


def test_a_decoder_call_that_failed_leaves_no_prompts_to_the_next():
    teacher, student, batch = tap(meta_sam(0), call=meta_forward), tap(meta_sam(1)), meta_batch(2, 2)

    def fail(_module: nn.Module, _args: object) -> None:
        raise MemoryError

    handle = student.model.mask_decoder.transformer.register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        meta_forward(student.model, batch)
    handle.remove()
    meta_forward(student.model, batch)
    assert InfoSAMLoss(DIM)(teacher, student, batch).isfinite()


def test_embeddings_that_were_decoded_without_gradient_first_are_the_students_too():
    batch = hf_batch(3)
    teacher, student = tap(hf_sam(0)), tap(hf_sam(1))
    inputs = {"input_boxes": batch["input_boxes"]}
    with torch.no_grad():
        inputs["image_embeddings"] = student.model.vision_encoder(batch["pixel_values"]).last_hidden_state
        student.model(**inputs)
    student.model(**inputs)
    with pytest.raises(ValueError, match="teacher must see the images"):
        InfoSAMLoss(DIM)(teacher, student)


# how often values are compared


def seen_images(value: float, prompts: float = 0.0) -> Inputs:
    image = Seen({"x": torch.full((2, 3, 4, 4), value)}, (0,))
    points = Seen({"points": (torch.full((2, 1, 2), prompts), torch.ones(2, 1))}, (0, 0))
    return Inputs((image,), (points,), frozenset(), (True,), (points,))


def test_values_are_compared_in_the_first_steps_and_always_on_request():
    compare = Comparison("first")
    for _ in range(3):
        compare(seen_images(1.0), seen_images(1.0))
    compare(seen_images(1.0), seen_images(2.0))
    always = Comparison("always")
    for _ in range(5):
        always(seen_images(1.0), seen_images(1.0))
    with pytest.raises(ValueError, match="other images"):
        always(seen_images(1.0), seen_images(2.0))
    with pytest.raises(ValueError, match="other points"):
        always(seen_images(1.0, 0.0), seen_images(1.0, 1.0))


def test_values_are_compared_again_when_they_come_to_lie_elsewhere():
    compare, one = Comparison("first"), seen_images(1.0)
    for _ in range(5):
        compare(one, one)
    with pytest.raises(ValueError, match="other images"):
        compare(one, seen_images(2.0))


def test_nothing_is_compared_where_that_is_asked_for():
    Comparison("never")(seen_images(1.0), seen_images(2.0))
    with pytest.raises(ValueError, match="compare_inputs must be one of.*got 'sometimes'"):
        InfoSAMLoss(DIM, compare_inputs="sometimes")


def test_numbers_and_shapes_are_compared_in_every_step():
    compare = Comparison("first")
    for _ in range(5):
        compare(seen_images(1.0), seen_images(1.0))
    fewer = seen_images(1.0)
    fewer.images[0].arguments["x"] = torch.ones(1, 3, 4, 4)
    with pytest.raises(ValueError, match="1 images in its image encoder where there are 2"):
        compare(seen_images(1.0), fewer)
    fewer.images[0].arguments["x"] = torch.ones(2, 3, 8, 8)
    with pytest.raises(ValueError, match=r"images of \(3, 8, 8\) where those of the student are of \(3, 4, 4\)"):
        compare(seen_images(1.0), fewer)


def test_views_of_one_memory_in_one_version_are_one():
    x = torch.zeros(2, 3)
    assert _is_one(x, x)
    assert _is_one(x[0], x[0])
    assert not _is_one(x[0], x[1])
    assert not _is_one(x, x.clone())
    assert not _is_one(x.view(6), x)
    written = x.detach().data
    assert _is_one(written, x)
    written.add_(1)
    assert not _is_one(written, x)


def test_points_and_labels_are_the_same_as_a_pair_and_by_name():
    def of(**prompts: object) -> Inputs:
        one = seen_images(1.0)
        return one._replace(prompts=(seen((), (), prompts),))

    pair = of(points=(torch.full((2, 1, 2), 5.0), torch.ones(2, 1)))
    by_name = of(input_points=torch.full((2, 1, 2), 5.0), input_labels=torch.ones(2, 1))
    Comparison("always")(pair, by_name)
    Comparison("always")(by_name, pair)
    with pytest.raises(ValueError, match="other labels"):
        Comparison("always")(pair, of(input_points=torch.full((2, 1, 2), 5.0), input_labels=torch.zeros(2, 1)))
    # Of three tensors none is known to be of labels.
    Comparison("always")(of(points=[torch.zeros(1)] * 3), of(coords=[torch.zeros(1)] * 3))
    with pytest.raises(ValueError, match="3 numbers as points of its prompts where the student has 2"):
        Comparison("always")(
            of(points=(torch.zeros(2), torch.ones(2))), of(points=[torch.zeros(1), torch.ones(1), torch.ones(1)])
        )


def test_rounding_of_a_coarser_dtype_is_no_difference():
    compare, coarse = Comparison("always"), seen_images(1.001)
    coarse.images[0].arguments["x"] = coarse.images[0].arguments["x"].bfloat16()
    compare(seen_images(1.001), coarse)
    compare(seen_images(float("nan")), seen_images(float("nan")))


def test_masks_that_a_model_refines_are_left_out():
    batch = hf_batch(2)
    teacher, student = tap(hf_sam(0)), tap(hf_sam(1))
    with torch.no_grad():
        masks = student.model(batch["pixel_values"], input_boxes=batch["input_boxes"]).pred_masks[:, :, 0]

    def refined(model: nn.Module, batch: dict[str, Tensor]) -> object:
        own = masks if model is student.model else masks + 1
        return model(batch["pixel_values"], input_boxes=batch["input_boxes"], input_masks=own)

    teacher, student = tap(teacher.model, call=refined), tap(student.model, call=refined)
    assert InfoSAMLoss(DIM, compare_inputs="always")(teacher, student, batch).isfinite()


def test_prompts_of_a_decoder_that_stands_alone_are_compared():
    models = [meta_sam(seed) for seed in range(2)]
    for model in models:
        model.mask_decoder.requires_grad_(True)
    maps = torch.randn(3, DIM, 4, 4)
    prompts = [models[0].prompt_encoder(points=None, boxes=torch.rand(1, 4) * 32, masks=None) for _ in range(3)]

    def decode(decoder: nn.Module, shift: float) -> None:
        for image, (sparse, dense) in zip(maps, prompts, strict=True):
            decoder(
                image_embeddings=image[None],
                image_pe=models[0].prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse.detach() + shift,
                dense_prompt_embeddings=dense.detach(),
                multimask_output=False,
            )

    student = tap(models[1].mask_decoder)
    for shift, expectation in ((0.0, None), (1.0, "other sparse_prompt_embeddings")):
        teacher = tap(models[0].mask_decoder, call=lambda decoder, _, shift=shift: decode(decoder, shift))
        decode(student.model, 0.0)
        if expectation is None:
            assert InfoSAMLoss(DIM)(teacher, student, maps).isfinite()
        else:
            with pytest.raises(ValueError, match=expectation):
                InfoSAMLoss(DIM)(teacher, student, maps)
        teacher.close()


def test_prompts_of_named_places_are_compared_and_replayed():
    places = {
        "image_features": ("vision_encoder", lambda output: output.last_hidden_state),
        "mask_tokens": ("mask_decoder.transformer", lambda output: output[0][:, :, 1:2]),
    }
    batch, other = hf_batch(3), hf_batch(3, seed=1)
    student = tap(hf_sam(1), **places)
    call = lambda model, _: model(batch["pixel_values"], input_boxes=other["input_boxes"])  # noqa: E731
    with pytest.raises(ValueError, match="got other boxes"):
        InfoSAMLoss(DIM)(tap(hf_sam(0), call=call, **places), student, batch)
    replaying = tap(hf_sam(0), call=call, replay_prompts=True, **places)
    assert torch.equal(
        InfoSAMLoss(DIM)(replaying, student, batch), InfoSAMLoss(DIM)(tap(hf_sam(0), **places), student, batch)
    )
