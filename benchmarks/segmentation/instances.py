"""Images whose mask holds many objects: a box and a point for each, by connected components."""

from __future__ import annotations

import zlib
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from benchmarks.sam.data import box_around, decoded, on_canvas, point_inside
from benchmarks.segmentation.data import Item, MaskDataset

MOST_INSTANCES = 10
# In the file: a component of fewer pixels is a slip of the annotation as often as an object.
FEWEST_PIXELS = 16


class Instances(NamedTuple):
    """The same instances twice.

    Attributes:
        original: ``[p, H, W]`` at the size of the mask's file.
        scaled: ``[p, h, w]`` at the size of the prepared image without its padding.

    """

    original: NDArray[np.bool_]
    scaled: NDArray[np.bool_]


class InstanceDataset(MaskDataset):
    """Test images with the connected components of their mask as instances, at most ten an image.

    Items are those of :class:`MaskDataset` with ``p`` masks, boxes and points in place of one: the tight box of each
    component and its point farthest from the outline. One run of the encoder serves all of them. Of more than ten the
    image's name draws, so that small objects count as often as large ones. Objects that touch are one component. A mask
    without a component of sixteen pixels is one instance as a whole.
    """

    def item(self, index: int, seeds: object) -> Item:
        """Return an item; nothing in it is random."""
        item = super().item(index, [0])
        masks = self._instances(index).scaled
        boxes = np.stack([box_around(mask, None) for mask in masks])
        points = np.stack([point_inside(mask, None)[None] for mask in masks])
        return {
            **item,
            "masks": on_canvas(masks, self.size),
            "input_boxes": torch.from_numpy(boxes),
            "input_points": torch.from_numpy(points),
            "input_labels": torch.ones(len(masks), 1).long(),
        }

    def original_masks(self, index: int) -> NDArray[np.bool_]:
        """Return the masks ``[p, H, W]`` of the instances."""
        return self._instances(index).original

    def _instances(self, index: int) -> Instances:
        mask = np.asarray(decoded(self.pairs[index][1], "L")) > 127
        labels, count = ndimage.label(mask)
        scaled = _scaled(labels, self.size)
        pixels = np.bincount(labels.ravel(), minlength=count + 1)
        # One may have no pixel left where the input is smaller than the file.
        left = set(np.unique(scaled).tolist())
        usable = [label for label in range(1, count + 1) if pixels[label] >= FEWEST_PIXELS and label in left]
        if not usable:
            return Instances(mask[None], (scaled > 0)[None])
        if len(usable) > MOST_INSTANCES:
            rng = np.random.default_rng(zlib.crc32(self.sample_id(index).encode()))
            usable = sorted(rng.choice(usable, MOST_INSTANCES, replace=False).tolist())
        chosen = np.array(usable)[:, None, None]
        return Instances(labels == chosen, scaled == chosen)


def _scaled(labels: NDArray[np.int32], size: int) -> NDArray[np.int32]:
    """Return labels as the image processor scales masks: the longest side to ``size``, the nearest pixel."""
    longest = max(labels.shape)
    rows, columns = (
        ((np.arange(int(size * side / longest + 0.5)) + 0.5) * side / int(size * side / longest + 0.5)).astype(int)
        for side in labels.shape
    )
    return labels[np.ix_(rows, columns)]
