"""One run of the comparison: fine-tune a copy of the model with a distiller, then measure it image by image."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks import measure, peft_methods
from benchmarks.devices import autocast, on_device
from benchmarks.sam.models import Sam
from benchmarks.segmentation import distillers
from benchmarks.segmentation.data import MaskDataset
from benchmarks.segmentation.memory import check_fits
from benchmarks.segmentation.metrics import METRICS, image_metrics
from benchmarks.segmentation.models import Batch, Watched, encoder_is_frozen, takes_embeddings
from benchmarks.segmentation.rows import Row
from benchmarks.segmentation.settings import ZERO_SHOT, Settings
from benchmarks.segmentation.task_loss import structure_loss


class Step(NamedTuple):
    """What a step of training looked like, for who watches.

    Attributes:
        index: from 0.
        of: number of steps.
        model: after the step.
        distiller: after the step.

    """

    index: int
    of: int
    model: nn.Module
    distiller: nn.Module


Watch = Callable[[Step], None]


class Run:
    """A run that is ready to go: the student, its teacher, the distiller, and the data.

    Args:
        settings: what to do.
        sam: the pre-trained model, on ``device``; it is copied, never changed.
        train: the training images.
        test: the images to measure on.
        cache: folder of the teacher's features; None to compute them in every step.
        device: where everything runs.
        workers: processes that load images.

    Raises:
        MemoryError: a step will not fit.
        ValueError: method or distiller do not go with the model, or a step has too few images.

    """

    def __init__(
        self,
        settings: Settings,
        sam: Sam,
        train: MaskDataset,
        test: MaskDataset,
        *,
        cache: Path | None,
        device: torch.device,
        workers: int = 0,
    ) -> None:
        self.settings, self.sam, self.train, self.test, self.device = settings, sam, train, test, device
        torch.manual_seed(settings.seed)
        # In eval mode throughout, as BatchNorm keeps the statistics of the pre-training.
        model = copy.deepcopy(sam.model).requires_grad_(False)
        self.model = model if settings.peft == ZERO_SHOT else peft_methods.apply(model, settings.peft).eval()
        order = torch.Generator().manual_seed(settings.seed)
        self.loader = DataLoader(
            train,
            min(settings.batch_size, len(train)),
            shuffle=True,
            drop_last=True,
            generator=order,
            num_workers=workers,
        )
        self.epochs = 0 if settings.peft == ZERO_SHOT else settings.epochs
        self.n_steps = self.epochs * len(self.loader)
        with_layers = distillers.needs_layers(settings.distiller)
        # Then nothing before the decoder is trained, and the teacher's features are the student's.
        self.frozen = not with_layers and encoder_is_frozen(self.model) and takes_embeddings(sam.model)
        self.student = Watched(self.model, sam, with_layers=with_layers)
        self.teacher = Watched(sam.model, sam, with_layers=with_layers, cache=cache)
        self.distiller = self._make_distiller(with_layers)
        if self.epochs:
            check_fits(self.model, self._loss_of_one, settings.batch_size, device)
            self.student.forget()

    @property
    def length(self) -> int:
        """Number of steps and of test images: what a progress bar counts."""
        return self.n_steps + len(self.test)

    def __call__(self, *, watch: Watch | None = None, tick: Callable[[], object] = lambda: None) -> Row:
        """Train, measure, and return the row.

        Raises:
            RuntimeError: the loss is not finite.

        """
        try:
            started = time.perf_counter()
            history = self._fine_tune(watch, tick)
            trained = time.perf_counter()
            images, metrics = self._evaluate(tick)
        finally:
            self.close()
        return Row(
            settings=self.settings,
            images=images,
            metrics=metrics,
            history=history,
            steps=self.n_steps,
            training_seconds=trained - started,
            evaluation_seconds=time.perf_counter() - trained,
            skipped=[*self.train.skipped, *self.test.skipped],
            environment=measure.environment(self.device.type),
        )

    def close(self) -> None:
        """Take all hooks off the models."""
        self.student.close()
        self.teacher.close()

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return task loss and distiller's loss of a batch on the device."""
        settings = self.settings
        distilled = settings.distiller != "none"
        with autocast(self.device, self.settings.amp):
            seen_by_teacher = self.teacher.observe(batch) if distilled or self.frozen else None
            if self.frozen:
                batch = {**batch, "image_embeddings": seen_by_teacher.features.image_features}
            logits = self.student(batch)
            task = structure_loss(logits, batch["masks"], batch["inside"])
            if not distilled:
                self.student.forget()
                return task, task.new_zeros(())
            return task, self.distiller(seen_by_teacher, self.student.take(), batch)

    def _fine_tune(self, watch: Watch | None, tick: Callable[[], object]) -> list[dict[str, float]]:
        settings = self.settings
        trained = [p for p in (*self.model.parameters(), *self.distiller.parameters()) if p.requires_grad]
        if not self.n_steps:
            return []
        optimizer = torch.optim.Adam(trained, settings.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.n_steps, eta_min=settings.lr / 10)
        scaler = torch.amp.GradScaler(self.device.type, enabled=settings.amp == "fp16")
        history, index = [], 0
        for epoch in range(self.epochs):
            self.train.epoch = epoch
            said: list[dict[str, Tensor]] = []
            for batch in self.loader:
                batch = on_device(with_one_prompt(batch, settings, index), self.device)
                task, distilled = self.losses(batch)
                loss = task + distilled
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                schedule.step()
                said.append({"task": task.detach(), "distilled": distilled.detach()})
                if watch is not None:
                    watch(Step(index, self.n_steps, self.model, self.distiller))
                index += 1
                tick()
            means = {name: torch.stack([one[name] for one in said]).mean().item() for name in said[0]}
            if not all(math.isfinite(value) for value in means.values()):
                raise RuntimeError(
                    f"{settings.label}: the losses must be finite, got {means} in epoch {epoch + 1}; lower --lr"
                )
            history.append({"epoch": epoch + 1, **means, **self.distiller.state()})
        return history

    @torch.no_grad()
    def _evaluate(self, tick: Callable[[], object]) -> tuple[list[str], dict[str, list[float]]]:
        images: list[str] = []
        metrics: dict[str, list[float]] = {name: [] for name in METRICS}
        for index, item in enumerate(DataLoader(self.test)):
            batch = on_device(with_prompt(item, self.settings.prompt), self.device)
            with autocast(self.device, self.settings.amp):
                if self.frozen:
                    features = self.teacher.observe(batch).features
                    batch = {**batch, "image_embeddings": features.image_features}
                logits = self.student(batch)
            self.student.forget()
            found = image_metrics(logits[0, 0].float().cpu(), item["inside"][0, 0], self.test.original_mask(index))
            images.append(item["sample_id"][0])
            for name, value in found.items():
                metrics[name].append(value)
            tick()
        return images, metrics

    def _make_distiller(self, with_layers: bool) -> distillers.Distiller:
        channels: list[int] = []
        if with_layers:
            one = on_device(next(iter(DataLoader(self.train))), self.device)
            seen = self.teacher.observe(with_prompt(one, self.settings.prompt))
            channels = [layer.shape[1] for layer in seen.layers]
        distiller = distillers.make(self.settings.distiller, dim=self.sam.dim, layer_channels=channels)
        return distiller.to(self.device)

    def _loss_of_one(self) -> Tensor:
        one = on_device(with_prompt(next(iter(DataLoader(self.train))), self.settings.prompt), self.device)
        with autocast(self.device, self.settings.amp):
            if self.frozen:
                one = {**one, "image_embeddings": self.teacher.observe(one).features.image_features}
            return structure_loss(self.student(one), one["masks"], one["inside"])


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
