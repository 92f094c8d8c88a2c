"""One run of the comparison: fine-tune a copy of the model with a distiller, then measure it image by image."""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks import measure, peft_methods
from benchmarks.devices import autocast, on_device
from benchmarks.files import whole_file
from benchmarks.sam.models import Sam
from benchmarks.segmentation import distillers
from benchmarks.segmentation.baselines import BASELINES, L2SP, optimizer_and_schedule, restrict
from benchmarks.segmentation.data import MaskDataset
from benchmarks.segmentation.evaluation import LAST, Probe, ious, kept
from benchmarks.segmentation.few_shot import QUARTERS, Draws
from benchmarks.segmentation.memory import check_fits
from benchmarks.segmentation.metrics import METRICS, image_metrics
from benchmarks.segmentation.models import Batch, Watched, encoder_is_frozen, takes_embeddings
from benchmarks.segmentation.prompts import with_one_prompt, with_prompt
from benchmarks.segmentation.rows import Row
from benchmarks.segmentation.settings import ZERO_SHOT, Settings
from benchmarks.segmentation.states import States
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


class Looks(NamedTuple):
    """What is measured beside the test images at the end.

    Attributes:
        tested: the images.
        fractions: of the steps, after which the weights are measured too.
        ema: decay of a mean of the weights that is measured too; None for none.
        wise: weights of means with the pre-trained model that are measured too.

    """

    tested: Sequence[Probe] = ()
    fractions: Sequence[float] = ()
    ema: float | None = None
    wise: Sequence[float] = ()


NO_LOOKS = Looks()


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
        looks: what is measured besides.
        weights: file that the trained weights are written to; None for no file.
        before: the finished run whose weights that file holds: they are tested again, and nothing is trained.

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
        looks: Looks = NO_LOOKS,
        weights: Path | None = None,
        before: Row | None = None,
    ) -> None:
        self.looks, self.weights, self.before = looks, weights, before
        self.settings, self.sam, self.train, self.test, self.device = settings, sam, train, test, device
        torch.manual_seed(settings.seed)
        # In eval mode throughout, as BatchNorm keeps the statistics of the pre-training.
        model = copy.deepcopy(sam.model).requires_grad_(False)
        self.model = model if settings.peft == ZERO_SHOT else peft_methods.apply(model, settings.peft).eval()
        restrict(self.model, settings.distiller)
        self.loader, self.parts = self._batches(workers)
        self.n_steps = self.parts * len(self.loader) if not settings.steps else len(self.loader)
        if settings.peft == ZERO_SHOT:
            self.parts = self.n_steps = 0
        self.distills = settings.distiller not in ("none", *BASELINES)
        with_layers = self.distills and distillers.needs_layers(settings.distiller)
        # Then nothing before the decoder is trained, and the teacher's features are the student's.
        self.frozen = not with_layers and encoder_is_frozen(self.model) and takes_embeddings(sam.model)
        self.student = Watched(self.model, sam, with_layers=with_layers)
        self.teacher = Watched(sam.model, sam, with_layers=with_layers, cache=cache)
        self.distiller = self._make_distiller(with_layers)
        self.anchor = L2SP(self.model, settings.share) if settings.distiller == "l2_sp" else None
        self.states = States(self.model, self.n_steps, fractions=looks.fractions, ema=looks.ema, wise=looks.wise)
        if self.n_steps:
            check_fits(self.model, self._loss_of_one, settings.batch_size, device)
            self.student.forget()

    @property
    def length(self) -> int:
        """Number of steps and of test images: what a progress bar counts."""
        others = sum(len(one.data) * len(one.states(self._names)) for one in self.looks.tested)
        return self.n_steps + len(self.test) + others

    def __call__(self, *, watch: Watch | None = None, tick: Callable[[], object] = lambda: None) -> Row:
        """Train, measure, and return the row.

        Raises:
            RuntimeError: the loss is not finite.

        """
        try:
            started = time.perf_counter()
            history = self._fine_tune(watch, tick) if self.before is None else self._load(tick)
            trained = time.perf_counter()
            images, metrics = self._evaluate(tick) if self.before is None else ([], {})
            also = self._evaluate_others(tick)
            if self.weights is not None and self.n_steps and self.before is None:
                save(self.weights, self.model)
        finally:
            self.close()
        if self.before is not None:
            return dataclasses.replace(self.before, also=kept(self.before.also, also))
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
            also=also,
        )

    def close(self) -> None:
        """Take all hooks off the models."""
        self.student.close()
        self.teacher.close()

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return task loss and distiller's loss of a batch on the device."""
        with autocast(self.device, self.settings.amp):
            seen_by_teacher = self.teacher.observe(batch) if self.distills or self.frozen else None
            if self.frozen:
                batch = {**batch, "image_embeddings": seen_by_teacher.features.image_features}
            logits = self.student(batch)
            task = structure_loss(logits, batch["masks"], batch["inside"])
            if not self.distills:
                self.student.forget()
                return task, task.new_zeros(()) if self.anchor is None else self.anchor()
            return task, self.distiller(seen_by_teacher, self.student.take(), batch)

    def _fine_tune(self, watch: Watch | None, tick: Callable[[], object]) -> list[dict[str, float]]:
        settings = self.settings
        if not self.n_steps:
            return []
        optimizer, schedule = optimizer_and_schedule(
            self.model, self.distiller.parameters(), settings.distiller, settings.lr, self.n_steps
        )
        scaler = torch.amp.GradScaler(self.device.type, enabled=settings.amp == "fp16")
        history: list[dict[str, float]] = []
        said: list[dict[str, Tensor]] = []
        ends = [round(self.n_steps * (part + 1) / self.parts) for part in range(self.parts)]
        for index, batch in enumerate(self._all_batches()):
            batch = on_device(with_one_prompt(batch, settings, index), self.device)
            task, distilled = self.losses(batch)
            loss = task + distilled
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            said.append({"task": task.detach(), "distilled": distilled.detach()})
            self.states.after(index + 1)
            if watch is not None:
                watch(Step(index, self.n_steps, self.model, self.distiller))
            tick()
            if index + 1 not in ends:
                continue
            means = {name: torch.stack([one[name] for one in said]).mean().item() for name in said[0]}
            said = []
            if not all(math.isfinite(value) for value in means.values()):
                raise RuntimeError(
                    f"{settings.label}: the losses must be finite, got {means} in epoch {len(history) + 1}; lower --lr"
                )
            state = self.distiller.state() if self.anchor is None else self.anchor.state()
            history.append({"epoch": len(history) + 1, **means, **state})
        return history

    def _load(self, tick: Callable[[], object]) -> list[dict[str, float]]:
        from safetensors.torch import load_file

        self.model.load_state_dict(load_file(self.weights, device=str(self.device)), strict=False)
        for _ in range(self.n_steps + len(self.test)):
            tick()
        return []

    def _batches(self, workers: int) -> tuple[DataLoader[Any], int]:
        """Return the loader, and in how many parts the history tells of the run: epochs, or quarters of the steps."""
        settings, train = self.settings, self.train
        if settings.steps:
            draws = Draws(train, settings.steps * settings.batch_size, settings.seed)
            return DataLoader(draws, settings.batch_size, num_workers=workers), min(QUARTERS, settings.steps)
        order = torch.Generator().manual_seed(settings.seed)
        size = min(settings.batch_size, len(train))
        loader = DataLoader(train, size, shuffle=True, drop_last=True, generator=order, num_workers=workers)
        return loader, settings.epochs

    def _all_batches(self) -> Iterator[Batch]:
        for epoch in range(1 if self.settings.steps else self.parts):
            self.train.epoch = epoch
            yield from self.loader

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

    @property
    def _names(self) -> Sequence[str]:
        return self.states.names if self.n_steps else (LAST,)

    def _evaluate_others(self, tick: Callable[[], object]) -> dict[str, dict[str, Any]]:
        """Return the IoUs of every state on all other images."""
        found: dict[str, dict[str, Any]] = {}
        for state in self.states if self.n_steps else (LAST,):
            for tested in self.looks.tested:
                if state not in tested.states([state]):
                    continue
                values = ious(self.student, tested, self.device, self.settings.amp, tick)
                for name, images in tested.keys.items():
                    found.setdefault(name, {"images": images, "iou": {}})["iou"][state] = values[name]
        return found

    def _make_distiller(self, with_layers: bool) -> distillers.Distiller:
        channels: list[int] = []
        if with_layers:
            one = on_device(next(iter(DataLoader(self.train))), self.device)
            seen = self.teacher.observe(with_prompt(one, self.settings.prompt))
            channels = [layer.shape[1] for layer in seen.layers]
        name = self.settings.distiller if self.distills else "none"
        distiller = distillers.make(
            name,
            dim=self.sam.dim,
            layer_channels=channels,
            share=self.settings.share,
            measured=bool(self.settings.steps),
        )
        return distiller.to(self.device)

    def _loss_of_one(self) -> Tensor:
        one = on_device(with_prompt(next(iter(DataLoader(self.train))), self.settings.prompt), self.device)
        with autocast(self.device, self.settings.amp):
            if self.frozen:
                one = {**one, "image_embeddings": self.teacher.observe(one).features.image_features}
            return structure_loss(self.student(one), one["masks"], one["inside"])


def save(path: Path, model: nn.Module) -> None:
    """Write the trained weights, whole or not at all; ``load_state_dict(..., strict=False)`` takes them back."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        weights = peft_methods.trained_state_dict(model)
        save_file({name: value.contiguous() for name, value in weights.items()}, temporary)
