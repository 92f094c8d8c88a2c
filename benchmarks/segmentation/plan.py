"""Which runs first, and which of them fit into a time."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

from benchmarks.segmentation.rows import Row
from benchmarks.segmentation.settings import ZERO_SHOT, Settings

# The question first, then what may explain its answer, then the others.
TIERS = (("none", "infosam"), ("infosam_cauchy_schwarz",), ("infosam_no_lr", "infosam_no_ld"))


class Planned(NamedTuple):
    """A run with the seconds that it should take."""

    settings: Settings
    seconds: float


def most_informative_first(runs: Sequence[Settings]) -> list[Settings]:
    """Return the runs in the order in which each adds most to what is known by then.

    A distiller says nothing without plain fine-tuning beside it, nor a single seed much; one data set and one method
    less matter least. So: the models as they are; then plain fine-tuning against InfoSAM, seed by seed, over all data
    and methods; its variants; and last all other distillers, again seed by seed. Otherwise as given.
    """

    def key(settings: Settings) -> tuple[bool, int, int]:
        tier = next((i for i, names in enumerate(TIERS) if settings.distiller in names), len(TIERS))
        return settings.peft != ZERO_SHOT, tier, settings.seed

    return sorted(runs, key=key)


def fitting(runs: Sequence[Settings], seconds_of: Callable[[Settings], float], minutes: float) -> list[Planned]:
    """Return the first runs that fit into a time; what comes after the first that does not is left for another time."""
    planned, left = [], 60 * minutes
    for settings in runs:
        seconds = seconds_of(settings)
        left -= seconds
        if left < 0:
            break
        planned.append(Planned(settings, seconds))
    return planned


def estimate(settings: Settings, n_steps: int, n_test: int, rows: Sequence[Row], device: str) -> float | None:
    """Return the seconds that a run should take by the finished runs of its model on this device; None without any.

    The nearest runs count: of the same method and distiller, else of the same method, else all.
    """
    same = [
        row
        for row in rows
        if row.environment["device"] == device
        and (row.settings.model, row.settings.image_size) == (settings.model, settings.image_size)
    ]
    test = [row.evaluation_seconds / row.looks for row in same]
    trained = [row for row in same if row.steps]
    nearest = (
        [row for row in trained if (row.settings.peft, row.settings.distiller) == (settings.peft, settings.distiller)]
        or [row for row in trained if row.settings.peft == settings.peft]
        or trained
    )
    if not test or (n_steps and not nearest):
        return None
    # Per image, as batches may differ.
    step = [row.training_seconds / (row.steps * row.settings.batch_size) for row in nearest]
    training = n_steps * settings.batch_size * statistics.median(step) if n_steps else 0.0
    return training + n_test * statistics.median(test)
