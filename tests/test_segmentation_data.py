"""Images, masks and prompts of the segmentation benchmark: prepared as SAM does, the same for all, and looked at."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from benchmarks.segmentation.data import MaskDataset, fixed_points
from examples import finetune
from tests.support.images import ring, write_folder, write_list, write_pair

MEAN, STD = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "data")


# preprocessing


def triangle_weights(n_in: int, n_out: int) -> np.ndarray:
    """Return the weights ``[n_out, n_in]`` of a bilinear filter that widens with the reduction."""
    scale = n_in / n_out
    centres = (np.arange(n_out) + 0.5) * scale
    distance = abs(np.arange(n_in) + 0.5 - centres[:, None]) / max(scale, 1)
    weights = np.clip(1 - distance, 0, None)
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize("image_size", [(48, 40), (40, 48), (150, 90), (64, 64), (128, 37)])
def test_preprocessing_is_sams(tmp_path, image_size):
    write_pair(tmp_path, "a", size=image_size)
    write_list(tmp_path, "test", ["a"])
    item = MaskDataset(tmp_path, "test", size=64)[0]
    width, height = (int(np.floor(64 * side / max(image_size) + 0.5)) for side in image_size)
    image = np.asarray(Image.open(tmp_path / "images/a.png")).astype(float)
    mask = np.asarray(Image.open(tmp_path / "masks/a.png"))
    rows, columns = triangle_weights(image_size[1], height), triangle_weights(image_size[0], width)
    scaled = np.einsum("yh,xw,hwc->yxc", rows, columns, image)
    expected = np.zeros((64, 64, 3))
    expected[:height, :width] = (scaled - MEAN) / STD
    # Two roundings to grey values, one after each direction.
    np.testing.assert_allclose(item["pixel_values"].permute(1, 2, 0), expected, atol=1.01 / STD.min())
    assert (item["pixel_values"][:, height:] == 0).all()
    assert (item["pixel_values"][:, :, width:] == 0).all()
    nearest = np.ix_(
        ((np.arange(height) + 0.5) * image_size[1] / height).astype(int),
        ((np.arange(width) + 0.5) * image_size[0] / width).astype(int),
    )
    in_canvas = np.zeros((1, 64, 64))
    in_canvas[0, :height, :width] = mask[nearest]
    np.testing.assert_array_equal(item["masks"], in_canvas)
    in_canvas[0, :height, :width] = 1
    np.testing.assert_array_equal(item["inside"], in_canvas)


@pytest.mark.parametrize("image_size", [(128, 25), (25, 128), (128, 27), (64, 64)])
def test_the_example_and_the_comparison_prepare_an_image_alike(tmp_path, image_size):
    # 25 of 128 pixels are 12.5 of 64.
    write_pair(tmp_path, "a", size=image_size)
    Image.new("1", image_size, 1).save(tmp_path / "masks/a.png")
    write_list(tmp_path, "test", ["a"])
    options = finetune.Options(data=tmp_path, device=torch.device("cpu"))
    compared, example = MaskDataset(tmp_path, "test", size=64)[0], finetune.Instances("test", 64, 4, options)[0]
    for name in ("pixel_values", "inside", "masks"):
        assert torch.equal(compared[name], example[name]), name


def test_a_grey_image_and_a_mask_with_soft_edges_are_read(folder):
    Image.new("L", (48, 40), 200).save(folder / "images/test0.png")
    soft = np.zeros((40, 48), np.uint8)
    soft[10:20, 10:20], soft[12:14, 12:14], soft[30:, 30:] = 128, 255, 127
    Image.fromarray(soft).save(folder / "masks/test0.png")
    images = MaskDataset(folder, "test", size=48)
    assert images[0]["pixel_values"][:, 5, 5].tolist() == pytest.approx((200 - MEAN) / STD)
    assert images[0]["masks"].sum() == 100
    assert images[0]["input_boxes"].tolist() == [[10, 10, 19, 19]]


def test_masks_are_evaluated_at_the_size_of_their_file(folder):
    images = MaskDataset(folder, "test", size=32)
    original = images.original_mask(1)
    assert original.dtype == bool
    np.testing.assert_array_equal(original, ring(48, 40))


def test_a_loader_makes_batches_of_the_items(folder):
    batch = next(iter(DataLoader(MaskDataset(folder, "train", size=64, n_points=2), 5)))
    assert {name: tuple(value.shape) for name, value in batch.items() if name != "sample_id"} == {
        "pixel_values": (5, 3, 64, 64),
        "masks": (5, 1, 64, 64),
        "inside": (5, 1, 64, 64),
        "input_boxes": (5, 1, 4),
        "input_points": (5, 1, 2, 2),
        "input_labels": (5, 1, 2),
    }
    assert batch["masks"].dtype == batch["input_boxes"].dtype == batch["input_points"].dtype == torch.float32
    assert batch["input_labels"].dtype == torch.int64
    assert (batch["input_labels"] == 1).all()
    assert batch["sample_id"] == [f"images/train{index}.png" for index in range(5)]


@pytest.mark.parametrize(("limit", "chosen"), [(None, range(5)), (9, range(5)), (3, (0, 1, 3)), (2, (0, 2)), (1, (0,))])
def test_a_limit_takes_images_from_the_whole_list(folder, limit, chosen):
    for seed in (0, 1):
        images = MaskDataset(folder, "train", size=32, limit=limit, seed=seed)
        assert [image.name for image, _ in images.pairs] == [f"train{index}.png" for index in chosen]
        assert len(images) == len(chosen)


# prompts


def tight_box(mask: torch.Tensor) -> list[int]:
    rows, columns = mask.nonzero()[:, -2], mask.nonzero()[:, -1]
    return [columns.min().item(), rows.min().item(), columns.max().item(), rows.max().item()]


def values_at(mask: torch.Tensor, points: torch.Tensor) -> list[float]:
    return [mask[int(y), int(x)].item() for x, y in points.tolist()]


def test_training_boxes_are_moved_by_at_most_five_percent_and_points_lie_in_the_mask(folder):
    images = MaskDataset(folder, "train", size=96, n_points=6)
    moves, points = [], set()
    for images.epoch in range(40):
        for item in (images[0], images[1]):
            box = np.array(tight_box(item["masks"]))
            sides = np.tile(box[2:] - box[:2] + 1, 2)
            moves.append((item["input_boxes"][0].numpy() - box) / sides)
            assert values_at(item["masks"][0], item["input_points"][0]) == [1] * 6
            points |= {tuple(point) for point in item["input_points"][0].tolist()}
    assert 0.045 < np.max(moves) <= 0.05 + 1e-6
    assert -0.05 - 1e-6 <= np.min(moves) < -0.045
    assert len(points) > 400


def test_training_boxes_stay_in_the_image(tmp_path):
    write_pair(tmp_path, "a")
    Image.new("1", (48, 40), 1).save(tmp_path / "masks/a.png")
    write_list(tmp_path, "train", ["a"])
    images = MaskDataset(tmp_path, "train", size=96)
    boxes = []
    for images.epoch in range(20):
        boxes.append(images[0]["input_boxes"][0])
    boxes = torch.stack(boxes)
    assert (boxes.amin(0) == torch.tensor([0, 0, 91.0, 75.0])).sum() >= 2
    assert (boxes >= 0).all()
    assert (boxes <= torch.tensor([95, 79, 95, 79])).all()


def test_training_prompts_depend_on_seed_epoch_and_index_alone(folder):
    # The same pair under two indices.
    write_list(folder, "train", ["train0", "train0"])

    def prompts(seed: int, epoch: int, index: int) -> list:
        images = MaskDataset(folder, "train", size=96, seed=seed, n_points=3)
        images.epoch = epoch
        for _ in range(seed + 1):
            item = images[index]
        torch.manual_seed(epoch)
        return [item["input_boxes"].tolist(), item["input_points"].tolist()]

    cases = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    first = [prompts(*case) for case in cases]
    assert first == [prompts(*case) for case in cases]
    for kind in (0, 1):
        assert len({str(pair[kind]) for pair in first}) == 4


def test_evaluation_prompts_are_the_same_for_every_seed_epoch_and_place(folder, tmp_path):
    moved = folder.rename(tmp_path / "elsewhere")
    for n_points in (1, 5):
        images = MaskDataset(moved, "test", size=96, n_points=n_points)
        for index in range(3):
            item = images[index]
            assert item["input_boxes"].tolist() == [tight_box(item["masks"])]
            assert values_at(item["masks"][0], item["input_points"][0]) == [1] * n_points
            other = MaskDataset(tmp_path / "elsewhere" / ".." / "elsewhere", "test", size=96, n_points=n_points, seed=7)
            other.epoch = 3
            assert torch.equal(item["input_points"], other[index]["input_points"])


def depth_by_hand(mask: np.ndarray) -> np.ndarray:
    """Return each pixel's distance to the nearest that is not of the mask, those outside of the image included."""
    padded = np.pad(mask, 1)
    outside = np.argwhere(~padded)
    pixels = np.argwhere(padded)
    depth = np.zeros(padded.shape)
    for row, column in pixels:
        depth[row, column] = np.sqrt(np.square(outside - (row, column)).sum(1).min())
    return depth[1:-1, 1:-1]


def test_one_evaluation_point_is_the_farthest_from_the_outline(folder):
    item = MaskDataset(folder, "test", size=48)[0]
    depth = depth_by_hand(item["masks"][0, :40].bool().numpy())
    x, y = item["input_points"][0, 0].long().tolist()
    assert depth[y, x] == depth.max()


@pytest.mark.parametrize("mask", [ring(48, 40), ring(48, 40)[14:, :28]], ids=["inside", "cut by the border"])
@pytest.mark.parametrize("sample_id", ["images/a.png", "images/b.png"])
def test_several_evaluation_points_are_spread_over_the_inner_half(sample_id, mask):
    depth = depth_by_hand(mask)
    inner = np.argwhere(depth >= np.median(depth[mask])).tolist()
    expected = [np.random.default_rng(zlib.crc32(sample_id.encode())).choice(inner).tolist()]
    for _ in range(4):
        distances = [min((r - a) ** 2 + (c - b) ** 2 for a, b in expected) for r, c in inner]
        expected.append(inner[distances.index(max(distances))])
    points = fixed_points(mask, 5, sample_id)
    assert points[:, ::-1].astype(int).tolist() == expected
    gaps = np.hypot(*(points[:, None] - points).transpose(2, 0, 1))[np.triu_indices(5, 1)]
    assert gaps.min() > 5


def test_images_of_the_same_mask_get_points_of_their_own(folder):
    images = MaskDataset(folder, "test", size=48, n_points=5)
    assert len({str(images[index]["input_points"].tolist()) for index in range(3)}) == 3


def test_training_points_of_one_image_are_distinct(folder):
    Image.fromarray(np.pad(np.ones((2, 3), bool), ((5, 33), (7, 38)))).save(folder / "masks/train0.png")
    points = MaskDataset(folder, "train", size=48, n_points=6)[0]["input_points"][0]
    assert sorted(points.tolist()) == [[x, y] for x in (7, 8, 9) for y in (5, 6)]


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_mask_of_fewer_pixels_than_points_repeats_them(folder, split):
    Image.fromarray(np.pad(np.ones((1, 2), bool), ((5, 34), (7, 39)))).save(folder / f"masks/{split}0.png")
    item = MaskDataset(folder, split, size=48, n_points=5)[0]
    assert item["input_points"].shape == (1, 5, 2)
    assert values_at(item["masks"][0], item["input_points"][0]) == [1] * 5


# bad input


def without_foreground(folder: Path) -> None:
    Image.new("L", (48, 40), 1).save(folder / "masks/train1.png")


def thinner_than_a_pixel(folder: Path) -> None:
    Image.fromarray(np.pad(np.ones((1, 1), bool), ((0, 39), (0, 47)))).save(folder / "masks/train1.png")


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


PAIRS = {
    "image missing": (lambda f: (f / "images/train1.png").unlink(), r"images/train1\.png: listed in train\.csv but"),
    "mask missing": (lambda f: (f / "masks/train1.png").unlink(), r"masks/train1\.png: listed in train\.csv but"),
    "image cut off": (lambda f: cut_off(f / "images/train1.png"), r"images/train1\.png: must be a readable image"),
    "not an image": (lambda f: (f / "images/train1.png").write_text("no"), r"train1\.png: must be a readable image"),
    "mask cut off": (lambda f: cut_off(f / "masks/train1.png"), r"masks/train1\.png: must be a readable image"),
    "sizes differ": (
        lambda f: write_pair(f, "train1", mask_size=(24, 20)),
        r"masks/train1\.png: must have the size of its image train1\.png, got \(24, 20\) and \(48, 40\) .*; scale one",
    ),
    "a line": (
        lambda f: write_pair(f, "train1", size=(65, 2)),
        r"images/train1\.png: must be half a pixel wide and high or more at 16 px, got \(65, 2\) .*; cut it into",
    ),
    "no foreground": (
        without_foreground,
        r"masks/train1\.png: must have foreground, got no pixel above 127 at 16 px; store foreground as 255",
    ),
    "foreground too small": (thinner_than_a_pixel, r"masks/train1\.png: must have foreground, .* scale to more pixels"),
}
each_bad_pair = pytest.mark.parametrize(("spoil", "pattern"), PAIRS.values(), ids=PAIRS)


@each_bad_pair
def test_a_bad_pair_stops_with_its_name_and_a_way_out(folder, spoil, pattern):
    spoil(folder)
    with pytest.raises((FileNotFoundError, ValueError), match=pattern):
        MaskDataset(folder, "train", size=16)


@each_bad_pair
def test_a_bad_pair_is_skipped_with_its_reason_on_request(folder, spoil, pattern):
    spoil(folder)
    images = MaskDataset(folder, "train", size=16, on_bad="skip")
    assert [image.name for image, _ in images.pairs] == [f"train{index}.png" for index in (0, 2, 3, 4)]
    (reason,) = images.skipped
    with pytest.raises(ValueError, match=pattern):
        raise ValueError(reason)
    assert [images[index]["sample_id"][-5] for index in range(4)] == ["0", "2", "3", "4"]


def test_good_data_skips_nothing(folder):
    assert MaskDataset(folder, "train", size=16, on_bad="skip").skipped == []


LISTS = {
    "missing": (None, r"train\.csv: missing; list the images there in two columns"),
    "empty": ("", r"train\.csv: must list at least one image, got none"),
    "columns only": ("image,label\n", r"train\.csv: must list at least one image, got none"),
    "columns": ("file,mask\nimages/train0.png,masks/train0.png\n", r"must have the columns image and label, got file"),
    "row": ("image,label\nimages/train0.png\n", r"must name an image and a label in every row, got one without"),
}


@pytest.mark.parametrize("on_bad", ["stop", "skip"])
@pytest.mark.parametrize(("text", "pattern"), LISTS.values(), ids=LISTS)
def test_a_wrong_list_always_stops(folder, text, pattern, on_bad):
    (folder / "train.csv").unlink()
    if text is not None:
        (folder / "train.csv").write_text(text)
    with pytest.raises((FileNotFoundError, ValueError), match=pattern):
        MaskDataset(folder, "train", size=16, on_bad=on_bad)


@pytest.mark.parametrize("on_bad", ["stop", "skip"])
def test_a_missing_folder_always_stops(tmp_path, on_bad):
    with pytest.raises(FileNotFoundError, match="nowhere: --data must be a folder with images/, masks/"):
        MaskDataset(tmp_path / "nowhere", "train", size=16, on_bad=on_bad)


def test_nothing_left_stops(folder):
    for path in folder.glob("images/train*.png"):
        path.unlink()
    with pytest.raises(
        ValueError, match=r"train\.csv must list at least one good pair, got 5 bad ones; mend them, .*train0\.png: lis"
    ):
        MaskDataset(folder, "train", size=16, on_bad="skip")


@pytest.mark.parametrize(
    ("argument", "value", "pattern"),
    [
        ("size", 0, "MaskDataset: size must be at least 1, got 0; raise it"),
        ("limit", 0, "MaskDataset: limit must be at least 1, got 0; raise it"),
        ("n_points", -1, "MaskDataset: n_points must be at least 1, got -1; raise it"),
        ("on_bad", "ignore", "MaskDataset: on_bad must be 'stop' or 'skip', got 'ignore'; choose one"),
    ],
)
def test_arguments_out_of_range_are_refused(folder, argument, value, pattern):
    with pytest.raises(ValueError, match=pattern):
        MaskDataset(folder, "train", **{"size": 16, argument: value})
