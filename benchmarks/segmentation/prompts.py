"""Which of its prompts a batch is run with."""

from __future__ import annotations

import numpy as np

from benchmarks.segmentation.models import Batch
from benchmarks.segmentation.settings import Settings


def with_prompt(batch: Batch, prompt: str) -> Batch:
    """Return the batch with its boxes or its points alone."""
    other = ("input_points", "input_labels") if prompt == "box" else ("input_boxes",)
    return {name: value for name, value in batch.items() if name not in other}


def with_one_prompt(batch: Batch, settings: Settings, step: int) -> Batch:
    """Return a training batch with one kind of prompt: a box or a point at even odds, the same for every method."""
    if settings.prompt == "points":
        return with_prompt(batch, "points")
    points = np.random.default_rng([settings.seed, step]).random() < 0.5
    return with_prompt(batch, "points" if points else "box")
