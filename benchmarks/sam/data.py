"""Reading a folder with images/, masks/, train.csv and test.csv, and prompts out of masks."""

from __future__ import annotations

import csv
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from torch import Tensor

from benchmarks.torchvision_compat import ensure_importable

# Of ImageNet, as every SAM was trained with.
PIXEL_MEAN = torch.tensor([123.675, 116.28, 103.53])[:, None, None]
PIXEL_STD = torch.tensor([58.395, 57.12, 57.375])[:, None, None]
JITTER = 0.05
# The tag of EXIF.
_ORIENTATION = 0x0112
Change = Callable[[Image.Image, Image.Image], tuple[Image.Image, Image.Image]]


def listed_paths(folder: Path, split: str) -> list[tuple[Path, Path]]:
    """Return the image and mask paths that ``<split>.csv`` lists; whether there are such files is not looked at."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: --data must be a folder with images/, masks/, train.csv and test.csv")
    path = folder / f"{split}.csv"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; list the images there in two columns, image,label")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file, strict=True))
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path}: must be a table in UTF-8, got {error}; save it again as that") from error
    if not rows:
        raise ValueError(f"{path}: must list at least one image, got none; add rows of image,label")
    if not {"image", "label"} <= rows[0].keys():
        raise ValueError(f"{path}: must have the columns image and label, got {', '.join(map(str, rows[0]))}")
    if any(None in row for row in rows):
        raise ValueError(
            f"{path}: must have as many cells as columns in every row, got one with more; quote its commas"
        )
    if any(not row["image"] or not row["label"] for row in rows):
        raise ValueError(f"{path}: must name an image and a label in every row, got one without; complete or remove it")
    return [(folder / row["image"], folder / row["label"]) for row in rows]


def must_exist(path: Path, split: str) -> None:
    """Raise an error that names the file, unless it exists."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: listed in {split}.csv but missing; add it or remove its row")


def prepared_pair(
    image_path: Path, mask_path: Path, size: int, change: Change | None = None
) -> tuple[Tensor, NDArray[np.bool_]]:
    """Return an image as SAM takes it, ``[3, S, S]``, and its foreground ``[h, w]`` without the padding.

    ``change`` takes image and mask as they are in their files, and returns what is prepared in their place.
    """
    image, mask = decoded(image_path, "RGB"), decoded(mask_path, "L")
    turns = [one.info[_ORIENTATION] for one in (image, mask)]
    if turns[0] != turns[1]:
        raise ValueError(
            f"{mask_path}: must be turned as its image {image_path.name} is, got the EXIF orientations {turns[1]} and "
            f"{turns[0]}; save both upright, without EXIF"
        )
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
    if change is not None:
        image, mask = change(image, mask)
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


def decoded(path: Path, mode: str) -> Image.Image:
    """Return an image file as RGB or L, as it is stored; a damaged one is named, or one that is not plain to read."""
    try:
        with Image.open(path) as image:
            fault = _fault(image)
            converted = image.convert(mode)
            converted.info[_ORIENTATION] = image.getexif().get(_ORIENTATION, 1)
    except Exception as error:
        # Its readers raise whatever a damaged file leads them to.
        raise ValueError(f"{path}: must be a readable image, got {error}; replace it or remove its row") from error
    if fault is not None:
        raise ValueError(f"{path}: must be one opaque picture of 8 bits, got {fault}; save it as that")
    return converted


def _fault(image: Image.Image) -> str | None:
    """Return what of a picture a conversion would lose without a word."""
    if image.mode.startswith(("I", "F")):
        return f"mode {image.mode}, whose values above 255 would all be white"
    # Phones add a smaller copy.
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
        return f"{image.n_frames} pictures"
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        darkest, _ = image.convert("RGBA").getchannel("A").getextrema()
        return None if darkest == 255 else f"transparent pixels in mode {image.mode}"
    return None


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
