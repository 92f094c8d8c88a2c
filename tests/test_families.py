"""Every SAM family, as its own package computes it: what the tap reads, gradients, prompts, compilation, refusals.

A family whose package is not installed is skipped, with the command that brings it; with RENYI_KD_ALL_FAMILIES=1 it
fails. RENYI_KD_WRITE_FAMILIES=1 writes what was found into the rows of the table in docs/models.md.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from renyi_kd import InfoSAMLoss, Tap, tap
from tests.support.families import (
    CASES,
    SAM2,
    SAM2_TRAIN_INSTALL,
    VIDEO_DIM,
    Case,
    boxes_in,
    clip,
    hf_sam2,
    hf_sam2_video,
    hf_sam3,
    hf_sam3_tracker,
    run_with,
    sam2_train,
    sam2_video_batch,
    track,
)
from tests.support.models import DIM, GRID, IMAGE_SIZE, hf_batch, hf_sam, meta_batch, meta_forward, meta_sam, with_lora
from tests.support.packages import EVERYTHING, import_quietly, need
from tests.support.stand_ins import InferenceOnly, MonaiLike, Sam, TinySamDecoder, one_hypernetwork

TABLE = Path(__file__).parent.parent / "benchmarks/results/families.csv"
COLUMNS = ("family", "image_features", "mask_tokens", "gradients", "prompts", "compile", "run_with", "torch")
VIDEO, TRAIN, CLIP = "transformers Sam2VideoModel", "sam2 SAM2Train", "transformers CLIPModel (places named)"
REFUSED = ("transformers Sam3Model", "MONAI CellSamWrapper", "ultralytics SAM and other inference-only wrappers")
NAMES = (*(case.name for case in CASES), TRAIN, VIDEO, CLIP, *REFUSED)
WRITING = os.environ.get("RENYI_KD_WRITE_FAMILIES") == "1"
FOUND: dict[str, dict[str, str]] = {name: {"family": name, "torch": torch.__version__} for name in NAMES}

each_family = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
# torch.compile looks at .grad of every tensor it meets.
compiles = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


def rows_of_table() -> list[dict[str, str]]:
    if not TABLE.exists():
        return []
    with TABLE.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module", autouse=True)
def _written() -> Iterator[None]:
    yield
    if WRITING:
        known = {row["family"]: row for row in rows_of_table()}
        with TABLE.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            # Of a family that was skipped or failed, the row stays as it was.
            found = {name: row for name, row in FOUND.items() if row.keys() == set(COLUMNS)}
            writer.writerows({**known, **found}[name] for name in NAMES if name in {**known, **found})


def spy(model: nn.Module, case: Case) -> tuple[list[Tensor], list[Tensor]]:
    """Return two lists that fill with what encoder and transformer give: the definitions of both features."""
    images: list[Tensor] = []
    tokens: list[Tensor] = []

    def see_image(_module: nn.Module, _args: Any, output: Any) -> None:
        images.append(case.image(model, output))

    def see_tokens(_module: nn.Module, _args: Any, output: Any) -> None:
        tokens.append(output[0].flatten(0, -3)[:, case.rows])

    model.get_submodule(case.encoder).register_forward_hook(see_image)
    model.get_submodule(case.decoder).transformer.register_forward_hook(see_tokens)
    return images, tokens


def largest_gradient(module: nn.Module) -> float:
    gradients = [parameter.grad.abs().max().item() for parameter in module.parameters() if parameter.grad is not None]
    return max(gradients, default=0.0)


def check_gradients(case_dim: int, teacher: Tap, student: Tap, batch: Any, *parts: nn.Module) -> InfoSAMLoss:
    infosam_loss = InfoSAMLoss(case_dim)
    output = student(batch)
    value = infosam_loss(teacher, student, batch)
    assert value.isfinite()
    # Whatever of it a task could be made of.
    made = [leaf.float().square().mean() for leaf in tree_leaves(output) if getattr(leaf, "requires_grad", False)]
    (value + sum(made)).backward()
    if made:
        state = infosam_loss.diagnostics()
        assert 0 < state.image_features_share < math.inf
        assert 0 < state.mask_tokens_share < math.inf
    for part in (*parts, infosam_loss.relation):
        assert largest_gradient(part) > 0
    assert largest_gradient(teacher.model) == 0
    return infosam_loss


# every family


@each_family
def test_features_are_what_encoder_and_transformer_gave(case):
    version = run_with(case)
    model, batch = case.make(0), case.batch(2, case.prompts)
    images, tokens = spy(model, case)
    student = tap(model, call=case.call)
    student(batch)
    features = student.take(batch)
    assert torch.equal(features.image_features, torch.cat(images))
    assert torch.equal(features.mask_tokens, torch.cat(tokens))
    n_tokens = case.rows.stop - case.rows.start
    assert features.mask_tokens.shape == (2 * case.prompts, n_tokens, case.dim)
    expected = None if case.prompts == 1 else [0] * case.prompts + [1] * case.prompts
    assert (None if features.image_index is None else features.image_index.tolist()) == expected
    FOUND[case.name] |= {
        "image_features": f"`{case.encoder}`",
        "mask_tokens": f"`{case.decoder}.transformer`, rows {case.rows.start} to {case.rows.stop - 1}",
        "prompts": "takes none" if case.prompts == 1 else "yes",
        "run_with": version,
    }


@each_family
def test_gradients_reach_encoder_decoder_and_relation(case):
    run_with(case)
    teacher, student = (tap(case.make(seed), call=case.call) for seed in range(2))
    encoder, decoder = (student.model.get_submodule(path) for path in (case.encoder, case.decoder))
    check_gradients(case.dim, teacher, student, case.batch(2, case.prompts), encoder, decoder.transformer)
    FOUND[case.name]["gradients"] = "encoder, decoder"


@each_family
@compiles
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_after_tapping_gives_the_same_loss(case):
    run_with(case)
    if not (EVERYTHING or case.module is None or case.name == "transformers Sam2Model"):
        pytest.skip("compiling takes seconds; with RENYI_KD_ALL_FAMILIES=1 every family is compiled")
    batch, infosam_loss = case.batch(2, case.prompts), InfoSAMLoss(case.dim)
    teacher, plain = (tap(case.make(seed), call=case.call) for seed in range(2))
    plain(batch)
    expected = infosam_loss(teacher, plain, batch)
    model = case.make(1)
    if case.compiled:
        student = tap(model, call=case.call)
        for path in case.compiled:
            model.get_submodule(path).compile(backend="eager")
    else:
        student = tap(torch.compile(model, backend="eager"), call=case.call)
    for _ in range(2):
        student(batch)
        torch.testing.assert_close(infosam_loss(teacher, student, batch), expected, rtol=1e-4, atol=1e-5)
    FOUND[case.name]["compile"] = "yes"


@pytest.mark.skipif(WRITING, reason="the table is being written")
def test_the_table_has_every_family():
    rows = rows_of_table()
    assert [row["family"] for row in rows] == list(NAMES)
    assert all(all(row.values()) for row in rows)


# several frames, objects and clicks


def test_sam2_train_accumulates_frames_objects_and_clicks():
    version = need("sam2", "sam2", SAM2_TRAIN_INSTALL)

    def call(model: nn.Module, batch: Any) -> Any:
        return model(batch)

    n_frames, n_objects, clicks = 2, 2, 2
    batch = sam2_video_batch(n_frames, n_objects)
    model = sam2_train(0, clicks)
    tokens: list[Tensor] = []
    maps: list[Tensor] = []
    decoder = model.sam_mask_decoder
    decoder.transformer.register_forward_hook(lambda _module, _args, output: tokens.append(output[0][:, SAM2]))
    decoder.register_forward_pre_hook(
        lambda _module, _args, kwargs: maps.append(kwargs["image_embeddings"]), with_kwargs=True
    )
    student = tap(model, call=call)
    student(batch)
    features = student.take(batch)
    # The first frame is prompted once and corrected; its features are per object, and the same for every click.
    assert len(tokens) == n_frames + clicks
    assert torch.equal(features.mask_tokens, torch.cat(tokens))
    assert torch.equal(features.image_features, torch.cat([maps[0], maps[-1]]))
    assert features.image_index.tolist() == [0, 1, 0, 1, 0, 1, 2, 3]
    # It clicks where its own masks are wrong.
    teacher, student = (tap(sam2_train(seed, clicks), call=call, replay_prompts=seed == 0) for seed in range(2))
    check_gradients(DIM, teacher, student, batch, student.model.image_encoder, student.model.sam_mask_decoder)
    FOUND[TRAIN] |= {
        "image_features": "after the memory, one map per object and frame",
        "mask_tokens": "`sam_mask_decoder.transformer`, rows 2 to 5",
        "gradients": "encoder, decoder",
        "prompts": "every click is a sample",
        "compile": "not tried",
        "run_with": version,
    }


def test_hf_video_accumulates_frames_and_objects():
    version = need("transformers", "transformers", "")
    model, batch = hf_sam2_video(), {"video": torch.randn(3, 3, 64, 64), "points": torch.rand(2, 2) * 64}
    tokens: list[Tensor] = []
    model.mask_decoder.transformer.register_forward_hook(
        lambda _module, _args, output: tokens.append(output[0].flatten(0, 1)[:, SAM2])
    )
    student = tap(model, call=track)
    student(batch)
    features = student.take(batch)
    assert len(tokens) == 3 * 2
    assert torch.equal(features.mask_tokens, torch.cat(tokens))
    assert features.mask_tokens.shape == (6, 4, VIDEO_DIM)
    assert features.image_features.shape == (6, VIDEO_DIM, 4, 4)
    teacher, student = (tap(hf_sam2_video(seed), call=track) for seed in range(2))
    check_gradients(VIDEO_DIM, teacher, student, batch, student.model.vision_encoder.neck, student.model.mask_decoder)

    def inferring(model: nn.Module, batch: Any) -> Any:
        return track(model, batch, with_gradient=False)

    student = tap(hf_sam2_video(1), call=inferring)
    student(batch)
    with pytest.raises(RuntimeError, match="ran without gradient, as in a forward or predictor"):
        student.take(batch)
    teacher, student = tap(hf_sam2_video(), call=inferring), tap(hf_sam2_video(1), call=track)
    check_gradients(VIDEO_DIM, teacher, student, batch, student.model.mask_decoder)
    FOUND[VIDEO] |= {
        "image_features": "after the memory, one map per object and frame",
        "mask_tokens": "`mask_decoder.transformer`, rows 2 to 5",
        "gradients": "encoder, decoder; not in its own forward, which is for inference",
        "prompts": "every object is a sample",
        "compile": "not tried",
        "run_with": version,
    }


@pytest.mark.parametrize("make", [hf_sam2, hf_sam3_tracker], ids=["sam2", "sam3_tracker"])
def test_features_survive_that_the_model_overwrites_the_encoders_output(make):
    model, kept, image = make(), [], []
    size = 64 if make is hf_sam2 else 56
    model.vision_encoder.register_forward_hook(lambda _module, _args, output: kept.append(output))
    model.mask_decoder.register_forward_pre_hook(
        lambda _module, _args, kwargs: image.append(kwargs["image_embeddings"].clone()), with_kwargs=True
    )
    student = tap(model)
    batch = boxes_in(size, 2, 1)
    student(batch)
    # What was a list of maps [b, d, h, w] when the encoder returned has pixels first by now.
    assert all(level.ndim == 3 for level in kept[0].fpn_hidden_states)
    assert torch.equal(student.take(batch).image_features, image[0])


def test_sam2_features_survive_that_the_model_replaces_levels():
    case = next(case for case in CASES if case.name.startswith("sam2 SAM2Base"))
    run_with(case)
    model, kept, channels, image = case.make(0), [], [], []

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        kept.append(output)
        channels.append([level.shape[1] for level in output["backbone_fpn"]])

    model.image_encoder.register_forward_hook(keep)
    model.sam_mask_decoder.register_forward_pre_hook(
        lambda _module, _args, kwargs: image.append(kwargs["image_embeddings"].clone()), with_kwargs=True
    )
    student = tap(model, call=case.call)
    batch = case.batch(2, 1)
    student(batch)
    assert [level.shape[1] for level in kept[0]["backbone_fpn"]] != channels[0]
    assert torch.equal(student.take(batch).image_features, torch.cat(image))


# decoders of other shapes


@pytest.mark.parametrize("at_once", [True, False])
def test_one_hypernetwork_for_all_tokens(at_once):
    model, batch = one_hypernetwork(at_once), torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    tokens: list[Tensor] = []
    model.mask_decoder.transformer.register_forward_hook(lambda _module, _args, output: tokens.append(output[0]))
    student = tap(model)
    student(batch)
    assert torch.equal(student.take(batch).mask_tokens, tokens[0][:, 1:5])


def test_image_and_text_towers_by_their_places():
    places = {
        "image_features": ("vision_model", lambda output: output.last_hidden_state[:, 1:].mT.unsqueeze(-1)),
        "mask_tokens": ("text_model", lambda output: output.pooler_output),
    }
    batch = {
        "pixel_values": torch.randn(3, 3, IMAGE_SIZE, IMAGE_SIZE),
        "input_ids": torch.arange(15).reshape(3, 5),
    }
    teacher, student = (tap(clip(seed), **places) for seed in range(2))
    images: list[Tensor] = []
    student.model.vision_model.register_forward_hook(
        lambda _module, _args, output: images.append(output.last_hidden_state)
    )
    student(batch)
    features = student.take(batch)
    assert features.image_features.shape == (3, DIM, GRID**2, 1)
    assert torch.equal(features.image_features[..., 0].mT, images[0][:, 1:])
    assert features.mask_tokens.shape == (3, 1, DIM)
    check_gradients(DIM, teacher, student, batch, student.model.vision_model, student.model.text_model)
    FOUND[CLIP] |= {
        "image_features": "`vision_model`, patches [b, l, d] as [b, d, l, 1]",
        "mask_tokens": "`text_model`, pooled",
        "gradients": "both towers",
        "prompts": "one text per image",
        "compile": "not tried",
        "run_with": need("transformers", "transformers", ""),
    }


def test_metas_decoder_takes_one_image_per_call():
    model, batch = meta_sam(), hf_batch(2, 2)
    student = tap(model)
    features = model.image_encoder(batch["pixel_values"])
    sparse, dense = model.prompt_encoder(points=None, boxes=batch["input_boxes"].flatten(0, 1), masks=None)
    with pytest.raises(RuntimeError, match="size of tensor"):
        model.mask_decoder(features, model.prompt_encoder.get_dense_pe(), sparse, dense, multimask_output=False)
    assert not student.pending
    meta_forward(model, meta_batch(2, 2))
    assert student.take().image_index.tolist() == [0, 0, 1, 1]


# two decoders, and none


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.coarse, self.fine = hf_sam(0), hf_sam(1)

    def forward(self, names: tuple[str, ...], pixel_values: Tensor, input_boxes: Tensor) -> None:
        for name in names:
            getattr(self, name)(pixel_values, input_boxes=input_boxes)


def test_features_of_two_decoders_do_not_mix():
    model, batch = Pair(), hf_batch()
    inputs = {"pixel_values": batch["pixel_values"], "input_boxes": batch["input_boxes"]}
    student = tap(model)
    for run in (lambda: student.take(), lambda: student.observe({"names": ("coarse", "fine"), **inputs})):
        model(("coarse", "fine"), **inputs)
        with pytest.raises(
            RuntimeError,
            match=r"one mask decoder must run in a step, got calls of 'coarse.mask_decoder' and 'fine.mask_decoder'.*;"
            " tap the part",
        ):
            run()
        assert not student.pending
    model(("fine",), **inputs)
    assert student.take().mask_tokens.shape == (2, 4, DIM)
    with tap(model.fine) as fine:
        model(("coarse", "fine"), **inputs)
        assert fine.take().mask_tokens.shape == (2, 4, DIM)


def test_pefts_copies_of_a_decoder_are_one():
    model, batch = with_lora(hf_sam()), hf_batch()
    student = tap(model)
    student(batch)
    with model.disable_adapter():
        student(batch)
    assert student.take(batch).mask_tokens.shape == (4, 4, DIM)


def test_a_decoder_that_is_never_called_is_named():
    class EncoderOnly(Sam):
        def forward(self, images: Tensor) -> Tensor:
            return self.image_encoder(images)

    student, batch = tap(EncoderOnly(TinySamDecoder())), torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    student(batch)
    with pytest.raises(RuntimeError, match=r"it ran, and none of its decoders \(mask_decoder\) was called; name the"):
        student.take(batch)
    with pytest.raises(RuntimeError, match="must call its mask decoder"):
        student.observe(batch)


def test_sam3s_detector_is_refused_with_its_reason():
    with pytest.raises(ValueError, match=r"must have mask tokens, got Sam3Model, a DETR.*; take Sam3TrackerModel"):
        tap(hf_sam3())
    FOUND[REFUSED[0]] |= refused("object queries instead", need("transformers", "transformers", ""))


def test_a_replaced_decoder_is_refused_with_its_reason():
    with pytest.raises(
        ValueError, match="must have mask tokens, got MonaiLike, whose mask decoder has no mask_tokens.*; keep"
    ):
        tap(MonaiLike())


def test_monais_wrapper_is_refused_with_its_reason():
    version = need("monai", "monai", "pip install --no-deps monai")
    wrapper = import_quietly("monai.networks.nets.cell_sam_wrapper").CellSamWrapper
    with torch.device("meta"):
        model = wrapper(checkpoint=None)
    with pytest.raises(
        ValueError, match="must have mask tokens, got CellSamWrapper, whose mask decoder has no mask_tokens"
    ):
        tap(model)
    FOUND[REFUSED[1]] |= refused("none", version)


def test_a_wrapper_for_inference_is_refused_as_a_student_with_its_reason():
    student, batch = tap(InferenceOnly()), torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    student(batch)
    with pytest.raises(RuntimeError, match=r"must run with gradient to be a student.*torch\.no_grad.*loop of your own"):
        student.take(batch)
    assert tap(InferenceOnly()).observe(batch).mask_tokens.shape == (2, 9, DIM)
    FOUND[REFUSED[2]] |= {
        **refused("of the SAM inside", "stand-in"),
        "image_features": "of the SAM inside",
        "gradients": "refused: it runs without gradient",
        "prompts": "as a teacher",
    }


def refused(tokens: str, version: str) -> dict[str, str]:
    return {
        "image_features": "-",
        "mask_tokens": tokens,
        "gradients": "refused: it has no mask tokens",
        "prompts": "-",
        "compile": "-",
        "run_with": version,
    }
