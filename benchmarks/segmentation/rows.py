"""Finished runs on disk: one JSON file each, there whole or not at all."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.files import whole_file
from benchmarks.segmentation.settings import Settings


@dataclasses.dataclass(frozen=True)
class Row:
    """A finished run.

    Attributes:
        settings: of the run.
        images: ids of the test images.
        metrics: of every metric one value per image, in the order of ``images``.
        history: one dict per epoch: means of the losses and of what the distiller says of its state.
        steps: of the optimiser.
        training_seconds: of all steps.
        evaluation_seconds: of all test images.
        skipped: images that could not be used, with the reason.
        environment: machine, versions and commit.
        also: results beside those of the test images, by "name/prompt": ids of the images, and for every state of the
            weights the IoU per image.

    """

    settings: Settings
    images: Sequence[str]
    metrics: dict[str, Sequence[float]]
    history: Sequence[dict[str, float]]
    steps: int
    training_seconds: float
    evaluation_seconds: float
    skipped: Sequence[str]
    environment: dict[str, Any]
    also: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    @property
    def looks(self) -> int:
        """Return how many images were evaluated, each as often as it was."""
        others = (len(result["images"]) * len(result["iou"]) for result in self.also.values())
        return len(self.images) + sum(others)

    def mean(self, metric: str) -> float:
        """Return a metric's mean over the images."""
        values = self.metrics[metric]
        return sum(values) / len(values)


def write(folder: Path, row: Row) -> Path:
    """Write a run's file and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / row.settings.file_name
    values = json.loads(json.dumps(dataclasses.asdict(row)), parse_float=_five_digits)
    text = json.dumps({**values, "digest": _digest(values)}, separators=(",", ":"))
    with whole_file(path) as temporary:
        temporary.write_text(text + "\n")
    return path


def read(folder: Path) -> list[Row]:
    """Return all finished runs of a folder and those below it, in the order of their names; none if there is no folder.

    Raises:
        ValueError: a file is not that of a run.

    """
    rows = []
    for path in sorted(folder.rglob("*.json")):
        # What another process writes, or has left where it was killed.
        if path.name.startswith("."):
            continue
        try:
            values = json.loads(path.read_text())
            # Files from before there were digests have none.
            if values.pop("digest", None) not in (None, _digest(values)):
                raise ValueError("its digest is that of other contents")
            row = Row(**{**values, "settings": Settings(**values["settings"])})
            if {len(each) for each in row.metrics.values()} != {len(row.images)}:
                raise ValueError("its metrics have not one value for each image")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"rows: {path} must be a finished run of this version, got {type(error).__name__}: {error}; move it "
                "out of the folder, and run it again"
            ) from error
        rows.append(row)
    return rows


def _digest(values: dict[str, Any]) -> str:
    """Return what tells a file whose bits have changed."""
    return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=8).hexdigest()


def _five_digits(number: str) -> float:
    """Return a number of a JSON file, far finer than any difference of interest."""
    return float(f"{float(number):.5g}")
