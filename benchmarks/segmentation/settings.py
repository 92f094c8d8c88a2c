"""What distinguishes one run of the comparison from another."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Literal

from benchmarks.devices import Amp

# PEFT in place of training: the pre-trained model as it is.
ZERO_SHOT = "zero_shot"
Prompt = Literal["box", "points"]
_LATER = ("steps", "draw_images", "augment", "held_out", "share")


@dataclasses.dataclass(frozen=True)
class Settings:
    """A run: what is trained, on what, by which recipe. Runs of equal settings are the same run.

    The recipe's defaults are those of the official training: Adam with a cosine from ``lr`` to a tenth of it, batches
    of 4, 10 epochs, a jittered box or a point at even odds in training and a box in evaluation; for roads 20 epochs
    and 5 points always.

    Attributes:
        model: its name.
        weights: digest of the pre-trained weights.
        data: the folder's name.
        lists: digest of its train.csv and test.csv.
        peft: a method of ``peft_methods.METHODS``, or "zero_shot".
        distiller: a name of ``distillers.DISTILLERS``.
        seed: of weights, order and training prompts.
        image_size: side of the square input in pixels.
        train_images: how many images are trained on; 0 for all.
        test_images: likewise for evaluation.
        epochs: passes over the training images.
        batch_size: images per step.
        lr: peak learning rate.
        prompt: "box", or "points" of which each image has five, also in training.
        amp: autocast: "off", "bf16" or "fp16".
        steps: of the optimiser in place of ``epochs``; 0 for epochs.
        draw_images: whether the seed also chooses the training images.
        augment: whether training images are flipped and cropped.
        held_out: so many of ``train_images`` are not trained on but kept for validation.
        share: of the task's gradient that the distiller's has; 0 for the weights of its source.

    """

    model: str
    weights: str
    data: str
    lists: str
    peft: str
    distiller: str
    seed: int
    image_size: int
    train_images: int = 0
    test_images: int = 0
    epochs: int = 10
    batch_size: int = 4
    lr: float = 2e-4
    prompt: Prompt = "box"
    amp: Amp = "off"
    steps: int = 0
    draw_images: bool = False
    augment: bool = False
    held_out: int = 0
    share: float = 0.0

    @property
    def method(self) -> str:
        """Return the distiller, with its share of the gradient where it has one."""
        return f"{self.distiller} at {self.share:g}" if self.share else self.distiller

    @property
    def label(self) -> str:
        """Return what a reader needs to tell the runs of one command apart."""
        few = f"{self.train_images or 'all'} images, rate {self.lr:g}, " if self.draw_images or self.steps else ""
        trained = self.peft if self.peft == ZERO_SHOT else f"{self.peft}, {few}{self.method}, seed {self.seed}"
        return f"{self.model}, {self.data}, {trained}"

    @property
    def file_name(self) -> str:
        """Return a name that is readable, and unlike for different settings."""
        # A field that came later is left out at its default: files written before it keep their names.
        values = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in _LATER or getattr(self, field.name) != field.default
        }
        text = json.dumps(values, sort_keys=True)
        digest = hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
        return f"{self.data}-{self.model}-{self.peft}-{self.distiller}-{self.seed}-{digest}.json".replace("/", "_")

    @property
    def recipe(self) -> Settings:
        """Return what runs share that differ in method, distiller, seed and data only."""
        return dataclasses.replace(
            self, peft="", distiller="", seed=0, data="", lists="", epochs=0, prompt="box", share=0.0
        )

    @property
    def test(self) -> tuple[str | int, ...]:
        """Return what the result of the untrained model depends on."""
        return self.model, self.weights, self.data, self.lists, self.image_size, self.test_images, self.prompt
