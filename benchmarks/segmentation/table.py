"""Finished runs as tables: means in the layout of the paper, and paired differences with their confidence."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import pandas

from benchmarks import peft_methods
from benchmarks.markdown import markdown
from benchmarks.segmentation.baselines import BASELINES
from benchmarks.segmentation.distillers import DISTILLERS
from benchmarks.segmentation.rows import Row
from benchmarks.segmentation.said import paired, said
from benchmarks.segmentation.settings import ZERO_SHOT, Settings

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
METHOD = ("peft", "distiller")


class Table:
    """The finished runs of one model and recipe.

    Args:
        rows: of equal ``settings.recipe``, but for those of the untrained model.

    Attributes:
        columns: the recipe on each of its data sets.
        scores: every metric of every image, by method, place in ``columns``, seed and image.

    """

    def __init__(self, rows: Sequence[Row]) -> None:
        trained = {_column(row.settings) for row in rows if row.settings.peft != ZERO_SHOT}
        self.columns = sorted(trained, key=lambda column: (column.data, column.epochs))
        scores = pandas.concat(
            [
                pandas.DataFrame({"image": row.images, **row.metrics}).assign(
                    peft=row.settings.peft, distiller=row.settings.method, column=place, seed=row.settings.seed
                )
                for row in rows
                for place, column in enumerate(self.columns)
                if _is_in(row.settings, column)
            ]
        ).set_index([*METHOD, "column", "seed", "image"])
        # Of runs of the untrained model that differ in nothing that it depends on, one.
        self.scores = scores[~scores.index.duplicated(keep="last")]

    def means(self, metrics: Sequence[str] = ()) -> str:
        """Return mean and standard deviation over seeds of every method, as Markdown, in percent.

        Args:
            metrics: names of ``metrics.METRICS``; none for those of each data set in the paper.

        """
        seeds = 100 * self.scores.groupby([*METHOD, "column", "seed"]).mean()
        shown = seeds.groupby([*METHOD, "column"]).agg(_mean_and_deviation).unstack("column", fill_value="")
        cells = [
            (metric, place)
            for place, column in enumerate(self.columns)
            for metric in metrics or METRICS_OF.get(column.data, OTHER_METRICS)
        ]
        titles = [f"{self.columns[place].data} {NAMES[metric]}" for metric, place in cells]
        return markdown(_titled(shown.loc[self._methods(), cells].set_axis(titles, axis=1)))

    def differences(self, metric: str, against: str = "none", *, detectable: bool = False) -> str:
        """Return every distiller's paired difference from another with its confidence interval, as Markdown.

        Only seeds and images that both have count. In percent points, 95 %. On request with the smallest effect that
        so many seeds show.
        """
        compared = [(peft, name) for peft, name in self._methods() if peft != ZERO_SHOT and name != against]
        cells = [
            [
                _difference(*(self._values(peft, one, place, metric) for one in (name, against)), detectable=detectable)
                for place in range(len(self.columns))
            ]
            for peft, name in compared
        ]
        index = pandas.MultiIndex.from_tuples(compared, names=METHOD)
        table = pandas.DataFrame(cells, index, [column.data for column in self.columns])
        return markdown(_titled(table, f"{NAMES[metric]} less that of {against}"))

    def _methods(self) -> list[tuple[str, str]]:
        order = {name: i for i, name in enumerate((ZERO_SHOT, *peft_methods.METHODS, *DISTILLERS, *BASELINES))}
        found = set(self.scores.index.droplevel(["column", "seed", "image"]))
        # A share stands behind its distiller's name.
        return sorted(found, key=lambda method: [(order.get(name.split(" ")[0], len(order)), name) for name in method])

    def _values(self, peft: str, distiller: str, place: int, metric: str) -> pandas.DataFrame:
        """Return a metric of a method, seeds by images."""
        chosen = self.scores.query("peft == @peft and distiller == @distiller and column == @place")
        return chosen[metric].droplevel([*METHOD, "column"]).unstack("image")


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
    length = f"{settings.steps} steps" if settings.steps else f"epochs: {passes}"
    drawn = ", drawn by the seed" if settings.draw_images else ""
    changed = ", flips and crops" if settings.augment else ""
    where = ", ".join(dict.fromkeys(f"{row.environment['device']}, torch {row.environment['torch']}" for row in rows))
    commits = ", ".join(dict.fromkeys(str(row.environment["commit"]) for row in rows))
    return (
        f"{settings.model} at {settings.image_size} pixels, {images} of each set{drawn}{changed}, batches of "
        f"{settings.batch_size}, learning rate {settings.lr:g}, autocast {settings.amp}, {length}. {where}, commit "
        f"{commits}."
    )


def _column(settings: Settings) -> Settings:
    """Return the settings without what distinguishes the rows of a table."""
    return dataclasses.replace(settings, peft="", distiller="", seed=0, share=0.0)


def _is_in(settings: Settings, column: Settings) -> bool:
    """Return whether a run belongs to a column; that of the untrained model to each with its test."""
    return settings.test == column.test if settings.peft == ZERO_SHOT else _column(settings) == column


def _titled(table: pandas.DataFrame, distiller: str = "distiller") -> pandas.DataFrame:
    """Return the table with its methods as readers know them."""
    methods = [(peft.replace("_", "-"), "" if peft == ZERO_SHOT else name) for peft, name in table.index]
    return table.set_axis(pandas.MultiIndex.from_tuples(methods, names=("PEFT", distiller)))


def _mean_and_deviation(seeds: pandas.Series) -> str:
    return f"{seeds.mean():.1f}" + (f" ± {seeds.std():.1f}" if len(seeds) > 1 else "")


def _difference(method: pandas.DataFrame, baseline: pandas.DataFrame, *, detectable: bool) -> str:
    """Return the paired difference of values ``[seeds, images]``; nothing of fewer than two pairs."""
    found = paired(method, baseline)
    return said(found if detectable or found is None else found._replace(detectable=math.nan))
