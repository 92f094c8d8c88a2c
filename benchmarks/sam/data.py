"""Images, instance masks and prompts from a folder with images/, masks/, train.csv and test.csv."""

from __future__ import annotations

import csv
import functools
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from scipy import ndimage
from torch import Tensor
from torch.utils.data import Dataset

from benchmarks.torchvision_compat import ensure_importable

Prompt = Literal["box", "point"]
Item = dict[str, Tensor]

# Of ImageNet, as every SAM was trained with.
PIXEL_MEAN = torch.tensor([123.675, 116.28, 103.53])[:, None, None]
PIXEL_STD = torch.tensor([58.395, 57.12, 57.375])[:, None, None]
MIN_PIXELS = 20
JITTER = 0.05


class InstanceDataset(Dataset[Item]):
    """One image per item, with prompts for some of its instances.

    A mask file holds the union of an image's instances: they are its connected components of at least 20 pixels at
    the size of the model's input. The image is prepared by SAM's image processor: its longest side is scaled to the
    model's input, its colours are normalised, and zeros are added below and on the right. All files are decoded once at
    the start, so that a bad one is named before any training.

    Items are dictionaries of tensors, with S the model's input size and p the number of prompts:
    ``pixel_values [3, S, S]``; ``input_boxes [p, 4]`` or ``input_points [p, 1, 2]`` with ``input_labels [p, 1]``, in
    pixels of the input; ``masks [p, S, S]`` and ``inside [1, S, S]``, 1 where the image is and 0 in the padding.

    Args:
        folder: with ``<split>.csv``, whose columns image and label hold paths relative to the folder.
        split: "train": ``n_prompts`` instances drawn at random, with jittered boxes or random points; anything else:
            the first ``n_prompts`` instances, with tight boxes or the point farthest from the outline.
        size: S.
        prompt: "box" or "point".
        n_prompts: instances per item; in training drawn with replacement if the image has fewer.
        limit: at most so many images, the first of the list.
        seed: of the prompts in training; the same for all epochs of the same number.

    Raises:
        FileNotFoundError: the folder, its csv or a file listed there is missing.
        ValueError: the csv lists nothing, an image cannot be read, a mask has another size, or nothing is left.

    """

    def __init__(
        self,
        folder: Path,
        split: str,
        *,
        size: int,
        prompt: Prompt = "box",
        n_prompts: int = 4,
        limit: int | None = None,
        seed: int = 0,
    ) -> None:
        self.training = split == "train"
        self.size, self.prompt, self.n_prompts, self.seed, self.epoch = size, prompt, n_prompts, seed, 0
        self.pairs: list[tuple[Path, Path]] = []
        self.empty: list[Path] = []
        for image_path, mask_path in listed_pairs(folder, split)[:limit]:
            instances = components(prepared_pair(image_path, mask_path, size)[1])
            (self.pairs if instances.max() > 0 else self.empty).append((image_path, mask_path))
        if not self.pairs:
            raise ValueError(
                f"{folder}: {split}.csv must list images with instances, got {len(self.empty)} masks without a "
                f"component of {MIN_PIXELS} pixels above 127 at {size} px; store foreground as 255, or use other data"
            )

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Item:
        pixels, foreground = prepared_pair(*self.pairs[index], self.size)
        instances = components(foreground)
        rng = np.random.default_rng([self.seed, self.epoch, index])
        numbers = np.arange(1, instances.max() + 1)
        if self.training:
            numbers = rng.choice(numbers, self.n_prompts, replace=len(numbers) < self.n_prompts)
        masks = instances == numbers[: self.n_prompts, None, None]
        item = {"pixel_values": pixels, "inside": on_canvas(np.ones_like(foreground[None]), self.size)}
        item["masks"] = on_canvas(masks, self.size)
        jitter = rng if self.training else None
        if self.prompt == "box":
            boxes = np.stack([box_around(mask, jitter) for mask in masks])
            return {**item, "input_boxes": torch.from_numpy(boxes)}
        points = np.stack([point_inside(mask, jitter) for mask in masks])[:, None]
        return {**item, "input_points": torch.from_numpy(points), "input_labels": torch.ones(len(masks), 1).long()}

    def first(self, count: int) -> list[Item]:
        """Return the first items."""
        return [self[index] for index in range(min(count, len(self)))]


def listed_pairs(folder: Path, split: str) -> list[tuple[Path, Path]]:
    """Return the image and mask paths that ``<split>.csv`` lists, all of which exist."""
    pairs = listed_paths(folder, split)
    for pair in pairs:
        for file_path in pair:
            must_exist(file_path, split)
    return pairs


def listed_paths(folder: Path, split: str) -> list[tuple[Path, Path]]:
    """Return the image and mask paths that ``<split>.csv`` lists; whether there are such files is not looked at."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: --data must be a folder with images/, masks/, train.csv and test.csv")
    path = folder / f"{split}.csv"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; list the images there in two columns, image,label")
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise ValueError(f"{path}: must list at least one image, got none; add rows of image,label")
    if not {"image", "label"} <= rows[0].keys():
        raise ValueError(f"{path}: must have the columns image and label, got {', '.join(map(str, rows[0]))}")
    if any(not row["image"] or not row["label"] for row in rows):
        raise ValueError(f"{path}: must name an image and a label in every row, got one without; complete or remove it")
    return [(folder / row["image"], folder / row["label"]) for row in rows]


def must_exist(path: Path, split: str) -> None:
    """Raise an error that names the file, unless it exists."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: listed in {split}.csv but missing; add it or remove its row")


def prepared_pair(image_path: Path, mask_path: Path, size: int) -> tuple[Tensor, NDArray[np.bool_]]:
    """Return an image as SAM takes it, ``[3, S, S]``, and its foreground ``[h, w]`` without the padding."""
    image, mask = decoded(image_path, "RGB"), decoded(mask_path, "L")
    if image.size != mask.size:
        raise ValueError(
            f"{mask_path}: must have the size of its image {image_path.name}, got {mask.size} and {image.size} (width, "
            "height); scale one of them or remove its row"
        )
    if 2 * size * min(image.size) < max(image.size):
        raise ValueError(
            f"{image_path}: must be half a pixel wide and high or more at {size} px, got {image.size} (width, height); "
            "cut it into pieces or remove its row"
        )
    prepared = image_processor(size)(image, segmentation_maps=np.asarray(mask), return_tensors="pt")
    height, width = prepared["reshaped_input_sizes"][0].tolist()
    return prepared["pixel_values"][0], prepared["labels"][0, :height, :width].numpy() > 127


@functools.cache
def image_processor(size: int) -> Any:
    """Return the image processor of transformers' SAM for inputs ``[3, size, size]``; masks have the same size.

    It is the one that runs on Pillow: torchvision's takes other pixels of a mask.
    """
    ensure_importable()
    import transformers

    # The name is new in transformers 5, where the old one became torchvision's.
    make = getattr(transformers, "SamImageProcessorPil", None) or transformers.SamImageProcessor
    longest, canvas = {"longest_edge": size}, {"height": size, "width": size}
    return make(
        size=longest,
        pad_size=canvas,
        mask_size=longest,
        mask_pad_size=canvas,
        do_rescale=False,
        image_mean=PIXEL_MEAN.flatten().tolist(),
        image_std=PIXEL_STD.flatten().tolist(),
    )


def on_canvas(masks: NDArray[np.bool_], size: int) -> Tensor:
    """Return masks ``[p, h, w]`` as 0 and 1 ``[p, S, S]``, padded with zeros as their image is."""
    _, height, width = masks.shape
    return torch.from_numpy(np.pad(masks, ((0, 0), (0, size - height), (0, size - width)))).float()


def components(foreground: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Return the number of the instance of every pixel ``[h, w]``, 0 for background and for specks."""
    labels, _ = ndimage.label(foreground)
    large = np.bincount(labels.ravel()) >= MIN_PIXELS
    large[0] = False
    return np.where(large, np.cumsum(large), 0).astype(np.int32)[labels]


def decoded(path: Path, mode: str) -> Image.Image:
    """Return an image file as RGB or L; a damaged one is named."""
    try:
        with Image.open(path) as image:
            return image.convert(mode)
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{path}: must be a readable image, got {error}; replace it or remove its row") from error


def box_around(mask: NDArray[np.bool_], rng: np.random.Generator | None) -> NDArray[np.float32]:
    """Return the box (left, top, right, bottom) of the outermost pixels; a generator moves its sides by up to 5 %."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = np.array([columns[0], rows[0], columns[-1], rows[-1]], np.float32)
    if rng is None:
        return box
    sides = np.tile(box[2:] - box[:2] + 1, 2)
    moved = box + rng.uniform(-JITTER, JITTER, 4) * sides
    limits = np.array([mask.shape[1], mask.shape[0]] * 2) - 1
    return np.clip(moved, 0, limits).astype(np.float32)


def point_inside(mask: NDArray[np.bool_], rng: np.random.Generator | None) -> NDArray[np.float32]:
    """Return a point (x, y) of the mask: a random one, or without a generator the one farthest from the outline."""
    if rng is None:
        row, column = np.unravel_index(ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1].argmax(), mask.shape)
    else:
        row, column = rng.choice(np.argwhere(mask))
    # Whole pixels, of boxes too: SAM's prompt encoders add the half to the centre themselves.
    return np.array([column, row], np.float32)
