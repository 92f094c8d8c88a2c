"""MobileSAM in the benchmarks, at the input size of its weights and at others."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks.sam.models import Sam, load_sam
from tests.support.families import boxes_in
from tests.support.packages import import_quietly, need

OWN_SIZE, SMALLER = 1024, 224


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    need("mobilesam_lite", "mobilesam-lite", "pip install --no-deps mobilesam-lite timm")
    torch.manual_seed(0)
    model = import_quietly("mobilesam_lite.mobile_sam").build_sam_vit_t()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    path = tmp_path_factory.mktemp("mobile_sam") / "weights.safetensors"
    save_file(model.state_dict(), path)
    return path


def loaded(weights, size: int | None) -> Sam:
    import_quietly("mobilesam_lite.mobile_sam")
    return load_sam("mobile_sam", weights, size)


@torch.no_grad()
def test_at_its_own_size_the_encoder_is_that_of_its_package(weights):
    original = import_quietly("mobilesam_lite.mobile_sam").build_sam_vit_t()
    original.load_state_dict(load_file(weights))
    image = torch.randn(1, 3, OWN_SIZE, OWN_SIZE)
    expected = original.eval().image_encoder(image)
    assert expected.abs().mean() > 0.1
    torch.testing.assert_close(loaded(weights, None).model.image_encoder(image), expected, rtol=0, atol=0)


def test_weights_of_another_model_are_named_in_one_line(weights, tmp_path):
    state = load_file(weights)
    del state["mask_decoder.iou_token.weight"]
    path = tmp_path / "other.safetensors"
    save_file({**state, "statistics": torch.zeros(1)}, path)
    with pytest.raises(
        ValueError, match=r"which differs in 2 of them, such as mask_decoder.iou_token.weight; save mob"
    ):
        loaded(path, SMALLER)


def test_at_another_size_a_copy_is_trained(weights):
    sam = loaded(weights, SMALLER)
    assert sam.image_size == SMALLER
    model = copy.deepcopy(sam.model)
    batch = {**boxes_in(SMALLER, 2, 1), "inside": torch.ones(2, 1, SMALLER, SMALLER)}
    assert model.image_encoder(batch["pixel_values"]).shape == (2, 256, SMALLER // 16, SMALLER // 16)
    logits = sam.segment(model, batch)
    assert logits.shape == (2, 1, SMALLER, SMALLER)
    (logits * torch.randn_like(logits)).sum().backward()
    first = next(iter(model.image_encoder.parameters()))
    assert first.grad.abs().max() > 0
    assert next(iter(sam.model.image_encoder.parameters())).grad is None


def test_the_grids_of_another_size_are_those_of_an_encoder_built_for_it(weights):
    def grids(encoder: nn.Module) -> list[tuple[int, int]]:
        return [module.input_resolution for module in encoder.modules() if hasattr(module, "input_resolution")]

    modeling = import_quietly("mobilesam_lite.mobile_sam.modeling")
    built = modeling.TinyViT(
        img_size=SMALLER, embed_dims=[64, 128, 160, 320], depths=[2, 2, 6, 2], num_heads=[2, 4, 5, 10]
    )
    found = grids(loaded(weights, SMALLER).model.image_encoder)
    assert len(found) > 10
    assert found == grids(built)


def test_sizes_that_are_no_whole_grid_are_refused(weights):
    with pytest.raises(ValueError, match=r"--image-size must be a multiple of 16 px with --model mobile_sam, got 230"):
        loaded(weights, 230)
