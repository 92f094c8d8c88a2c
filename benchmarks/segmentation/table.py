"""Finished runs as tables: means in the layout of the paper, and paired differences with their confidence."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator, Sequence

from benchmarks import peft_methods
from benchmarks.segmentation import distillers
from benchmarks.segmentation.rows import Row
from benchmarks.segmentation.settings import ZERO_SHOT, Settings
from benchmarks.segmentation.statistics import paired_difference

# Those by which each domain is judged in the paper's tables, with the one that is compared here.
METRICS_OF = {"kvasir_seg": ("s_measure", "e_adaptive", "iou"), "isic2018_task1": ("jaccard", "dice", "iou")}
OTHER_METRICS = ("iou", "dice")
NAMES = {
    "s_measure": "S",
    "e_adaptive": "E",
    "e_mean": "mean E",
    "wf": "wF",
    "wf_03": "wF .3",
    "jaccard": "Jac",
    "dice": "Dice",
    "iou": "IoU",
}
Method = tuple[str, str]


class Table:
    """The finished runs of one model and recipe.

    Args:
        rows: of equal ``settings.recipe``, but for those of the untrained model.

    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self.runs: dict[tuple[Settings, Method], dict[int, Row]] = {}
        for row in rows:
            settings = row.settings
            self.runs.setdefault((_column(settings), _method(settings)), {})[settings.seed] = row
        order = {name: i for i, name in enumerate((ZERO_SHOT, *peft_methods.METHODS, *distillers.DISTILLERS))}
        found = {method for _, method in self.runs}
        self.methods = sorted(found, key=lambda method: [order.get(name, len(order)) for name in method])
        columns = {column for column, (peft, _) in self.runs if peft != ZERO_SHOT}
        self.columns = sorted(columns, key=lambda column: (column.data, column.epochs))

    def means(self, metrics: Sequence[str] = ()) -> str:
        """Return mean and standard deviation over seeds of every method, as Markdown, in percent.

        Args:
            metrics: names of ``metrics.METRICS``; none for those of each data set in the paper.

        """
        cells = [
            (column, metric)
            for column in self.columns
            for metric in metrics or METRICS_OF.get(column.data, OTHER_METRICS)
        ]
        titles = [f"{column.data} {NAMES[metric]}" for column, metric in cells]
        lines = [f"| PEFT | distiller | {' | '.join(titles)} |", "|---" * (len(titles) + 2) + "|"]
        for method in self.methods:
            values = [_mean_and_deviation(self._seeds(column, method), metric) for column, metric in cells]
            lines.append(f"| {_shown(method)} | {' | '.join(values)} |")
        return "\n".join(lines)

    def differences(self, metric: str, against: str = "none") -> str:
        """Return every distiller's paired difference from another with its confidence interval, as Markdown.

        Only seeds that both have count. In percent points, 95 %.
        """
        lines = [
            f"| PEFT | {NAMES[metric]} less that of {against} | {' | '.join(c.data for c in self.columns)} |",
            "|---" * (len(self.columns) + 2) + "|",
        ]
        for peft, distiller in self.methods:
            if peft != ZERO_SHOT and distiller != against:
                cells = [self._difference(column, peft, distiller, against, metric) for column in self.columns]
                lines.append(f"| {_shown((peft, distiller))} | {' | '.join(cells)} |")
        return "\n".join(lines)

    def _difference(self, column: Settings, peft: str, distiller: str, against: str, metric: str) -> str:
        method, baseline = (self._seeds(column, (peft, name)) for name in (distiller, against))
        seeds = sorted(method.keys() & baseline.keys())
        # The same list of the same files, of which a run may have skipped some.
        images = [name for name in _images(method, seeds) if name in set(_images(baseline, seeds))]
        if not seeds or len(images) * len(seeds) < 2:
            return ""
        both = ([_values(runs[seed], metric, images) for seed in seeds] for runs in (method, baseline))
        found = paired_difference(*both)
        interval = f"[{100 * found.low:+.2f}, {100 * found.high:+.2f}]"
        one = ", one seed" if found.n_seeds == 1 else f", {found.n_seeds} seeds"
        return f"{100 * found.mean:+.2f} {interval}{one}"

    def _seeds(self, column: Settings, method: Method) -> dict[int, Row]:
        if method[0] == ZERO_SHOT:
            return {
                seed: row
                for (other, (peft, _)), runs in self.runs.items()
                if peft == ZERO_SHOT and other.test == column.test
                for seed, row in runs.items()
            }
        return self.runs.get((column, method), {})


def tables(rows: Sequence[Row]) -> Iterator[tuple[str, Table]]:
    """Yield a title and a table for every model and recipe among the rows."""
    trained = [row for row in rows if row.settings.peft != ZERO_SHOT]
    untrained = [row for row in rows if row.settings.peft == ZERO_SHOT]
    for recipe in dict.fromkeys(row.settings.recipe for row in trained):
        own = [row for row in trained if row.settings.recipe == recipe]
        tested = {row.settings.test for row in own}
        yield _title(own), Table([*own, *(row for row in untrained if row.settings.test in tested)])


def _title(rows: Sequence[Row]) -> str:
    settings = rows[0].settings
    images = f"{settings.train_images or 'all'} training and {settings.test_images or 'all'} test images"
    passes = ", ".join(dict.fromkeys(f"{row.settings.data} {row.settings.epochs}" for row in rows))
    where = ", ".join(dict.fromkeys(f"{row.environment['device']}, torch {row.environment['torch']}" for row in rows))
    commits = ", ".join(dict.fromkeys(str(row.environment["commit"]) for row in rows))
    return (
        f"{settings.model} at {settings.image_size} pixels, {images} of each set, batches of {settings.batch_size}, "
        f"learning rate {settings.lr:g}, autocast {settings.amp}, epochs: {passes}. {where}, commit {commits}."
    )


def _column(settings: Settings) -> Settings:
    """Return the settings without what distinguishes the rows of a table."""
    return dataclasses.replace(settings, peft="", distiller="", seed=0)


def _method(settings: Settings) -> Method:
    return settings.peft, settings.distiller


def _shown(method: Method) -> str:
    peft, distiller = method
    return f"{peft.replace('_', '-')} | {'' if peft == ZERO_SHOT else distiller}"


def _mean_and_deviation(runs: dict[int, Row], metric: str) -> str:
    means = [100 * row.mean(metric) for row in runs.values()]
    if not means:
        return ""
    return f"{statistics.mean(means):.1f}" + (f" ± {statistics.stdev(means):.1f}" if len(means) > 1 else "")


def _images(runs: dict[int, Row], seeds: Sequence[int]) -> list[str]:
    common = set.intersection(*(set(runs[seed].images) for seed in seeds)) if seeds else set()
    return sorted(common)


def _values(row: Row, metric: str, images: Sequence[str]) -> list[float]:
    values = dict(zip(row.images, row.metrics[metric], strict=True))
    return [values[name] for name in images]
