"""Few training images, drawn by the seed, and as many steps on them as asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from benchmarks.sam.data import listed_paths
from benchmarks.segmentation.data import Item, MaskDataset, Pair

# Of a run by steps: its history has as many entries.
QUARTERS = 4


def drawn_pairs(folder: Path, seed: int) -> list[Pair]:
    """Return the pairs of train.csv in an order that the seed draws: fewer images are the first of more."""
    pairs = listed_paths(folder, "train")
    return [pairs[index] for index in np.random.default_rng([seed, len(pairs)]).permutation(len(pairs))]


class Draws(Dataset[Item]):
    """Training images again and again, in a new order each time, every draw with its own flips, crops and prompts.

    A batch of four of a single image is four forms of it: losses over pairs of samples have pairs.

    Args:
        images: of training.
        count: of draws.
        seed: of everything.

    """

    def __init__(self, images: MaskDataset, count: int, seed: int) -> None:
        self.images, self.seed = images, seed
        rng = np.random.default_rng([seed, len(images), 1])
        orders = [rng.permutation(len(images)) for _ in range(-(-count // len(images)))]
        self.order = np.concatenate(orders)[:count].tolist()

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, draw: int) -> Item:
        index = self.order[draw]
        return self.images.item(index, [self.seed, index, draw])
