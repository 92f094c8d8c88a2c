"""Loading the SAMs of the benchmarks, running one with Meta's interface, and writing files whole."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch.nn import functional as F

from benchmarks import files, peft_methods
from benchmarks.sam import models
from renyi_kd import InfoSAMLoss, tap
from tests.support.families import boxes_in
from tests.support.models import DIM, IMAGE_SIZE, hf_sam, meta_sam


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    hf_sam().save_pretrained(path)
    return path


@pytest.mark.parametrize("method", ["lora", "adapter", "bitfit", "decoder"])
@pytest.mark.parametrize("prompt", ["box", "point"])
def test_models_with_metas_interface_train_with_infosam(method, prompt):
    sam = models.Sam(meta_sam().eval(), models.segment_meta, IMAGE_SIZE, DIM)
    before = {name: value.clone() for name, value in sam.model.state_dict().items()}
    model = peft_methods.apply(copy.deepcopy(sam.model), method, first_block=0)
    teacher, student = tap(sam.model, call=sam.segment), tap(model, call=sam.segment)
    infosam_loss = InfoSAMLoss(DIM)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW([*trainable, *infosam_loss.parameters()], lr=0.01)
    batch = {**boxes_in(IMAGE_SIZE, 2, 2), "inside": torch.ones(2, 1, IMAGE_SIZE, IMAGE_SIZE)}
    if prompt == "point":
        boxes = batch.pop("input_boxes")
        batch |= {"input_points": boxes.view(2, 2, 2, 2).mean(2, keepdim=True), "input_labels": torch.ones(2, 2, 1)}
    seen = []
    for _ in range(2):
        logits = student(batch)
        assert logits.shape == (2, 2, IMAGE_SIZE, IMAGE_SIZE)
        terms = infosam_loss.terms(teacher, student, batch)
        optimizer.zero_grad()
        (F.binary_cross_entropy_with_logits(logits, torch.ones_like(logits)) + terms.loss).backward()
        optimizer.step()
        seen.append(terms)
    assert all(terms.compression < 0 for terms in seen)
    assert seen[0].distillation != seen[1].distillation
    assert all(torch.equal(value, before[name]) for name, value in sam.model.state_dict().items())
    assert any(parameter.grad is not None for parameter in infosam_loss.parameters())
    assert any(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in trainable)


def test_image_size_interpolates_the_position_embeddings(tiny_model):
    sam = models.load_sam(str(tiny_model), None, 2 * IMAGE_SIZE)
    assert sam.image_size == 2 * IMAGE_SIZE
    own = models.load_sam(str(tiny_model), None, None).model.vision_encoder.pos_embed
    assert sam.model.vision_encoder.pos_embed.shape[1] == 2 * own.shape[1]
    torch.testing.assert_close(sam.model.vision_encoder.pos_embed.mean(), own.mean(), rtol=0.2, atol=0.05)


def test_an_image_size_that_is_no_whole_grid_is_refused(tiny_model):
    with pytest.raises(ValueError, match="--image-size must be a multiple of 8 px, got 33"):
        models.load_sam(str(tiny_model), None, 33)


def test_mobile_sam_without_its_weights_or_package_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="--weights must name a safetensors file with --model mobile_sam"):
        models.load_sam("mobile_sam", None, None)
    weights = tmp_path / "no.safetensors"
    with pytest.raises(FileNotFoundError, match=r"no.safetensors: missing; --weights must be"):
        models.load_sam("mobile_sam", weights, None)
    weights.write_bytes(b"")
    monkeypatch.setitem(sys.modules, "mobilesam_lite.mobile_sam", None)
    with pytest.raises(ModuleNotFoundError, match="--model mobile_sam needs: pip install mobilesam-lite"):
        models.load_sam("mobile_sam", weights, None)


def test_a_model_that_is_nowhere_is_named():
    with pytest.raises(OSError, match="/no/such/model"):
        models.load_sam("/no/such/model", None, None)


def test_a_file_that_cannot_be_finished_leaves_the_old_one(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("old")

    def fail() -> None:
        with files.whole_file(path) as temporary:
            temporary.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.csv"]
