"""What a command line asks of the comparison."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Literal

import torch

from benchmarks.devices import Amp, best_device
from benchmarks.peft_methods import Method
from benchmarks.segmentation.baselines import BASELINES
from benchmarks.segmentation.corruptions import Corruption
from benchmarks.segmentation.distillers import DISTILLERS
from benchmarks.segmentation.settings import Prompt

# Thin and branching: a box says little of a road.
FIVE_POINTS = ("aerial_roads",)
EPOCHS, EPOCHS_OF_POINTS = 10, 20
ON_GPU = torch.cuda.is_available()
Distiller = Literal[(*DISTILLERS, *BASELINES)]


@dataclasses.dataclass(frozen=True)
class Options:
    """All combinations of data sets, PEFT methods, distillers and seeds, on one model by one recipe.

    Attributes:
        data: folders with images/, masks/, train.csv, test.csv.
        model: mini, mobile_sam, or a SAM of transformers by name or folder.
        weights: safetensors file of mobile_sam.
        peft: which weights are trained.
        distiller: what is trained with besides the task, or what is trained otherwise.
        share: of the task's gradient that a distiller's has, each in a run of its own; 0 for its source's weights.
        seeds: how many, from 0.
        epochs: passes over the training images; 10, and 20 with five points, if left out.
        steps: so many steps, however many images there are; a batch may hold an image several times.
        batch_size: images per step.
        lr: peak learning rate, each in a run of its own.
        train_images: use so many, evenly spaced, each number in a run of its own; 0 for all.
        draw_images: let the seed choose the training images; of fewer images are those of more.
        augment: flip and crop training images at random.
        test_images: use so many, evenly spaced; 0 for all.
        also_test: folders on whose test images every model is tested as well.
        instances: names of those in which every component of a mask is asked for by itself.
        corruptions: of copies of the test images that every model is tested on as well.
        prompts: of these tests and of the test images; only the points where a folder has five.
        also_images: use so many of each folder of --also-test and of each corruption, evenly spaced; 0 for all.
        validation_images: so many are tested on too, to choose a learning rate by.
        validation: of val.csv, or where there is none of the training images that the seed does not draw ("list"); or
            a part of the --train-images, which are then not trained on ("few").
        states: fractions of the steps after which a model is tested too.
        ema: decay of a mean of the weights that is tested too.
        wise: weights of the trained model in means with the pre-trained one that are tested too (WiSE-FT).
        save_weights: keep the trained weights, in the folder weights inside --out.
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
    share: tuple[float, ...] = (0.0,)
    seeds: int = 3
    epochs: int | None = None
    steps: int | None = None
    batch_size: int = 4
    lr: tuple[float, ...] = (2e-4,)
    train_images: tuple[int, ...] = (0,)
    draw_images: bool = False
    augment: bool = False
    test_images: int = 0
    also_test: tuple[Path, ...] = ()
    instances: tuple[str, ...] = ()
    corruptions: tuple[Corruption, ...] = ()
    prompts: tuple[Prompt, ...] = ("box",)
    also_images: int = 60
    validation_images: int = 0
    validation: Literal["list", "few"] = "list"
    states: tuple[float, ...] = ()
    ema: float | None = None
    wise: tuple[float, ...] = ()
    save_weights: bool = False
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
        for option in ("seeds", "batch_size", "epochs", "steps", "image_size", "minutes"):
            value = getattr(self, option)
            if value is not None and not value > 0:
                raise ValueError(f"--{option.replace('_', '-')} must be above 0, got {value}; raise it")
        for option in ("train_images", "test_images", "also_images", "validation_images", "workers"):
            values = getattr(self, option)
            for value in values if isinstance(values, tuple) else (values,):
                if value < 0:
                    raise ValueError(f"--{option.replace('_', '-')} must not be negative, got {value}; leave it out")
        for option in ("peft", "distiller", "share", "lr", "train_images", "prompts"):
            if not getattr(self, option):
                raise ValueError(
                    f"--{option.replace('_', '-')} must name at least one, got none; leave it out for the default"
                )
        for lr in self.lr:
            if not 0 < lr < math.inf:
                raise ValueError(f"--lr must be a finite number above 0, got {lr}; leave it out for 2e-4")
        for option, low, high in (("share", 0, 10), ("states", 0, 1), ("wise", 0, 1), ("ema", 0, 1)):
            values = getattr(self, option)
            for value in values if isinstance(values, tuple) else () if values is None else (values,):
                if not low <= value <= high or (option == "states" and value == 0):
                    raise ValueError(f"--{option} must lie in {low} to {high}, got {value:g}; choose another")
        if self.steps and self.epochs:
            raise ValueError(f"--steps must stand without --epochs, got {self.steps} and {self.epochs}; leave one out")
        self._check_folders()

    def _check_folders(self) -> None:
        names = [folder.name for folder in self.data]
        if not names or len(set(names)) < len(names):
            raise ValueError(
                f"--data must name folders of different names, got {', '.join(names) or 'none'}; they name the rows"
            )
        others = [folder.name for folder in self.also_test]
        if len(set(others)) < len(others):
            raise ValueError(
                f"--also-test must name folders of different names, got {', '.join(others)}; they name the results"
            )
        for name in self.instances:
            if name not in others:
                raise ValueError(f"--instances must name folders of --also-test, got {name}; add it there")
        if self.validation == "few" and self.validation_images:
            few = [number for number in self.train_images if number]
            if not self.draw_images or not few or min(few) <= self.validation_images or 0 in self.train_images:
                raise ValueError(
                    f"--validation few must leave drawn images to train on, got --train-images {self.train_images} "
                    f"and --validation-images {self.validation_images}; raise one, lower the other, add --draw-images"
                )
