"""What a fine-tuned model does elsewhere: other images, corrupted copies, few shots, states of the weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import tyro
from PIL import Image
from torch import nn

from benchmarks import peft_methods
from benchmarks.readme import RESULTS
from benchmarks.sam.models import load_sam
from benchmarks.segmentation import __main__ as command
from benchmarks.segmentation import corruptions, rows
from benchmarks.segmentation.augmentation import KEPT, SMALLEST_CROP, flipped_and_cropped
from benchmarks.segmentation.data import MaskDataset
from benchmarks.segmentation.evaluation import Probe, ious
from benchmarks.segmentation.few_shot import Draws, drawn_pairs
from benchmarks.segmentation.grid import Grid
from benchmarks.segmentation.instances import MOST_INSTANCES, InstanceDataset
from benchmarks.segmentation.models import Watched
from benchmarks.segmentation.options import Options
from benchmarks.segmentation.states import States, interpolated, swapped, trained_weights
from tests.support.images import write_folder, write_list, write_pair

SIZE = 64


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "data")


@pytest.fixture(scope="module")
def sam():
    return load_sam("mini", None, SIZE)


# ---- corrupted copies


def noisy_photo() -> Image.Image:
    values = np.random.default_rng(0).uniform(100, 156, (60, 80, 3))
    return Image.fromarray(values.astype(np.uint8))


def changed(image: Image.Image, corruption: str, seed: int = 0) -> np.ndarray:
    found = corruptions.corrupted(image, corruption, np.random.default_rng(seed))
    assert (found.mode, found.size) == ("RGB", image.size)
    return np.asarray(found).astype(float)


def test_noise_has_its_deviation_and_contrast_keeps_the_means():
    image = noisy_photo()
    before = np.asarray(image).astype(float)
    assert (changed(image, "gaussian_noise") - before).std() == pytest.approx(255 * 0.18, rel=0.03)
    lower = changed(image, "contrast")
    np.testing.assert_allclose(lower.mean((0, 1)), before.mean((0, 1)), atol=0.1)
    np.testing.assert_allclose(lower.std((0, 1)), 0.2 * before.std((0, 1)), rtol=0.03)


def test_motion_blur_is_a_mean_along_a_line():
    values = np.zeros((81, 81, 3), np.uint8)
    values[40, 40] = 255
    weights = np.exp(-(np.arange(31.0) ** 2) / (2 * 8**2))
    blurred = changed(Image.fromarray(values), "motion_blur")[..., 0]
    assert blurred.max() == pytest.approx(255 / weights.sum(), abs=0.5)
    where = np.argwhere(blurred)
    # The line ends in the pixel: it was to the right of those that see it, and at most as far up or down.
    offsets = 40 - where
    assert (offsets[:, 1] >= 0).all()
    assert (abs(offsets[:, 0]) <= offsets[:, 1] + 1).all()
    flat = Image.new("RGB", (50, 40), (10, 100, 200))
    np.testing.assert_array_equal(changed(flat, "motion_blur"), np.asarray(flat))


def test_a_low_quality_of_jpeg_makes_blocks():
    image = noisy_photo()
    difference = np.asarray(image).astype(float) - changed(image, "jpeg")
    assert difference.std() > 5
    assert (changed(image, "jpeg") == changed(image, "jpeg", seed=1)).all()


@pytest.mark.parametrize("corruption", corruptions.CORRUPTIONS)
def test_corrupted_copies_depend_on_the_image_alone_and_keep_masks_and_prompts(folder, corruption):
    clean = MaskDataset(folder, "test", size=48)
    copies = corruptions.CorruptedDataset(clean, corruption)
    assert copies.sample_ids == clean.sample_ids
    for index in (2, 0, 1, 2):
        before, after = clean[index], copies[index]
        assert torch.equal(after["pixel_values"], copies[index]["pixel_values"])
        assert (before["pixel_values"] - after["pixel_values"]).abs().max() > 0.1
        for name in ("masks", "inside", "input_boxes", "input_points"):
            assert torch.equal(before[name], after[name])


# ---- instances


def write_cells(folder, name: str, count: int) -> None:
    """Write an image with cells of 3 x 5 and more pixels in a grid, and a speck."""
    write_pair(folder, name, size=(96, 80))
    mask = np.zeros((80, 96), bool)
    for cell in range(count):
        row, column = 2 + 12 * (cell // 6), 2 + 15 * (cell % 6)
        mask[row : row + 4 + cell % 3, column : column + 5] = True
    mask[78, 94] = True
    Image.fromarray(mask).save(folder / f"masks/{name}.png")


def test_every_component_is_an_instance_with_prompts_of_its_own(tmp_path):
    write_cells(tmp_path, "a", 4)
    write_list(tmp_path, "test", ["a"])
    images = InstanceDataset(tmp_path, "test", size=192)
    item, originals = images[0], images.original_masks(0)
    assert originals.shape == (4, 80, 96)
    assert originals.sum() == images.original_mask(0).sum() - 1
    assert item["masks"].shape == (4, 192, 192)
    assert item["input_boxes"].tolist()[:2] == [[4, 4, 13, 11], [34, 4, 43, 13]]
    for mask, original, ((x, y),) in zip(item["masks"], originals, item["input_points"].long().tolist(), strict=True):
        assert mask[y, x] == 1
        # Twice as long and wide.
        assert mask.sum() == 4 * original.sum()


def test_of_many_instances_the_same_ten_are_asked_for(tmp_path):
    for name in ("a", "b"):
        write_cells(tmp_path, name, 24)
    write_list(tmp_path, "test", ["a", "b"])
    images = InstanceDataset(tmp_path, "test", size=96)
    first, second = (images[index]["input_boxes"] for index in (0, 1))
    assert len(first) == len(second) == MOST_INSTANCES
    assert not torch.equal(first, second)
    again = InstanceDataset(tmp_path, "test", size=96, seed=3)
    again.epoch = 2
    assert torch.equal(first, again[0]["input_boxes"])


def test_a_mask_of_specks_is_one_instance(tmp_path):
    write_cells(tmp_path, "a", 0)
    write_list(tmp_path, "test", ["a"])
    images = InstanceDataset(tmp_path, "test", size=96)
    assert images.original_masks(0).sum() == images[0]["masks"].sum() == 1


def test_the_encoder_runs_once_for_all_prompts_and_instances(tmp_path, sam):
    write_cells(tmp_path, "a", 3)
    write_list(tmp_path, "test", ["a"])
    tested = Probe("cells instances", InstanceDataset(tmp_path, "test", size=SIZE), ("box", "points"))
    calls = []
    hook = sam.model.vision_encoder.register_forward_hook(lambda *_: calls.append(1))
    watched = Watched(sam.model, sam)
    found = ious(watched, tested, torch.device("cpu"), "off")
    hook.remove()
    watched.close()
    assert calls == [1]
    assert found.keys() == {"cells instances/box", "cells instances/points"} == tested.keys.keys()
    assert all(len(values) == 1 and 0 <= values[0] <= 1 for values in found.values())
    # As its own forward has it.
    item = torch.utils.data.default_collate([tested.data[0]])
    whole = sam.segment(sam.model, {name: item[name] for name in ("pixel_values", "inside", "input_boxes")})
    masks = tested.data.original_masks(0)
    from benchmarks.segmentation.metrics import mean_iou

    assert found["cells instances/box"][0] == pytest.approx(mean_iou(whole[0].detach(), item["inside"][0, 0], masks))


# ---- few shots


def test_fewer_images_of_a_seed_are_those_of_more_and_seeds_differ(folder):
    orders = [drawn_pairs(folder, seed) for seed in range(6)]
    assert len({str(order) for order in orders}) > 1
    assert orders == [drawn_pairs(folder, seed) for seed in range(6)]
    few = MaskDataset(folder, "train", size=32, pairs=orders[1][:2])
    assert few.pairs == orders[1][:2]


def test_a_batch_of_one_image_is_four_forms_of_it(folder):
    one = MaskDataset(folder, "train", size=48, pairs=drawn_pairs(folder, 0)[:1], augment=True)
    draws = Draws(one, 8, seed=0)
    items = [draws[index] for index in range(4)]
    for name in ("pixel_values", "input_boxes", "input_points"):
        assert len({str(item[name].tolist()) for item in items}) == 4
    assert torch.equal(Draws(one, 4, seed=0)[3]["pixel_values"], items[3]["pixel_values"])
    assert not torch.equal(Draws(one, 4, seed=1)[3]["pixel_values"], items[3]["pixel_values"])


def test_draws_take_every_image_before_any_again(folder):
    images = MaskDataset(folder, "train", size=32)
    order = Draws(images, 12, seed=0).order
    assert sorted(order[:5]) == sorted(order[5:10]) == list(range(5))
    assert order[:5] != order[5:10]


def test_flips_and_crops_move_image_and_mask_alike():
    values = np.zeros((40, 48, 3), np.uint8)
    values[8:20, 10:30] = 255
    image, mask = Image.fromarray(values), Image.fromarray(values[..., 0])
    seen = set()
    for seed in range(20):
        found, cut = flipped_and_cropped(np.random.default_rng(seed))(image, mask)
        assert found.size == cut.size
        assert min(found.width / 48, found.height / 40) >= SMALLEST_CROP - 0.02
        assert (np.asarray(found)[..., 0] == np.asarray(cut)).all()
        assert (np.asarray(cut) > 127).sum() >= KEPT * 12 * 20
        seen.add(np.asarray(cut).tobytes())
    assert len(seen) > 15


# ---- states


def trained(model: nn.Module) -> nn.Module:
    """Return the model after a change to all trained weights."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def test_halfway_back_is_half_of_what_lora_adds(sam):
    import copy

    model = peft_methods.apply(copy.deepcopy(sam.model), "lora").eval()
    first = {name: value.clone() for name, value in trained_weights(model).items()}
    last = trained_weights(trained(model))
    half = interpolated(first, last, 0.5)
    for name, value in half.items():
        if ".lora_B." in name:
            other = name.replace(".lora_B.", ".lora_A.")
            torch.testing.assert_close(value @ half[other], last[name] @ last[other] / 2)
        elif "mask_decoder" in name:
            torch.testing.assert_close(value, (first[name] + last[name]) / 2)


@pytest.mark.parametrize("peft", ["lora", "adapter"])
def test_all_the_way_back_is_the_pretrained_model(sam, folder, peft):
    import copy

    model = peft_methods.apply(copy.deepcopy(sam.model), peft).eval()
    states = States(model, 10, wise=(0.0,))
    trained(model)
    item = torch.utils.data.default_collate([MaskDataset(folder, "test", size=SIZE)[0]])
    batch = {name: item[name] for name in ("pixel_values", "inside", "input_boxes")}
    with torch.no_grad():
        outputs = {name: sam.segment(model, batch) for name in states}
        expected = sam.segment(sam.model, batch)
    assert list(outputs) == ["wise 0", "last"] == states.names
    torch.testing.assert_close(outputs["wise 0"], expected)
    assert (outputs["last"] - expected).abs().max() > 0.1


def test_states_along_the_run_and_their_mean():
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    states = States(model, 4, fractions=(0.25, 0.5, 1), ema=0.5)
    for step in range(4):
        nn.init.constant_(model.weight, step + 1.0)
        states.after(step + 1)
    seen = {name: model.weight.item() for name in states}
    # ((((0 + 1) / 2 + 2) / 2 + 3) / 2 + 4) / 2.
    assert seen == {"0.25": 1, "0.5": 2, "ema 0.5": 3.0625, "last": 4}
    assert list(seen) == states.names
    with pytest.raises(KeyError), swapped(model, {"weight": torch.ones(1, 1)}):
        raise KeyError
    assert model.weight.item() == 4


# ---- the command


SMALL = ("--image-size", str(SIZE), "--test-images", "2", "--batch-size", "2", "--device", "cpu", "--amp", "off")
SMALL = (*SMALL, "--workers", "0", "--peft", "lora", "--distiller", "none", "--seeds", "1", "--steps", "2")


def run_command(*words):
    return command.main([str(word) for word in words])


def left(*words):
    return Grid(tyro.cli(Options, args=[str(word) for word in words])).todo()


def test_other_tests_states_and_rates_are_results_of_a_run(folder, tmp_path, capsys):
    cells = tmp_path / "cells"
    write_cells(cells, "a", 3)
    write_list(cells, "test", ["a"])
    out = tmp_path / "out"
    options = ("--data", folder, "--out", out, *SMALL, "--draw-images", "--augment", "--train-images", 1, 2)
    options = (*options, "--lr", 1e-4, 1e-3, "--also-test", cells, "--instances", "cells", "--prompts", "box", "points")
    options = (*options, "--validation-images", 2, "--save-weights")
    more = ("--corruptions", "jpeg", "--states", 0.5, 1, "--ema", 0.9, "--wise", 0.5)
    assert len(left(*options)) == 5
    assert run_command("run", *options, "--train-images", 1, "--lr", 1e-3, *more) == 0
    found = {row.settings.peft: row for row in rows.read(out)}
    asked = ["data/box", "data/points", "data jpeg/box", "data jpeg/points", "data validation/box"]
    asked += ["cells instances/box", "cells instances/points"]
    assert sorted(found["lora"].also) == sorted(found["zero_shot"].also) == sorted(asked)
    states = ["0.5", "ema 0.9", "wise 0.5", "last"]
    for row, names in ((found["lora"], states), (found["zero_shot"], ["last"])):
        for test, result in row.also.items():
            # Corrupted copies wait for the end.
            assert list(result["iou"]) == [name for name in names if name != "0.5" or "jpeg" not in test]
            assert all(len(values) == len(result["images"]) for values in result["iou"].values())
        assert row.also["data/box"]["iou"]["last"] == pytest.approx(row.metrics["iou"], abs=1e-4)
    assert found["lora"].steps == 2
    assert len(list((out / "weights").glob("*.safetensors"))) == 1
    assert not (out / "cache").exists()

    # Done for fewer tests and states, and not for more; the model as it is serves every recipe.
    fewer = ("--train-images", 1, "--lr", 1e-3, "--states", 0.5)
    assert left(*options, *fewer) == []
    assert left(*options, "--train-images", 1, "--lr", 1e-4, "--states", 0.5)[0].lr == 1e-4
    assert [one.peft for one in left(*options, *fewer, "--wise", 0.75)] == ["lora"]
    assert len(left(*options, *fewer, "--corruptions", "contrast")) == 2
    capsys.readouterr()
    assert run_command("plan", *options) == 0
    assert "3 runs" in capsys.readouterr().out

    # What the last weights can tell takes no training: the run keeps its history and earlier results.
    wiser = (*options, *fewer, "--wise", 0.75, "--peft", "lora")
    assert run_command("run", *wiser) == 0
    after = {row.settings.peft: row for row in rows.read(out)}["lora"]
    assert after.history == found["lora"].history
    assert after.training_seconds == found["lora"].training_seconds
    for test, result in found["lora"].also.items():
        kept = after.also[test]["iou"]
        assert {state: kept[state] for state in result["iou"]} == result["iou"]
        assert ("wise 0.75" in kept) == ("jpeg" not in test)
    # As a new training would have it, and the row's own test images too.
    assert after.metrics == found["lora"].metrics
    # More than the weights can tell would lose what is there.
    capsys.readouterr()
    assert run_command("run", *options, *fewer, "--states", 0.25) == 2
    assert "must be asked for all results that it has, got a command without data/box, 0.5" in capsys.readouterr().err


def test_a_part_of_the_few_is_kept_for_validation(folder, tmp_path):
    options = ("--data", folder, "--out", tmp_path, *SMALL, "--draw-images", "--train-images", 4)
    grid = Grid(tyro.cli(Options, args=list(map(str, (*options, "--validation-images", 1, "--validation", "few")))))
    run = grid.runs[-1]
    (validation,) = [one for one in grid.data.tested(run) if one.name == "data validation"]
    trained_on = grid.data.of(run).train
    assert len(trained_on) == 3
    assert [*trained_on.pairs, *validation.data.pairs] == drawn_pairs(folder, 0)[:4]
    assert run.held_out == 1
    assert not validation.data.training


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--epochs", 1), "--steps must stand without --epochs, got 2 and 1; leave one out"),
        (("--instances", "cells"), "--instances must name folders of --also-test, got cells; add it there"),
        (("--states", 0), "--states must lie in 0 to 1, got 0; choose another"),
        (("--share", 11), "--share must lie in 0 to 10, got 11; choose another"),
        (("--validation-images", 1), "--validation-images must find val.csv or training images that are not trained"),
        (("--validation-images", 1, "--validation", "few"), "--validation few must leave drawn images to train on"),
        (("--also-test", "a/b", "c/b"), "--also-test must name folders of different names, got b, b"),
        (("--also-images", -1), "--also-images must not be negative, got -1"),
    ],
)
def test_bad_options_end_with_a_sentence(folder, tmp_path, capsys, words, said):
    assert run_command("run", "--data", folder, "--out", tmp_path, *SMALL, *words) == 2
    assert said in capsys.readouterr().err


def test_files_of_earlier_runs_keep_their_names():
    paths = sorted((RESULTS / "segmentation").rglob("*.json"))
    assert len(paths) > 100
    assert [row.settings.file_name for row in rows.read(RESULTS / "segmentation")] == [path.name for path in paths]
