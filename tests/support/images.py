"""Images with masks, in a folder as the example and the benchmark of segmentation read them."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image


def ring(width: int, height: int) -> np.ndarray:
    """Return a thick ring with a gap, off the centre."""
    rows, columns = np.mgrid[:height, :width]
    radius = np.hypot((columns - 0.45 * width) / width, (rows - 0.55 * height) / height)
    return (radius > 0.15) & (radius < 0.35) & ~((columns > 0.6 * width) & (abs(rows - 0.55 * height) < 2))


def write_pair(
    folder: Path, name: str, *, size: tuple[int, int] = (48, 40), mask_size: tuple[int, int] | None = None
) -> None:
    """Write a noisy image with smooth parts, and a ring as 1-bit mask."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    for subfolder in ("images", "masks"):
        (folder / subfolder).mkdir(parents=True, exist_ok=True)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    noise = rng.integers(-9, 10, (size[1], size[0], 3))
    image = np.clip(np.asarray(coarse) + noise, 0, 255).astype(np.uint8)
    Image.fromarray(image).save(folder / f"images/{name}.png")
    Image.fromarray(ring(*(mask_size or size))).save(folder / f"masks/{name}.png")


def write_list(folder: Path, split: str, names: list[str]) -> None:
    rows = [f"images/{name}.png,masks/{name}.png" for name in names]
    (folder / f"{split}.csv").write_text("\n".join(["image,label", *rows, ""]))


def write_folder(root: Path, write: Callable[[Path, str], None] = write_pair) -> Path:
    """Write five training and three test images with their lists, and return their folder."""
    for split, count in (("train", 5), ("test", 3)):
        names = [f"{split}{index}" for index in range(count)]
        for name in names:
            write(root, name)
        write_list(root, split, names)
    return root
