"""What a command line asks of the comparison."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Literal

import torch

from benchmarks.devices import Amp, best_device
from benchmarks.peft_methods import Method
from benchmarks.segmentation.distillers import DISTILLERS

# Thin and branching: a box says little of a road.
FIVE_POINTS = ("aerial_roads",)
EPOCHS, EPOCHS_OF_POINTS = 10, 20
ON_GPU = torch.cuda.is_available()
Distiller = Literal[DISTILLERS]


@dataclasses.dataclass(frozen=True)
class Options:
    """All combinations of data sets, PEFT methods, distillers and seeds, on one model by one recipe.

    Attributes:
        data: folders with images/, masks/, train.csv, test.csv.
        model: mini, mobile_sam, or a SAM of transformers by name or folder.
        weights: safetensors file of mobile_sam.
        peft: which weights are trained.
        distiller: what is trained with besides the task.
        seeds: how many, from 0.
        epochs: passes over the training images; 10, and 20 with five points, if left out.
        batch_size: images per step.
        lr: peak learning rate.
        train_images: use so many, evenly spaced; 0 for all.
        test_images: likewise.
        image_size: side of the square input in pixels; the model's own if left out.
        five_points: names of the folders that are prompted with five points.
        device: where everything runs.
        amp: autocast.
        workers: processes that load images.
        minutes: stop before the run that would not fit into this time.
        on_bad: at an unusable image, or a run that cannot be done.
        out: folder of the finished runs.
        cache: folder of the teacher's features; inside --out if left out.

    """

    data: tuple[Path, ...]
    model: str = "mini"
    weights: Path | None = None
    peft: tuple[Method, ...] = ("lora",)
    distiller: tuple[Distiller, ...] = ("none", "infosam")
    seeds: int = 3
    epochs: int | None = None
    batch_size: int = 4
    lr: float = 2e-4
    train_images: int = 0
    test_images: int = 0
    image_size: int | None = None
    five_points: tuple[str, ...] = FIVE_POINTS
    device: torch.device = dataclasses.field(default_factory=best_device)
    amp: Amp = "bf16" if ON_GPU else "off"
    workers: int = 4 if ON_GPU else 0
    minutes: float | None = None
    on_bad: Literal["stop", "skip"] = "stop"
    out: Path = Path("runs/segmentation")
    cache: Path | None = None

    def check(self) -> None:
        """Raise a ValueError that names the option, unless all can be used."""
        for option in ("seeds", "batch_size", "epochs", "image_size", "minutes"):
            value = getattr(self, option)
            if value is not None and not value > 0:
                raise ValueError(f"--{option.replace('_', '-')} must be above 0, got {value}; raise it")
        for option in ("train_images", "test_images", "workers"):
            value = getattr(self, option)
            if value < 0:
                raise ValueError(f"--{option.replace('_', '-')} must not be negative, got {value}; leave it out")
        for option in ("peft", "distiller"):
            if not getattr(self, option):
                raise ValueError(f"--{option} must name at least one, got none; leave it out for the default")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"--lr must be a finite number above 0, got {self.lr}; leave it out for 2e-4")
        names = [folder.name for folder in self.data]
        if not names or len(set(names)) < len(names):
            raise ValueError(
                f"--data must name folders of different names, got {', '.join(names) or 'none'}; they name the rows"
            )
