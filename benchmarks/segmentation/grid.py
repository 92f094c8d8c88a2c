"""The runs that a command line asks for: which they are, in which order, how long they take, and doing them."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from benchmarks import measure
from benchmarks.sam.models import load_sam
from benchmarks.segmentation import plan
from benchmarks.segmentation.data import MaskDataset
from benchmarks.segmentation.options import EPOCHS, EPOCHS_OF_POINTS, Options
from benchmarks.segmentation.relations import save_relations
from benchmarks.segmentation.rows import Row, read, write
from benchmarks.segmentation.settings import ZERO_SHOT, Settings
from benchmarks.segmentation.shares import save_shares
from benchmarks.segmentation.training import Run
from renyi_kd.teachers.encoder_cache import fingerprint


class Data(NamedTuple):
    """A data set, as training and as test images."""

    train: MaskDataset
    test: MaskDataset
    lists: str


class Grid:
    """All combinations of a command line's data sets, PEFT methods, distillers and seeds, on one model.

    Args:
        options: of the command line.

    Raises:
        OSError: model or data are not there.
        ValueError: an option or a file does not do.

    """

    def __init__(self, options: Options) -> None:
        options.check()
        self.options = options
        self.device = torch.empty(0, device=options.device).device
        sam = load_sam(options.model, options.weights, options.image_size)
        self.sam = sam._replace(model=sam.model.to(self.device))
        self.weights = fingerprint(sam.model)[:8]
        self.data = {
            folder.name: self._load(folder, options.train_images, options.test_images) for folder in options.data
        }
        for name, data in self.data.items():
            for skipped in (*data.train.skipped, *data.test.skipped):
                print(f"{name}: left out {skipped}", file=sys.stderr)
        runs = [
            self._settings(name, peft, distiller, seed)
            for name in self.data
            for peft in options.peft
            for distiller in options.distiller
            for seed in range(options.seeds)
        ]
        untrained = [self._settings(name, ZERO_SHOT, "none", 0) for name in self.data]
        self.runs = plan.most_informative_first([*untrained, *runs])

    def run(self) -> int:
        """Do what is not done yet; return 1 if a run was skipped."""
        options, started, failed = self.options, time.perf_counter(), 0
        todo = self.todo()
        print(f"{len(self.runs) - len(todo)} of {len(self.runs)} runs were done before, in {options.out}")
        with tqdm(total=sum(self._length(settings) for settings in todo), unit="it", smoothing=0.05) as bar:
            for settings in todo:
                seconds = self._estimate(settings)
                if options.minutes and seconds and time.perf_counter() - started + seconds > 60 * options.minutes:
                    bar.write(f"{settings.label}: left for another time, as it should take {seconds / 60:.1f} min")
                    break
                bar.set_description(settings.label)
                before = bar.n
                try:
                    row = self._ready(settings)(tick=bar.update)
                except (MemoryError, RuntimeError, ValueError) as error:
                    if options.on_bad == "stop":
                        raise RuntimeError(f"{settings.label}: {error}") from error
                    bar.write(f"{settings.label}: skipped: {error}", file=sys.stderr)
                    bar.update(before + self._length(settings) - bar.n)
                    failed = 1
                    continue
                path = write(options.out, row)
                bar.write(f"{settings.label}: IoU {100 * row.mean('iou'):.1f}, {path.name}")
        return failed

    def plan(self) -> int:
        """Print the runs that are left in their order, and which of them fit into --minutes."""
        todo = self.todo()
        if not todo:
            print("all runs are done")
            return 0
        minutes = self.options.minutes or math.inf
        fitting = plan.fitting(todo, lambda settings: self._estimate(settings, measure_if_unknown=True), minutes)
        total = 0.0
        for planned in fitting:
            total += planned.seconds
            print(f"{planned.seconds / 60:7.1f} min  {total / 60:7.1f} in all  {planned.settings.label}")
        left = len(todo) - len(fitting)
        print(f"{len(fitting)} runs" + (f" fit into {minutes:g} minutes, {left} are left" if left else ""))
        return 0

    def relations(self) -> int:
        """Draw the relations of the first data set, method and seed, with and without L_r."""
        names = {"with L_r": "infosam", "without L_r": "infosam_no_lr"}
        first = next(iter(self.data)), self.options.peft[0]
        runs = {said: self._ready(self._settings(*first, distiller, 0)) for said, distiller in names.items()}
        with tqdm(total=sum(run.length for run in runs.values()), unit="it", desc=", ".join(first)) as bar:
            paths = save_relations(runs, self.options.out, bar.update)
        print(f"written: {', '.join(map(str, paths))}")
        return 0

    def shares(self) -> int:
        """Write the share of InfoSAM in the gradient, step by step, for every data set and distiller."""
        options = self.options
        path = options.out / "shares.csv"
        for name in self.data:
            for distiller in options.distiller:
                run = self._ready(self._settings(name, options.peft[0], distiller, 0))
                with tqdm(total=run.length, unit="it", desc=f"{name}, {distiller}") as bar:
                    save_shares(run, path, bar.update)
        print(f"written: {path}")
        return 0

    def todo(self) -> list[Settings]:
        """Return the runs that are left, in their order."""
        done = {row.settings for row in self._rows()}
        return [settings for settings in self.runs if settings not in done]

    def _rows(self) -> list[Row]:
        return read(self.options.out)

    def _settings(self, name: str, peft: str, distiller: str, seed: int) -> Settings:
        options = self.options
        points = name in options.five_points
        return Settings(
            model=Path(options.model).name,
            weights=self.weights,
            data=name,
            lists=self.data[name].lists,
            peft=peft,
            distiller=distiller,
            seed=seed,
            image_size=self.sam.image_size,
            train_images=options.train_images,
            test_images=options.test_images,
            epochs=options.epochs or (EPOCHS_OF_POINTS if points else EPOCHS),
            batch_size=options.batch_size,
            lr=options.lr,
            prompt="points" if points else "box",
            amp=options.amp,
        )

    def _load(self, folder: Path, train_images: int, test_images: int) -> Data:
        options = self.options
        shared = {
            "size": self.sam.image_size,
            "n_points": 5 if folder.name in options.five_points else 1,
            "on_bad": options.on_bad,
        }
        train = MaskDataset(folder, "train", limit=train_images or None, **shared)
        test = MaskDataset(folder, "test", limit=test_images or None, **shared)
        if len(train) < options.batch_size:
            raise ValueError(
                f"{folder}: train.csv must list at least a batch of usable images, got {len(train)} for --batch-size "
                f"{options.batch_size}; lower it"
            )
        text = b"".join((folder / f"{split}.csv").read_bytes() for split in ("train", "test"))
        return Data(train, test, hashlib.blake2b(text, digest_size=4).hexdigest())

    def _ready(self, settings: Settings, data: Data | None = None) -> Run:
        data = data or self.data[settings.data]
        data.train.seed = settings.seed
        cache = self.options.cache or self.options.out / "cache"
        return Run(
            settings,
            self.sam,
            data.train,
            data.test,
            cache=cache / f"{settings.model}-{settings.weights}-{settings.image_size}" / settings.data,
            device=self.device,
            workers=self.options.workers,
        )

    def _n_steps(self, settings: Settings) -> int:
        if settings.peft == ZERO_SHOT:
            return 0
        return settings.epochs * (len(self.data[settings.data].train) // settings.batch_size)

    def _length(self, settings: Settings) -> int:
        return self._n_steps(settings) + len(self.data[settings.data].test)

    def _estimate(self, settings: Settings, *, measure_if_unknown: bool = False) -> float | None:
        device = str(measure.environment(self.device.type)["device"])
        n_steps, n_test = self._n_steps(settings), len(self.data[settings.data].test)
        seconds = plan.estimate(settings, n_steps, n_test, self._rows(), device)
        if seconds is None and measure_if_unknown:
            step, image = self._measured
            seconds = n_steps * step + n_test * image
        return seconds

    @functools.cached_property
    def _measured(self) -> tuple[float, float]:
        """Seconds of a step and of a test image: of three steps and two images of the last run in the order."""
        options, last = self.options, self.runs[-1]
        print("no finished run tells how long one takes: three steps are made", file=sys.stderr)
        folder = next(folder for folder in options.data if folder.name == last.data)
        row = self._ready(dataclasses.replace(last, epochs=3), self._load(folder, options.batch_size, 2))()
        return row.training_seconds / row.steps, row.evaluation_seconds / len(row.images)
