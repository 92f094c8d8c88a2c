"""The runs that a command line asks for: which they are, in which order, how long they take, and doing them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import measure
from benchmarks.sam.models import load_sam
from benchmarks.segmentation import plan
from benchmarks.segmentation.data_sets import Data, DataSets
from benchmarks.segmentation.evaluation import LAST, lacks
from benchmarks.segmentation.options import EPOCHS, EPOCHS_OF_POINTS, Options
from benchmarks.segmentation.relations import save_relations
from benchmarks.segmentation.rows import Row, read, write
from benchmarks.segmentation.settings import ZERO_SHOT, Settings
from benchmarks.segmentation.shares import save_shares
from benchmarks.segmentation.states import is_of_last, state_names
from benchmarks.segmentation.training import NO_LOOKS, Looks, Run
from renyi_kd.teachers.encoder_cache import fingerprint

# Distillers and baselines that add no loss.
WITHOUT_SHARE = ("none", "decoder_tenth", "output_tokens")


class Grid:
    """All combinations of a command line's data sets, methods, numbers of images, rates and seeds, on one model.

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
        self.data = DataSets(options, self.sam.image_size)
        for skipped in self.data.skipped():
            print(skipped, file=sys.stderr)
        runs = [
            self._settings(name, peft, distiller, seed, n_images, lr, share)
            for name, peft, n_images, lr, distiller, share, seed in itertools.product(
                self.data.names,
                options.peft,
                options.train_images,
                options.lr,
                options.distiller,
                options.share,
                range(options.seeds),
            )
        ]
        untrained = [self._settings(name, ZERO_SHOT, "none", 0) for name in self.data.names]
        # What has no distiller has no share, and is one run whatever the shares.
        self.runs = plan.most_informative_first([*untrained, *dict.fromkeys(runs)])

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
        first = self.data.names[0], self.options.peft[0]
        runs = {
            said: self._ready(self._settings(*first, distiller, 0), looks=NO_LOOKS) for said, distiller in names.items()
        }
        with tqdm(total=sum(run.length for run in runs.values()), unit="it", desc=", ".join(first)) as bar:
            paths = save_relations(runs, self.options.out, bar.update)
        print(f"written: {', '.join(map(str, paths))}")
        return 0

    def shares(self) -> int:
        """Write the share of InfoSAM in the gradient, step by step, for every data set and distiller."""
        options = self.options
        path = options.out / "shares.csv"
        for name in self.data.names:
            for distiller in options.distiller:
                run = self._ready(self._settings(name, options.peft[0], distiller, 0), looks=NO_LOOKS)
                with tqdm(total=run.length, unit="it", desc=f"{name}, {distiller}") as bar:
                    save_shares(run, path, bar.update)
        print(f"written: {path}")
        return 0

    def todo(self) -> list[Settings]:
        """Return the runs that are left, in their order."""
        rows = self._rows()
        done = {row.settings: row for row in rows}
        # A model that is not trained is the same whatever the recipe.
        untrained = {(*row.settings.test, row.settings.amp): row for row in rows if row.settings.peft == ZERO_SHOT}
        left = []
        for settings in self.runs:
            zero_shot = settings.peft == ZERO_SHOT
            row = untrained.get((*settings.test, settings.amp)) if zero_shot else done.get(settings)
            if row is None or lacks(row.also, self._looks(settings).tested, self._states(settings)):
                left.append(settings)
        return left

    def _rows(self) -> list[Row]:
        return read(self.options.out)

    def _settings(
        self,
        name: str,
        peft: str,
        distiller: str,
        seed: int,
        n_images: int | None = None,
        lr: float | None = None,
        share: float | None = None,
    ) -> Settings:
        """Return the settings of a run; the first of the rates and so on where none is given."""
        options = self.options
        points = name in options.five_points
        share = options.share[0] if share is None else share
        return Settings(
            model=Path(options.model).name,
            weights=self.weights,
            data=name,
            lists=self.data.lists(name),
            peft=peft,
            distiller=distiller,
            seed=seed,
            image_size=self.sam.image_size,
            train_images=options.train_images[0] if n_images is None else n_images,
            test_images=options.test_images,
            epochs=(options.epochs or (EPOCHS_OF_POINTS if points else EPOCHS)) if not options.steps else 0,
            batch_size=options.batch_size,
            lr=options.lr[0] if lr is None else lr,
            prompt="points" if points else "box",
            amp=options.amp,
            steps=options.steps or 0,
            draw_images=options.draw_images,
            augment=options.augment,
            held_out=options.validation_images if options.validation == "few" else 0,
            share=share if distiller not in WITHOUT_SHARE else 0.0,
        )

    def _looks(self, settings: Settings) -> Looks:
        options = self.options
        return Looks(self.data.tested(settings), options.states, options.ema, options.wise)

    def _states(self, settings: Settings) -> list[str]:
        if settings.peft == ZERO_SHOT:
            return [LAST]
        return state_names(self.options.states, self.options.ema, self.options.wise)

    def _ready(self, settings: Settings, data: Data | None = None, looks: Looks | None = None) -> Run:
        options = self.options
        data = data or self.data.of(settings)
        data.train.seed = settings.seed
        # Every form of a flipped and cropped image would be kept.
        folder = None if settings.augment else options.cache or options.out / "cache"
        cache = folder and folder / f"{settings.model}-{settings.weights}-{settings.image_size}" / settings.data
        weights, before = None, None
        if looks is None:
            weights = self._weights_file(settings)
            before = self._before(settings, weights)
        return Run(
            settings,
            self.sam,
            data.train,
            data.test,
            cache=cache,
            device=self.device,
            workers=options.workers,
            looks=self._looks(settings) if looks is None else looks,
            weights=weights if options.save_weights or before is not None else None,
            before=before,
        )

    def _weights_file(self, settings: Settings) -> Path:
        return self.options.out / "weights" / Path(settings.file_name).with_suffix(".safetensors").name

    def _before(self, settings: Settings, weights: Path) -> Row | None:
        """Return the finished run of these settings whose weights are at hand, if they can tell what it lacks.

        Raises:
            RuntimeError: it has to be trained again, and would lose results.

        """
        row = next((row for row in self._rows() if row.settings == settings), None)
        if row is None:
            return None
        asked = {
            name: set(one.states(self._states(settings))) for one in self.data.tested(settings) for name in one.keys
        }
        lacking = {
            state for name, states in asked.items() for state in states - row.also.get(name, {"iou": {}})["iou"].keys()
        }
        if weights.is_file() and all(map(is_of_last, lacking)):
            return row
        for name, result in row.also.items():
            if not result["iou"].keys() <= asked.get(name, set()):
                raise RuntimeError(
                    f"the run in {settings.file_name} must be asked for all results that it has, got a command without "
                    f"{name}, {', '.join(result['iou'])}; add what is missing, or give another --out"
                )
        return None

    def _n_steps(self, settings: Settings) -> int:
        if settings.peft == ZERO_SHOT:
            return 0
        return settings.steps or settings.epochs * (len(self.data.of(settings).train) // settings.batch_size)

    def _n_looks(self, settings: Settings, *, per_prompt: bool) -> int:
        """Return how many images are evaluated besides the test images, each as often as it is."""
        return sum(
            len(one.data) * (len(one.prompts) if per_prompt else 1) * len(one.states(self._states(settings)))
            for one in self.data.tested(settings)
        )

    def _length(self, settings: Settings) -> int:
        n_images = len(self.data.of(settings).test) + self._n_looks(settings, per_prompt=False)
        return self._n_steps(settings) + n_images

    def _estimate(self, settings: Settings, *, measure_if_unknown: bool = False) -> float | None:
        device = str(measure.environment(self.device.type)["device"])
        n_steps = self._n_steps(settings)
        n_test = len(self.data.of(settings).test) + self._n_looks(settings, per_prompt=True)
        seconds = plan.estimate(settings, n_steps, n_test, self._rows(), device)
        if seconds is None and measure_if_unknown:
            step, image = self._measured
            seconds = n_steps * step + n_test * image
        return seconds

    @functools.cached_property
    def _measured(self) -> tuple[float, float]:
        """Seconds of a step and of a test image: of three steps and two images of the last run in the order."""
        last = self.runs[-1]
        print("no finished run tells how long one takes: three steps are made", file=sys.stderr)
        short = dataclasses.replace(last, epochs=3, steps=3 if last.steps else 0)
        row = self._ready(short, self.data.small(last), NO_LOOKS)()
        return row.training_seconds / row.steps, row.evaluation_seconds / len(row.images)
