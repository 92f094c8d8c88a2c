"""The images that a command line's runs are trained and tested on, each list read once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.segmentation.corruptions import CorruptedDataset
from benchmarks.segmentation.data import MaskDataset
from benchmarks.segmentation.evaluation import Probe
from benchmarks.segmentation.few_shot import drawn_pairs
from benchmarks.segmentation.instances import InstanceDataset
from benchmarks.segmentation.options import Options
from benchmarks.segmentation.settings import Settings


class Data(NamedTuple):
    """A data set, as training and as test images."""

    train: MaskDataset
    test: MaskDataset


class DataSets:
    """The folders of a command line.

    Every file is decoded once before any training, so that a bad one is named early.

    Args:
        options: of the command line.
        size: side of the model's input in pixels.

    Raises:
        OSError: a folder or file is not there.
        ValueError: a file does not do, or a batch has too few images.

    """

    def __init__(self, options: Options, size: int) -> None:
        self.options, self.size = options, size
        self.folders = {folder.name: folder for folder in options.data}
        self.names = tuple(self.folders)
        self._test = {
            name: self._load(folder, "test", limit=options.test_images or None) for name, folder in self.folders.items()
        }
        self._train: dict[tuple[str, int, int], MaskDataset] = {}
        self._validation: dict[tuple[str, int, int], MaskDataset] = {}
        seeds = range(options.seeds) if options.draw_images else (0,)
        for name in self.names:
            for n_images in options.train_images:
                for seed in seeds:
                    self._load_training(name, n_images, seed)
        self._others = [self._other(folder) for folder in options.also_test]
        corrupted = {name: self._corrupted(name) if options.corruptions else [] for name in self.names}
        asked = options.states or options.wise or options.ema is not None or options.also_test
        asked = asked or options.corruptions or options.validation_images or len(options.prompts) > 1
        in_domain = {
            name: [Probe(name, test, self._prompts(name))] if asked else [] for name, test in self._test.items()
        }
        self._tested = {name: [*in_domain[name], *corrupted[name]] for name in self.names}

    def of(self, settings: Settings) -> Data:
        """Return the images of a run."""
        return Data(self._train[self._key(settings)], self._test[settings.data])

    def tested(self, settings: Settings) -> list[Probe]:
        """Return what a run is tested on beside its row's test images; those are among them if anything is."""
        validation = self._validation.get(self._key(settings))
        own = (
            [] if validation is None else [Probe(f"{settings.data} validation", validation, self._main(settings.data))]
        )
        others = [one for one in self._others if one.name.split()[0] != settings.data]
        return [*self._tested[settings.data], *own, *others]

    def small(self, settings: Settings) -> Data:
        """Return a batch to train on and two test images, to see how long they take."""
        folder = self.folders[settings.data]
        train = self._load(folder, "train", limit=self.options.batch_size, augment=settings.augment)
        return Data(train, self._load(folder, "test", limit=2))

    def lists(self, name: str) -> str:
        """Return a digest of train.csv and test.csv."""
        text = b"".join((self.folders[name] / f"{split}.csv").read_bytes() for split in ("train", "test"))
        return hashlib.blake2b(text, digest_size=4).hexdigest()

    def skipped(self) -> Iterator[str]:
        """Yield what was left out of which folder, each once."""
        said: dict[str, None] = {}
        sets = [*self._train.items(), *self._validation.items(), *((name, test) for name, test in self._test.items())]
        for key, data in sets:
            name = key if isinstance(key, str) else key[0]
            said.update(dict.fromkeys(f"{name}: left out {one}" for one in data.skipped))
        for one in self._others:
            said.update(dict.fromkeys(f"{one.name}: left out {skipped}" for skipped in one.data.skipped))
        yield from said

    def _key(self, settings: Settings) -> tuple[str, int, int]:
        return settings.data, settings.train_images, settings.seed if settings.draw_images else 0

    def _load_training(self, name: str, n_images: int, seed: int) -> None:
        options, folder, key = self.options, self.folders[name], (name, n_images, seed)
        pairs = drawn_pairs(folder, seed) if options.draw_images else None
        few = pairs if pairs is None or not n_images else pairs[:n_images]
        held_out = options.validation_images if options.validation == "few" else 0
        # In the order of the draw, so that what is trained on is drawn whatever is held out.
        trained = few if few is None or not held_out else few[:-held_out]
        limit = None if pairs is not None else n_images or None
        train = self._load(folder, "train", limit=limit, pairs=trained, augment=options.augment)
        if not options.steps and len(train) < options.batch_size:
            raise ValueError(
                f"{folder}: train.csv must list at least a batch of usable images, got {len(train)} for --batch-size "
                f"{options.batch_size}; lower it"
            )
        self._train[key] = train
        if not options.validation_images:
            return
        if held_out:
            self._validation[key] = self._load(folder, "validation", pairs=few[-held_out:])
        elif (folder / "val.csv").is_file():
            known = (one for (other, *_), one in self._validation.items() if other == name)
            self._validation[key] = next(known, None) or self._load(folder, "val", limit=options.validation_images)
        elif pairs is not None and n_images and len(pairs) >= n_images + options.validation_images:
            # From the end of the draw: the same for every number of training images.
            self._validation[key] = self._load(folder, "validation", pairs=pairs[-options.validation_images :])
        else:
            raise ValueError(
                f"{folder}: --validation-images must find val.csv or training images that are not trained on, got "
                "neither; write val.csv, or add --draw-images and lower --train-images"
            )

    def _corrupted(self, name: str) -> list[Probe]:
        limits = [limit for limit in (self.options.test_images, self.options.also_images) if limit]
        clean = self._load(self.folders[name], "test", limit=min(limits, default=None))
        return [
            Probe(f"{name} {one}", CorruptedDataset(clean, one), self._prompts(name), along=False)
            for one in self.options.corruptions
        ]

    def _other(self, folder: Path) -> Probe:
        limit = self.options.also_images or None
        if folder.name not in self.options.instances:
            return Probe(folder.name, self._load(folder, "test", limit=limit), self._prompts(folder.name))
        images = self._load(folder, "test", kind=InstanceDataset, limit=limit)
        return Probe(f"{folder.name} instances", images, self.options.prompts)

    def _load(self, folder: Path, split: str, kind: type[MaskDataset] = MaskDataset, **arguments: Any) -> MaskDataset:
        n_points = 5 if folder.name in self.options.five_points else 1
        return kind(folder, split, size=self.size, n_points=n_points, on_bad=self.options.on_bad, **arguments)

    def _prompts(self, name: str) -> tuple[Any, ...]:
        return ("points",) if name in self.options.five_points else self.options.prompts

    def _main(self, name: str) -> tuple[Any, ...]:
        return ("points",) if name in self.options.five_points else ("box",)
