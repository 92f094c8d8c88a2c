"""Image, truth and predictions side by side."""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.sam.data import PIXEL_MEAN, PIXEL_STD, Item
from benchmarks.sam.models import Sam


@torch.no_grad()
def save_comparison(path: Path, sam: Sam, models: dict[str, nn.Module], items: list[Item]) -> None:
    """Write a PNG with a row per item: the image with its prompts, the true masks, and those of each model."""
    titles = ["image and prompts", "truth", *models]
    figure = Figure(figsize=(2.6 * len(titles), 2.75 * len(items)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(items), len(titles), squeeze=False)
    for axes, item in zip(grid, items, strict=True):
        image = ((item["pixel_values"].cpu() * PIXEL_STD + PIXEL_MEAN) / 255).clamp(0, 1)
        inside = item["inside"][0].bool().cpu()
        height, width = int(inside.any(1).sum()), int(inside.any(0).sum())
        batch = {name: value[None] for name, value in item.items()}
        masks = [item["masks"].bool(), *((sam.segment(model, batch) > 0)[0] for model in models.values())]
        shown = [image, *(overlay(image, mask.cpu()) for mask in masks)]
        for ax, picture in zip(axes, shown, strict=True):
            ax.imshow(as_pixels(picture)[:height, :width])
            ax.set_axis_off()
        draw_prompts(axes[0], item)
        for ax, mask in zip(axes[2:], masks[1:], strict=True):
            union, overlap = (masks[0] | mask).sum((-2, -1)), (masks[0] & mask).sum((-2, -1))
            box = {"facecolor": "black", "alpha": 0.6, "pad": 2, "linewidth": 0}
            label = f"IoU {(overlap / union).mean():.2f}"
            ax.text(0.02, 0.02, label, transform=ax.transAxes, color="white", fontsize=9, bbox=box)
    for ax, title in zip(grid[0], titles, strict=True):
        ax.set_title(title, fontsize=11)
    figure.savefig(path, dpi=110, format="png")


def overlay(image: Tensor, masks: Tensor) -> Tensor:
    """Return the image ``[3, S, S]`` with every instance of ``[p, S, S]`` tinted in a colour of its own."""
    result = image * 0.55
    for index, mask in enumerate(masks):
        hue = torch.tensor(COLOURS[index % len(COLOURS)])[:, None, None]
        result = torch.where(mask, 0.35 * image + 0.65 * hue, result)
    return result


def draw_prompts(ax: object, item: Item) -> None:
    """Draw the boxes or points of an item."""
    for left, top, right, bottom in item.get("input_boxes", torch.empty(0, 4)).tolist():
        ax.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor="#ffd92f", linewidth=1))
    for ((x, y),) in item.get("input_points", torch.empty(0, 1, 2)).tolist():
        ax.plot(x, y, marker="+", color="#ffd92f", markersize=7)


def as_pixels(image: Tensor) -> NDArray:
    """Return ``[S, S, 3]`` for matplotlib."""
    return image.permute(1, 2, 0).numpy()


# Told apart with any colour vision, and on dark and bright images alike (Okabe and Ito, 2008).
COLOURS = [
    (0.90, 0.62, 0.0),
    (0.34, 0.71, 0.91),
    (0.0, 0.62, 0.45),
    (0.94, 0.89, 0.26),
    (0.84, 0.37, 0.0),
    (0.8, 0.47, 0.65),
]
