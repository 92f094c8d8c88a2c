"""The example as its users run it: on good input with every option, and on bad input."""

from __future__ import annotations

import csv
import dataclasses
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from benchmarks import files
from benchmarks.mini_sam import pretrain
from benchmarks.sam import data, models
from examples import finetune
from tests.support.images import write_folder
from tests.support.models import DIM, IMAGE_SIZE, hf_sam, meta_sam

EXAMPLES = Path(__file__).parent.parent / "examples"
RUN_FILES = {"metrics.csv", "comparison.png", "relation.safetensors"}


def write_pair(
    folder: Path, name: str, *, size: tuple[int, int] = (48, 40), mask_size: tuple[int, int] | None = None
) -> None:
    """Write an image of two bright squares, and their union as mask."""
    rng = np.random.default_rng(sum(map(ord, name)))
    for subfolder in ("images", "masks"):
        (folder / subfolder).mkdir(parents=True, exist_ok=True)
    mask = np.zeros(size[::-1], np.uint8)
    mask[4:14, 5:17] = mask[22:34, 24:40] = 255
    image = rng.integers(0, 60, (*mask.shape, 3)) + mask[..., None] // 2
    Image.fromarray(image.astype(np.uint8)).save(folder / f"images/{name}.png")
    Image.fromarray(mask).resize(mask_size or size).save(folder / f"masks/{name}.png")


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "data", write_pair)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    hf_sam().save_pretrained(path)
    return path


def run(folder: Path, tiny_model: Path, out: Path, *options: str) -> None:
    """Run the example on the tiny model, two steps per epoch."""
    few = ["--epochs", "2", "--batch-size", "2", "--prompts", "2", "--lr", "0.01", "--device", "cpu"]
    finetune.main(["--model", str(tiny_model), "--data", str(folder), "--out", str(out), *few, *options])


def metrics(out: Path) -> list[dict[str, str]]:
    """Return the rows of a run's metrics.csv."""
    with (out / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# good input


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--peft", "adapter", "--prompt", "point"),
        ("--peft", "bitfit", "--lambda-r", "0.3", "--lambda-d", "3", "--alpha", "1.5"),
        ("--peft", "decoder", "--amp", "bf16", "--image-size", "48"),
    ],
    ids=" ".join,
)
def test_a_run_writes_everything_whole_and_reports_it(folder, tiny_model, tmp_path, capsys, options):
    out = tmp_path / "out"
    run(folder, tiny_model, out, *options)
    peft = options[1] if "--peft" in options else "lora"
    assert {path.name for path in out.iterdir()} == RUN_FILES | {f"{peft}.safetensors", f"{peft}_infosam.safetensors"}
    rows = metrics(out)
    assert [row["run"] for row in rows] == ["zero-shot"] + ["PEFT"] * 4 + ["PEFT + InfoSAM"] * 4
    with_infosam = rows[5:]
    assert all(float(row["compression"]) < 0 for row in with_infosam)
    assert len({row["compression"] for row in with_infosam}) == 4
    assert len({row["distillation"] for row in with_infosam}) == 4
    # The first step differs by the loss alone: same weights, same images, same prompts.
    assert rows[1]["task_loss"] == rows[5]["task_loss"]
    assert rows[-1]["task_loss"] != rows[4]["task_loss"]
    printed = capsys.readouterr().out
    for row in (rows[0], rows[4], rows[8]):
        assert f"{row['run']:<16}{float(row['iou']):>8.3f}{float(row['dice']):>8.3f}" in printed
    with Image.open(out / "comparison.png") as picture:
        assert picture.size[0] > picture.size[1]


@pytest.mark.parametrize("peft", ["lora", "adapter", "bitfit", "decoder"])
def test_weights_on_disk_give_back_the_model_and_its_teacher_is_untouched(folder, tiny_model, tmp_path, peft):
    run(folder, tiny_model, tmp_path, "--peft", peft)
    sam = models.load_sam(str(tiny_model), None, None)
    images = data.InstanceDataset(folder, "test", size=sam.image_size)
    before = finetune.evaluate(sam.model, sam, images, finetune.Options())
    torch.manual_seed(0)
    model = models.trainable_copy(sam, peft)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    saved = load_file(tmp_path / f"{peft}_infosam.safetensors")
    assert saved.keys() == trainable
    missing, unexpected = model.load_state_dict(saved, strict=False)
    assert not unexpected
    assert trainable.isdisjoint(missing)
    rows = metrics(tmp_path)
    assert finetune.evaluate(model, sam, images, finetune.Options())["iou"] == pytest.approx(
        float(rows[-1]["iou"]), abs=1e-4
    )
    assert before["iou"] == pytest.approx(float(rows[0]["iou"]), abs=1e-4)


@pytest.mark.parametrize("peft", ["lora", "adapter", "bitfit", "decoder"])
@pytest.mark.parametrize("prompt", ["box", "point"])
def test_models_with_metas_interface_train_too(folder, tiny_model, tmp_path, peft, prompt):
    sam = models.Sam(meta_sam().eval(), models.segment_meta, IMAGE_SIZE, DIM)
    options = finetune.Options(
        str(tiny_model), data=folder, out=tmp_path, epochs=1, peft=peft, prompt=prompt, batch_size=2, prompts=2
    )
    _, train_images, test_images = finetune.setup(options)
    before = {name: value.clone() for name, value in sam.model.state_dict().items()}
    model, infosam_loss, rows = finetune.fine_tune(sam, train_images, options, with_infosam=True)
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["compression"] < 0 for row in rows)
    assert rows[0]["distillation"] != rows[1]["distillation"]
    assert all(torch.equal(value, before[name]) for name, value in sam.model.state_dict().items())
    assert any(parameter.grad is not None for parameter in infosam_loss.parameters())
    trained = {
        name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0
    }
    assert trained
    assert 0 <= finetune.evaluate(model, sam, test_images, options)["iou"] <= 1


def test_the_same_seed_gives_the_same_run(folder, tiny_model, tmp_path):
    def losses(name: str, *options: str) -> list[str]:
        run(folder, tiny_model, tmp_path / name, *options)
        return [row["loss"] for row in metrics(tmp_path / name)]

    assert losses("a") == losses("b")
    assert losses("c", "--seed", "1") != losses("a")


def test_the_default_model_and_images_ship_with_the_example():
    sam = models.load_sam("mini", None, None)
    train = data.InstanceDataset(finetune.NUCLEI, "train", size=sam.image_size)
    test = data.InstanceDataset(finetune.NUCLEI, "test", size=sam.image_size)
    assert len(train) >= 40
    assert len(test) >= 20
    assert train.empty == test.empty == []
    zero_shot = finetune.evaluate(sam.model, sam, test, finetune.Options())
    assert 0.4 < zero_shot["iou"] < 0.9
    listed = {path.name for pair in [*train.pairs, *test.pairs] for path in pair}
    assert listed == {path.name for path in finetune.NUCLEI.glob("*/*")}
    sizes = [path.stat().st_size for path in (EXAMPLES / "assets").rglob("*") if path.is_file()]
    assert sum(sizes) < 10e6
    assert sum(path.stat().st_size for path in models.MINI_SAM.iterdir()) < 8e6
    assert sum(path.stat().st_size for path in finetune.NUCLEI.rglob("*") if path.is_file()) < 2e6


def test_the_mini_sam_can_be_trained_again(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "HELD_OUT_SCENES", 2)
    pretrain.main(["--steps", "2", "--batch-size", "1", "--out", str(tmp_path)])
    written, committed = load_file(tmp_path / "model.safetensors"), load_file(models.MINI_SAM / "model.safetensors")
    assert {name: value.shape for name, value in written.items()} == {n: v.shape for n, v in committed.items()}
    assert all(value.dtype == torch.float16 for value in committed.values() if value.is_floating_point())
    assert models.load_sam(str(tmp_path), None, None).image_size == pretrain.IMAGE_SIZE


@pytest.mark.parametrize("module", ["examples.finetune", "benchmarks.mini_sam.pretrain"])
def test_help_says_what_every_option_does(module):
    command = [sys.executable, "-W", "error", "-m", module, "--help"]
    said = subprocess.run(command, cwd=EXAMPLES.parent, capture_output=True, text=True, check=True).stdout
    options = {finetune.__name__: finetune, pretrain.__name__: pretrain}[module].Options
    for field in dataclasses.fields(options):
        assert f"--{field.name.replace('_', '-')} " in said
    assert "of the optimiser" in said or "order of the entropies" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--steps", "0"), "--steps must be at least 1, got 0; leave it out for 2400"),
        (("--batch-size", "0"), "--batch-size must be at least 1, got 0; leave it out for 4"),
        (("--out", __file__), "--out must be a folder, got the file"),
        (("--device", "abacus"), "abacus"),
    ],
)
def test_bad_options_of_the_training_end_in_one_sentence(tmp_path, capsys, words, said):
    with pytest.raises(SystemExit, match="2"):
        pretrain.main(["--out", str(tmp_path / "new"), *words])
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# data


def test_instances_prompts_and_padding(folder):
    images = data.InstanceDataset(folder, "test", size=96, n_prompts=8)
    item = images[0]
    assert item["pixel_values"].shape == (3, 96, 96)
    assert item["inside"].sum() == 96 * 80
    assert item["input_boxes"].tolist() == [[10, 8, 33, 27], [48, 44, 79, 67]]
    assert item["masks"].sum((1, 2)).tolist() == [24 * 20, 32 * 24]
    assert not item["masks"][:, 80:].any()
    assert (item["pixel_values"][:, 80:] == 0).all()
    points = data.InstanceDataset(folder, "test", size=96, prompt="point")[0]
    for (x, y), mask in zip(points["input_points"][:, 0].tolist(), points["masks"], strict=True):
        assert mask[int(y), int(x)]
        assert not mask[int(y), int(x) - 7 : int(x) + 7].eq(0).any()
    assert points["input_labels"].tolist() == [[1], [1]]


def test_training_prompts_are_random_but_seeded(folder):
    images, again = (data.InstanceDataset(folder, "train", size=96, n_prompts=4, seed=3) for _ in range(2))
    assert torch.equal(images[0]["input_boxes"], again[0]["input_boxes"])
    images.epoch = 1
    assert not torch.equal(images[0]["input_boxes"], again[0]["input_boxes"])
    boxes = images[0]["input_boxes"]
    assert boxes.shape == (4, 4)
    assert (boxes >= 0).all()
    assert (boxes <= 95).all()
    point_images = data.InstanceDataset(folder, "train", size=96, prompt="point")
    item = point_images[1]
    for ((x, y),), mask in zip(item["input_points"].tolist(), item["masks"], strict=True):
        assert mask[int(y), int(x)]


def test_images_without_instances_are_counted(folder):
    Image.new("L", (48, 40)).save(folder / "masks/test1.png")
    images = data.InstanceDataset(folder, "test", size=96)
    assert len(images) == 2
    assert [image.name for image, _ in images.empty] == ["test1.png"]


# bad input


def spoil_listing(folder: Path) -> None:
    (folder / "train.csv").write_text("image,label\n")


def spoil_columns(folder: Path) -> None:
    (folder / "train.csv").write_text("file,mask\nimages/train0.png,masks/train0.png\n")


def spoil_row(folder: Path) -> None:
    (folder / "train.csv").write_text("image,label\nimages/train0.png\n")


def spoil_image(folder: Path) -> None:
    path = folder / "images/train1.png"
    path.write_bytes(path.read_bytes()[:200])


def spoil_masks(folder: Path) -> None:
    for path in folder.glob("masks/train*.png"):
        Image.new("L", (48, 40)).save(path)


@pytest.mark.parametrize(
    ("spoil", "pattern"),
    [
        (shutil.rmtree, r"data: --data must be a folder with images/, masks/"),
        (lambda folder: (folder / "train.csv").unlink(), r"train\.csv: missing; list the images"),
        (spoil_listing, r"train\.csv: must list at least one image, got none"),
        (spoil_columns, r"train\.csv: must have the columns image and label, got file, mask"),
        (spoil_row, r"train\.csv: must name an image and a label in every row"),
        (lambda folder: (folder / "images/train2.png").unlink(), r"train2\.png: listed in train\.csv but missing"),
        (
            lambda folder: write_pair(folder, "train0", mask_size=(24, 20)),
            r"must have the size of its image train0\.png",
        ),
        (spoil_image, r"images/train1\.png: must be a readable image"),
        (spoil_masks, r"must list images with instances, got 5 masks without"),
    ],
    ids=["no folder", "no csv", "empty csv", "columns", "row", "missing file", "mask size", "corrupt", "no instances"],
)
def test_bad_data_ends_in_one_sentence_and_no_files(folder, tiny_model, tmp_path, capsys, spoil, pattern):
    spoil(folder)
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as stop:
        run(folder, tiny_model, out)
    assert stop.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "error: " in message
    assert re.search(pattern, message), message
    assert list(out.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        (("--model", "mobile_sam"), "--weights must name a safetensors file with --model mobile_sam"),
        (("--model", "mobile_sam", "--weights", "no.safetensors"), "no.safetensors: missing; --weights must be"),
        (("--image-size", "33"), "--image-size must be a multiple of 8 px, got 33"),
        (("--epochs", "0"), "--epochs must be at least 1, got 0"),
        (("--alpha", "0"), "alpha must be a number above 0, got 0.0"),
        (("--lr", "-1"), "--lr must be a finite number above 0, got -1.0"),
        (("--device", "abacus"), "abacus"),
        (("--peft", "magic"), "invalid choice 'magic' for argument '--peft'"),
        (("--batch-size", "1", "--prompts", "1"), "--batch-size times --prompts must be at least 2 for InfoSAM"),
        (("--seed", "-1"), "--seed must not be negative, got -1"),
        (("--model", "/no/such/model"), "/no/such/model"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_options_end_in_one_sentence(folder, tiny_model, tmp_path, capsys, options, pattern):
    with pytest.raises(SystemExit) as stop:
        run(folder, tiny_model, tmp_path / "out", *options)
    assert stop.value.code == 2
    assert pattern in capsys.readouterr().err


def test_a_missing_mobile_sam_package_is_named(folder, tiny_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "mobilesam_lite.mobile_sam", None)
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(b"")
    with pytest.raises(SystemExit):
        run(folder, tiny_model, tmp_path / "out", "--model", "mobile_sam", "--weights", str(weights))
    assert "--model mobile_sam needs: pip install mobilesam-lite" in capsys.readouterr().err


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


def test_a_kill_in_the_middle_leaves_only_whole_files(folder, tiny_model, tmp_path):
    out = tmp_path / "out"
    script = [sys.executable, "-m", "examples.finetune", "--epochs", "100000", "--device", "cpu"]
    command = [*script, "--model", str(tiny_model), "--data", str(folder), "--out", str(out)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, cwd=EXAMPLES.parent) as process:
        seen = b""
        while b"PEFT" not in seen or b"step" not in seen:
            piece = process.stderr.read1()
            assert piece, seen.decode()
            seen += piece
        time.sleep(0.2)
        process.send_signal(signal.SIGKILL)
    assert list(out.iterdir()) == []


def test_a_loss_that_is_not_finite_stops_the_run(folder, tiny_model, tmp_path):
    with pytest.raises(RuntimeError, match=r"the loss must be finite, got .* lower --lr"):
        run(folder, tiny_model, tmp_path, "--peft", "decoder", "--lr", "1e30")


def test_image_size_interpolates_the_position_embeddings(tiny_model):
    sam = models.load_sam(str(tiny_model), None, 2 * IMAGE_SIZE)
    assert sam.image_size == 2 * IMAGE_SIZE
    own = models.load_sam(str(tiny_model), None, None).model.vision_encoder.pos_embed
    assert sam.model.vision_encoder.pos_embed.shape[1] == 2 * own.shape[1]
    torch.testing.assert_close(sam.model.vision_encoder.pos_embed.mean(), own.mean(), rtol=0.2, atol=0.05)
