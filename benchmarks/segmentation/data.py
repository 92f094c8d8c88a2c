"""Whole-image masks, with one box and one set of points each, from the folders that benchmarks.sam.data describes."""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torch.utils.data import Dataset

from benchmarks.sam.data import (
    Change,
    box_around,
    decoded,
    listed_paths,
    must_exist,
    on_canvas,
    point_inside,
    prepared_pair,
)
from benchmarks.segmentation.augmentation import flipped_and_cropped

Item = dict[str, Tensor | str]
Pair = tuple[Path, Path]


class MaskDataset(Dataset[Item]):
    """One image with the mask of all its foreground per item, and both kinds of prompt: a batch uses one of them.

    The image is prepared by SAM's image processor: the longest side scaled to S, normalised, then padded with zeros
    below and on the right. All files are decoded once at the start, so that a bad one is named before any training.

    Items hold ``pixel_values [3, S, S]``; ``masks [1, S, S]``, 0 or 1; ``inside [1, S, S]``, 1 where the image is and 0
    in the padding; ``input_boxes [1, 4]``, ``input_points [1, n_points, 2]`` and ``input_labels [1, n_points]``, all 1,
    in pixels of the input; ``sample_id``, the image's path relative to the folder.

    Args:
        folder: with ``<split>.csv``, whose columns image and label hold paths relative to the folder.
        split: "train": a jittered box and random points of the mask, which depend on seed, ``epoch`` and index alone;
            anything else: the tight box and points that depend on the image alone, so that all methods and seeds are
            asked the same.
        size: S.
        limit: at most so many of the images listed, evenly spaced over the list.
        seed: of the prompts in training.
        n_points: one point is the farthest from the outline, more are spread over the inner half of the mask.
        pairs: image and mask files to use in place of those that ``<split>.csv`` lists.
        augment: in training, flip and crop every image at random.
        on_bad: "stop" at the first bad pair, or "skip" it and keep the reason in ``skipped``.

    Raises:
        FileNotFoundError: the folder, its csv or (with "stop") a file listed there is missing.
        ValueError: an argument is out of range, the csv is wrong or nothing is left; with "stop" also if an image
            cannot be read, or a mask has another size than its image or no foreground.

    """

    def __init__(
        self,
        folder: Path,
        split: str,
        *,
        size: int,
        limit: int | None = None,
        seed: int = 0,
        n_points: int = 1,
        pairs: Sequence[Pair] | None = None,
        augment: bool = False,
        on_bad: Literal["stop", "skip"] = "stop",
    ) -> None:
        for name, value in (("size", size), ("limit", limit), ("n_points", n_points)):
            if value is not None and value < 1:
                raise ValueError(f"MaskDataset: {name} must be at least 1, got {value}; raise it")
        if on_bad not in ("stop", "skip"):
            raise ValueError(f"MaskDataset: on_bad must be 'stop' or 'skip', got {on_bad!r}; choose one")
        self.folder, self.training, self.augment = folder, split == "train", augment
        self.size, self.seed, self.n_points, self.epoch = size, seed, n_points, 0
        self.pairs: list[Pair] = []
        self.skipped: list[str] = []
        for pair in evenly_spaced(listed_paths(folder, split) if pairs is None else list(pairs), limit):
            error = fault(pair, split, size)
            if error is None:
                self.pairs.append(pair)
            elif on_bad == "stop":
                raise error
            else:
                self.skipped.append(str(error))
        if not self.pairs:
            raise ValueError(
                f"{folder}: {split}.csv must list at least one good pair, got {len(self.skipped)} bad ones; mend them, "
                f"the first is {self.skipped[0]}"
            )

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Item:
        return self.item(index, [self.seed, self.epoch, index])

    def item(self, index: int, seeds: Sequence[int]) -> Item:
        """Return an item whose augmentation and training prompts depend on ``seeds`` alone."""
        rng, sample_id = np.random.default_rng(seeds), self.sample_id(index)
        change = flipped_and_cropped(rng) if self.training and self.augment else self.change(sample_id)
        pixels, mask = pair_with_foreground(self.pairs[index], self.size, change)
        if self.training:
            box, points = box_around(mask, rng), drawn(np.argwhere(mask), self.n_points, rng)
        else:
            box, points = box_around(mask, None), fixed_points(mask, self.n_points, sample_id)
        return {
            "pixel_values": pixels,
            "masks": on_canvas(mask[None], self.size),
            "inside": on_canvas(np.ones_like(mask[None]), self.size),
            "input_boxes": torch.from_numpy(box)[None],
            "input_points": torch.from_numpy(points)[None],
            "input_labels": torch.ones(1, self.n_points).long(),
            "sample_id": sample_id,
        }

    def sample_id(self, index: int) -> str:
        """Return the path of an image relative to the folder."""
        return Path(os.path.relpath(self.pairs[index][0], self.folder)).as_posix()

    @property
    def sample_ids(self) -> list[str]:
        """Names of all images in their order."""
        return [self.sample_id(index) for index in range(len(self))]

    def change(self, sample_id: str) -> Change | None:
        """Return what is done to an image before it is prepared, outside of training."""
        return None

    def original_masks(self, index: int) -> NDArray[np.bool_]:
        """Return the masks ``[p, H, W]`` that the prompts of an item ask for, at the size of the file."""
        return self.original_mask(index)[None]

    def original_mask(self, index: int) -> NDArray[np.bool_]:
        """Return the mask ``[H, W]`` at the size of its file."""
        return np.asarray(decoded(self.pairs[index][1], "L")) > 127


def evenly_spaced(pairs: list[Pair], limit: int | None) -> list[Pair]:
    """Return at most ``limit`` of the pairs, evenly spaced and starting with the first."""
    count = len(pairs) if limit is None else min(limit, len(pairs))
    return [pairs[index * len(pairs) // count] for index in range(count)]


def fault(pair: Pair, split: str, size: int) -> FileNotFoundError | ValueError | None:
    """Return what is wrong with a pair of files, if anything."""
    try:
        for path in pair:
            must_exist(path, split)
        pair_with_foreground(pair, size)
    except (FileNotFoundError, ValueError) as error:
        return error
    return None


def pair_with_foreground(pair: Pair, size: int, change: Change | None = None) -> tuple[Tensor, NDArray[np.bool_]]:
    """Return an image and its mask as :func:`prepared_pair` does; a mask without foreground is named."""
    pixels, mask = prepared_pair(*pair, size, change)
    if not mask.any():
        raise ValueError(
            f"{pair[1]}: must have foreground, got no pixel above 127 at {size} px; store foreground as 255, scale "
            "to more pixels, or remove its row"
        )
    return pixels, mask


def drawn(pixels: NDArray[np.int64], count: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Return ``count`` points (x, y) from pixels (row, column), none twice unless there are too few."""
    return rng.choice(pixels, count, replace=len(pixels) < count)[:, ::-1].astype(np.float32)


def fixed_points(mask: NDArray[np.bool_], count: int, sample_id: str) -> NDArray[np.float32]:
    """Return ``count`` points (x, y) of the mask that are the same whenever and by whomever they are asked for.

    Several points start with one of the inner half of the mask, drawn by the sample's name; each further one is the
    pixel of that half farthest from all before. The outer half would put them into corners of the outline.
    """
    if count == 1:
        return point_inside(mask, None)[None]
    depth = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    inner = np.argwhere(depth >= np.median(depth[mask]))
    # Not Python's hash, which differs from run to run.
    points = drawn(inner, 1, np.random.default_rng(zlib.crc32(sample_id.encode())))
    distance = np.full(len(inner), np.inf)
    while len(points) < count:
        distance = np.minimum(distance, np.square(inner - points[-1, ::-1]).sum(1))
        points = np.concatenate([points, inner[distance.argmax(), None, ::-1].astype(np.float32)])
    return points
