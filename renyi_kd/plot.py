"""Pictures of relations: the maps over their images, and how their values are spread."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def relation_figure(relations: Mapping[str, Tensor], images: Tensor | None = None) -> Figure:
    """Draw relation maps, a row per sample and a column per title, and below each column the histogram of its values.

    Maps of one row share their colours, and all histograms their axes. So columns can be compared: epochs of a
    training, teacher and student, with and without a term. A relation that collapses shows in rows that are all alike.

    Args:
        relations: from titles to maps ``[s, h, w]`` or, of which the first token is drawn, ``[s, n, h, w]``: what
            :class:`RelationModule` returns. All of one shape.
        images: ``[s, 3, H, W]`` in [0, 1], drawn before the maps.

    Returns:
        A matplotlib figure; ``figure.savefig(path)`` writes it.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: there is no map, or shapes differ.

    >>> maps = torch.nn.functional.normalize(torch.randn(2, 36), dim=1).view(2, 6, 6)
    >>> len(relation_figure({"early": maps, "late": maps.abs()}).axes)
    6

    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "relation_figure: matplotlib must be installed, got none; pip install 'renyi-kd[plot]'"
        ) from error
    maps = {title: _drawable(title, values) for title, values in relations.items()}
    shapes = {tuple(values.shape) for values in maps.values()}
    if len(shapes) != 1:
        raise ValueError(
            f"relation_figure: relations must hold maps of one shape, got {sorted(shapes) or 'none'}; "
            "draw those of one model and batch together"
        )
    n_samples = next(iter(shapes))[0]
    if images is not None and (images.ndim != 4 or len(images) != n_samples or images.shape[1] != 3):
        raise ValueError(
            f"relation_figure: images must have shape [s, 3, H, W] = [{n_samples}, 3, H, W], got "
            f"{tuple(images.shape)}; give one image per sample, also where samples share it"
        )
    before = 0 if images is None else 1
    n_columns = before + len(maps)
    figure = Figure(figsize=(2.1 * n_columns, 2.1 * n_samples + 1.6), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(n_samples + 1, n_columns, height_ratios=[*[2.1] * n_samples, 1.6])
    bounds = torch.stack(list(maps.values())).abs().amax((0, 2, 3)).clamp_min(1e-12).tolist()
    for row in range(n_samples):
        for column, (title, values) in enumerate(maps.items(), before):
            ax = figure.add_subplot(grid[row, column])
            ax.imshow(values[row].numpy(), cmap="RdBu_r", vmin=-bounds[row], vmax=bounds[row])
            ax.set_axis_off()
            if row == 0:
                ax.set_title(title, fontsize=9)
        if images is not None:
            ax = figure.add_subplot(grid[row, 0])
            ax.imshow(images[row].detach().float().cpu().clamp(0, 1).permute(1, 2, 0).numpy())
            ax.set_axis_off()
    first = None
    for column, values in enumerate(maps.values(), before):
        ax = figure.add_subplot(grid[-1, column], sharex=first, sharey=first)
        ax.hist(values.flatten().numpy(), bins=60, range=(-max(bounds), max(bounds)), density=True, color="0.35")
        ax.set_xlabel("relation", fontsize=8)
        ax.tick_params(labelsize=7, labelleft=first is None)
        first = first or ax
    return figure


def _drawable(title: str, values: Tensor) -> Tensor:
    if not isinstance(values, Tensor) or values.ndim not in (3, 4) or 0 in values.shape:
        fact = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(
            f"relation_figure: relations must be maps [s, h, w] or [s, n, h, w], got {fact} for {title!r}; "
            "pass what relation(image_features, mask_tokens) returns"
        )
    first = values if values.ndim == 3 else values[:, 0]
    return first.detach().float().cpu()
