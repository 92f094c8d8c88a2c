"""The example as its users run it: on good input with every option, and on bad input."""

from __future__ import annotations

import ast
import csv
import dataclasses
import math
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
import transformers
from PIL import Image
from safetensors.torch import load_file

from benchmarks.sam.models import MINI_SAM
from examples import finetune
from renyi_kd import InfoSAMLoss
from tests.support.command_line import help_of
from tests.support.families import hf_sam2, hf_sam_hq
from tests.support.images import write_folder
from tests.support.models import DIM, hf_sam

ROOT = Path(__file__).parent.parent
# What those who install the example do not need, since they have no torchvision.
LAUNCHER = (sys.executable, "-m", "benchmarks.torchvision_compat", "examples.finetune")
CPU = torch.device("cpu")
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


def instances(folder: Path, split: str, size: int, n_boxes: int = 32, **options: object) -> finetune.Instances:
    """Return the images of a split."""
    return finetune.Instances(split, size, n_boxes, finetune.Options(data=folder, device=CPU, **options))


def trained(folder: Path, model: Path, out: Path) -> list[dict[str, float]]:
    """Return the rows of a short training with InfoSAM."""
    options = finetune.Options(str(model), data=folder, out=out, epochs=1, batch_size=2, prompts=2, device=CPU)
    sam, infosam_loss, train, _ = finetune.setup(options)
    return finetune.fine_tune("PEFT + InfoSAM", sam, train, [], options, infosam_loss)[1]


# good input


def test_it_stands_by_itself():
    tree = ast.parse(Path(finetune.__file__).read_text())
    named = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    named |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {"renyi_kd", "tyro"} <= named
    assert not {name for name in named if name.split(".")[0] in ("benchmarks", "examples", "tests")}


@pytest.mark.parametrize(
    "options",
    [
        ("--figures",),
        ("--peft", "bitfit", "--lambda-r", "0.3", "--lambda-d", "3", "--distillation", "jensen_renyi"),
        ("--peft", "decoder", "--amp", "bf16"),
    ],
    ids=" ".join,
)
def test_a_run_writes_everything_whole_and_reports_it(folder, tiny_model, tmp_path, capsys, options):
    out = tmp_path / "out"
    run(folder, tiny_model, out, *options)
    peft = options[1] if "--peft" in options else "lora"
    figures = {"relations_01.png", "relations_02.png"} if "--figures" in options else set()
    written = RUN_FILES | figures | {f"{peft}.safetensors", f"{peft}_infosam.safetensors"}
    assert {path.name for path in out.iterdir()} == written
    rows = metrics(out)
    assert [row["run"] for row in rows] == ["zero-shot"] + ["PEFT"] * 4 + ["PEFT + InfoSAM"] * 4
    with_infosam = rows[5:]
    assert all(float(row["compression"]) < 0 for row in with_infosam)
    assert len({row["compression"] for row in with_infosam}) == 4
    assert len({row["distillation"] for row in with_infosam}) == 4
    assert all(0 < float(row["mask_tokens_share"]) < math.inf for row in with_infosam)
    if peft != "decoder":
        assert all(0 < float(row["image_features_share"]) < math.inf for row in with_infosam)
    assert all(row["compression"] == row["mask_tokens_share"] == "" for row in rows[:5])
    # The first step differs by the loss alone: same weights, same images, same prompts.
    assert rows[1]["task_loss"] == rows[5]["task_loss"]
    assert rows[1]["loss"] == rows[1]["task_loss"]
    assert rows[5]["loss"] != rows[5]["task_loss"]
    assert rows[-1]["task_loss"] != rows[4]["task_loss"]
    printed = capsys.readouterr().out
    for row in (rows[0], rows[4], rows[8]):
        assert f"{row['run']:<16}{float(row['iou']):>8.3f}{float(row['dice']):>8.3f}" in printed
    for name in {"comparison.png", *figures}:
        with Image.open(out / name) as picture:
            assert min(picture.size) > 400


def test_figures_do_not_change_the_training(folder, tiny_model, tmp_path):
    run(folder, tiny_model, tmp_path / "with", "--figures")
    run(folder, tiny_model, tmp_path / "without")
    with_figures, without = (
        [{**row, "seconds": ""} for row in metrics(tmp_path / name)] for name in ("with", "without")
    )
    assert with_figures == without


@pytest.mark.parametrize("peft", ["lora", "bitfit", "decoder"])
def test_weights_on_disk_give_back_the_model_and_its_teacher_is_untouched(folder, tiny_model, tmp_path, peft):
    run(folder, tiny_model, tmp_path, "--peft", peft)
    options = finetune.Options(str(tiny_model), data=folder, device=CPU, out=tmp_path)
    sam, _, _, images = finetune.setup(options)
    before = finetune.evaluate(sam, images, options)
    torch.manual_seed(0)
    model = finetune.trainable_copy(sam, peft)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    saved = load_file(tmp_path / f"{peft}_infosam.safetensors")
    assert saved.keys() == trainable
    missing, unexpected = model.load_state_dict(saved, strict=False)
    assert not unexpected
    assert trainable.isdisjoint(missing)
    relation = InfoSAMLoss(DIM).relation
    at_start = {name: value.clone() for name, value in relation.state_dict().items()}
    relation.load_state_dict(load_file(tmp_path / "relation.safetensors"), strict=False)
    assert any(not torch.equal(value, at_start[name]) for name, value in relation.state_dict().items())
    rows = metrics(tmp_path)
    assert finetune.evaluate(model, images, options)["iou"] == pytest.approx(float(rows[-1]["iou"]), abs=1e-4)
    assert before["iou"] == pytest.approx(float(rows[0]["iou"]), abs=1e-4)


@pytest.mark.parametrize("make", [hf_sam_hq, hf_sam2])
def test_other_sams_of_transformers_train_too(folder, tmp_path, make):
    make().save_pretrained(tmp_path / "model")
    rows = trained(folder, tmp_path / "model", tmp_path / "out")
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["compression"] < 0 for row in rows)
    assert rows[0]["distillation"] != rows[1]["distillation"]


def test_the_same_seed_gives_the_same_run(folder, tiny_model, tmp_path):
    def losses(name: str, *options: str) -> list[str]:
        run(folder, tiny_model, tmp_path / name, *options)
        return [row["loss"] for row in metrics(tmp_path / name)]

    assert losses("a") == losses("b")
    assert losses("c", "--seed", "1") != losses("a")


def test_the_default_model_and_images_ship_with_the_example():
    options = finetune.Options(device=CPU)
    assert options.model == "mini"
    sam = transformers.SamModel.from_pretrained(MINI_SAM).eval()
    size = sam.config.prompt_encoder_config.image_size
    train, test = instances(options.data, "train", size), instances(options.data, "test", size)
    assert len(train) >= 40
    assert len(test) >= 20
    assert train.n_skipped == test.n_skipped == 0
    assert 0.4 < finetune.evaluate(sam, test, options)["iou"] < 0.9
    listed = {path.name for pair in [*train.pairs, *test.pairs] for path in pair}
    assert listed == {path.name for path in options.data.glob("*/*")}
    sizes = [path.stat().st_size for path in finetune.ASSETS.rglob("*") if path.is_file()]
    assert sum(sizes) < 10e6
    assert sum(path.stat().st_size for path in options.data.rglob("*") if path.is_file()) < 2e6


def test_help_says_what_every_option_does(monkeypatch, capsys):
    said = help_of(finetune, monkeypatch, capsys)
    for field in dataclasses.fields(finetune.Options):
        assert f"--{field.name.replace('_', '-')} " in said or f"--{field.name}," in said
    assert "draw the relations of teacher and student" in said
    assert "where everything runs" in said


# data


def test_instances_boxes_and_padding(folder):
    item = instances(folder, "test", 96, 8)[0]
    assert item["pixel_values"].shape == (3, 96, 96)
    assert item["inside"].sum() == 96 * 80
    assert item["input_boxes"].tolist() == [[10, 8, 33, 27], [48, 44, 79, 67]]
    assert item["masks"].sum((1, 2)).tolist() == [24 * 20, 32 * 24]
    assert not item["masks"][:, 80:].any()
    assert (item["pixel_values"][:, 80:] == 0).all()
    assert instances(folder, "test", 96, 1)[0]["input_boxes"].tolist() == [[10, 8, 33, 27]]


def test_specks_are_no_instances(folder):
    mask = np.zeros((40, 48), np.uint8)
    mask[4:14, 5:17] = mask[30, 30:39] = 255
    Image.fromarray(mask).save(folder / "masks/test0.png")
    # Nine pixels, of which each is one at this size.
    assert instances(folder, "test", 48)[0]["input_boxes"].tolist() == [[5, 4, 16, 13]]


def test_training_boxes_are_random_but_seeded(folder):
    images, again = (instances(folder, "train", 96, 4, seed=3) for _ in range(2))
    assert torch.equal(images[0]["input_boxes"], again[0]["input_boxes"])
    images.epoch = 1
    assert not torch.equal(images[0]["input_boxes"], again[0]["input_boxes"])
    boxes, tight = images[0]["input_boxes"], torch.tensor([[10.0, 8, 33, 27], [48, 44, 79, 67]])
    assert boxes.shape == (4, 4)
    assert (boxes >= 0).all()
    assert (boxes <= 95).all()
    moved = (boxes[:, None] - tight).abs().amax(-1)
    assert 0 < moved.amin(1).max() <= 0.05 * 32
    other = instances(folder, "train", 96, 4, seed=4)
    assert not torch.equal(other[0]["input_boxes"], again[0]["input_boxes"])


def test_images_without_instances_are_counted(folder, tiny_model, tmp_path, capsys):
    Image.new("L", (48, 40)).save(folder / "masks/test1.png")
    assert [image.name for image, _ in instances(folder, "test", 96).pairs] == ["test0.png", "test2.png"]
    run(folder, tiny_model, tmp_path / "out", "--epochs", "1")
    assert "test: 2 images, 1 without instances skipped" in capsys.readouterr().out


def test_a_limit_takes_the_first_of_each_list(folder):
    assert [image.name for image, _ in instances(folder, "test", 96, limit=2).pairs] == ["test0.png", "test1.png"]


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
        (shutil.rmtree, r"train\.csv: missing; --data must be a folder with images/, masks/"),
        (lambda folder: (folder / "train.csv").unlink(), r"train\.csv: missing; --data must be"),
        (spoil_listing, r"train\.csv: must have rows of image,label under that header, got none"),
        (spoil_columns, r"train\.csv: must have rows of image,label under that header, got \{'file': "),
        (spoil_row, r"train\.csv: must have rows of image,label .*'label': None"),
        (lambda folder: (folder / "images/train2.png").unlink(), r"images/train2\.png.* No such file .*remove the row"),
        (
            lambda folder: write_pair(folder, "train0", mask_size=(24, 20)),
            r"masks/train0\.png: must be readable images of one size, .* \(48, 40\) and a mask of \(24, 20\) \(width",
        ),
        (spoil_image, r"images/train1\.png, .*: must be readable images"),
        (
            lambda folder: write_pair(folder, "train1", size=(90, 1)),
            r"images/train1\.png, .*must be readable images of one size, got height and width must be > 0",
        ),
        (spoil_masks, r"must list masks with components of 20 pixels .*, got 5 without one"),
    ],
    ids=[
        *("no folder", "no csv", "empty csv", "columns", "row", "missing file", "mask size", "corrupt", "a line"),
        "no instances",
    ],
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
        (("--epochs", "0"), "--epochs must be at least 1, got 0"),
        (("--limit", "0"), "--limit must be at least 1, got 0"),
        (("--distillation", "magic"), "distillation must be "),
        (("--lambda-d", "nan"), "lambda_d must be "),
        (("--lr", "-1"), "--lr must be at least 0, got -1.0; leave it out"),
        (("--lr", "nan"), "--lr must be at least 0, got nan"),
        (("--device", "abacus"), "abacus"),
        (("--peft", "magic"), "invalid choice 'magic' for argument '--peft'"),
        (
            ("--batch-size", "1", "--prompts", "1"),
            "--batch-size times --prompts must be at least 2: InfoSAM compares samples",
        ),
        (("--seed", "-1"), "--seed must be at least 0, got -1"),
        (("--model", "/no/such/model"), "/no/such/model"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_options_end_in_one_sentence(folder, tiny_model, tmp_path, capsys, options, pattern):
    with pytest.raises(SystemExit) as stop:
        run(folder, tiny_model, tmp_path / "out", *options)
    assert stop.value.code == 2
    assert pattern in capsys.readouterr().err


def test_a_kill_in_the_middle_leaves_only_whole_files(folder, tiny_model, tmp_path):
    out = tmp_path / "out"
    script = [*LAUNCHER, "--epochs", "100000", "--device", "cpu"]
    command = [*script, "--model", str(tiny_model), "--data", str(folder), "--out", str(out)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, cwd=ROOT) as process:
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
