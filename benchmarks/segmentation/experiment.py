"""The runs of one setting: every method's scores at its own best rate, and WiSE-FT's curve of plain fine-tuning."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import pandas

from benchmarks.segmentation.evaluation import LAST, is_along
from benchmarks.segmentation.rows import Row
from benchmarks.segmentation.settings import ZERO_SHOT, Settings
from benchmarks.segmentation.states import wise_name

# What distillers say of the last step; of a form of InfoSAM the larger of two places.
SHARES = ("gradient_share", "image_features_share", "mask_tokens_share")
PLAIN, EARLY_STOP = "none", "early stop"
_LEVELS = ("method", "lr", "state", "seed", "test", "image")


class Candidate(NamedTuple):
    """A method in one of its states."""

    method: str
    state: str = LAST

    @property
    def label(self) -> str:
        """Return the name in a table."""
        return self.method if self.state == LAST else f"{self.method}, {self.state}"


class Experiment:
    """All runs that differ in method, learning rate and seed alone.

    Args:
        rows: of trained models, with results beside those of the test images.
        untrained: of the model as it is.
        transfer: names of the test sets of the same task.

    """

    def __init__(self, rows: Sequence[Row], untrained: Row | None, transfer: Sequence[str] = ()) -> None:
        self.settings = setting_of(rows[0].settings)
        self.rows = rows
        parts = {}
        for row in rows:
            for test, result in row.also.items():
                for state, values in result["iou"].items():
                    key = (row.settings.method, row.settings.lr, state, row.settings.seed, test)
                    parts[key] = pandas.Series(values, result["images"], dtype=float)
        self.scores = pandas.concat(parts, names=_LEVELS).sort_index()
        self.validation = [test for test in self.tests if test.startswith(f"{self.settings.data} validation/")]
        stopped = self._early_stop()
        if stopped is not None:
            self.scores = pandas.concat([self.scores, stopped]).sort_index()
        also = {} if untrained is None else untrained.also
        self.zero_shot = {
            test: pandas.Series(result["iou"][LAST], result["images"], dtype=float) for test, result in also.items()
        }
        self.groups = groups(self.tests, self.settings.data, transfer)
        # Means over the images, of which every seed of a test has the same but those for validation.
        self.means = self.scores.groupby(list(_LEVELS[:-1])).mean()

    @property
    def tests(self) -> list[str]:
        """Names of all results."""
        return list(self.scores.index.unique("test"))

    @property
    def title(self) -> str:
        """Return what the reader needs to know of the setting."""
        one = self.settings
        images = f"{one.train_images or 'all'} images" + (" drawn by the seed" if one.draw_images else "")
        length = f"{one.steps} steps" if one.steps else f"{one.epochs} epochs"
        changes = ", flips and crops" if one.augment else ""
        kept = f", {one.held_out} of them for validation" if one.held_out else ""
        return (
            f"{one.model} at {one.image_size} pixels, {one.peft}, {one.data}: {images}{kept}, {length} of "
            f"{one.batch_size}{changes}, autocast {one.amp}"
        )

    def candidates(self) -> list[Candidate]:
        """Return plain fine-tuning in all its states, and all other methods in their last one and half-way back."""
        found = [Candidate(*pair) for pair in self.scores.index.droplevel(["lr", "seed", "test", "image"]).unique()]
        shown = [one for one in found if one.method == PLAIN or one.state in (LAST, wise_name(0.5))]
        return sorted(shown, key=lambda one: (one.method != PLAIN, one.method, one.state != LAST, one.state))

    def rates(self, candidate: Candidate) -> list[float]:
        """Return the learning rates of which a method has runs."""
        return sorted(self.means.xs((candidate.method, candidate.state), level=("method", "state")).index.unique("lr"))

    def best_rate(self, candidate: Candidate) -> float | None:
        """Return the rate of the highest IoU on the validation images, in the mean over the seeds; the lower of equals.

        None where several rates were run without validation images.
        """
        rates = self.rates(candidate)
        if len(rates) == 1:
            return rates[0]
        if not self.validation:
            return None
        means = [self._seeds(candidate, rate, self.validation).mean() for rate in rates]
        return rates[means.index(max(means))]

    def seeds(self, candidate: Candidate, group: str, rate: float | None = None) -> pandas.Series:
        """Return the mean IoU of every seed over the sets of a group, at the best rate or another."""
        rate = self.best_rate(candidate) if rate is None else rate
        return self._seeds(candidate, rate, self.groups[group])

    def values(self, candidate: Candidate, group: str) -> pandas.DataFrame:
        """Return scores ``[seeds, images]`` at the best rate; of several sets the mean of each seed alone."""
        tests = self.groups[group]
        if len(tests) > 1:
            return self.seeds(candidate, group).to_frame("all")
        own = self.scores.loc[candidate.method, self.best_rate(candidate), candidate.state]
        # Nothing where a state along the run is not tested on them.
        return own[own.index.isin(tests, level="test")].droplevel("test").unstack("image")

    def zero_shot_mean(self, group: str) -> float | None:
        """Return the mean IoU of the model as it is over the sets of a group."""
        tests = self.groups[group]
        if not all(test in self.zero_shot for test in tests):
            return None
        return sum(self.zero_shot[test].mean() for test in tests) / len(tests)

    def zero_shot_values(self, group: str, like: pandas.DataFrame) -> pandas.DataFrame:
        """Return the scores of the model as it is, the same for all seeds of other scores."""
        tests = self.groups[group]
        row = self.zero_shot[tests[0]] if len(tests) == 1 else pandas.Series({"all": self.zero_shot_mean(group)})
        return pandas.DataFrame([row] * len(like), like.index)

    def curve_values(self, candidate: Candidate, group: str) -> pandas.DataFrame | None:
        """Return what WiSE-FT's curve of plain fine-tuning has where a method is, as scores like those of the method.

        Of a seed's curve, straight between its points, the point counts that is best in the group among those with the
        in-domain IoU of the method or more; where the curve has none, that of its highest in-domain IoU. None without
        a curve.
        """
        curve = self._curve()
        if curve is None:
            return None
        own, bars = self.seeds(candidate, "in-domain"), {}
        for seed in own.index:
            points = [(self._of_seed(point, "in-domain", seed), self._of_seed(point, group, seed)) for point in curve]
            if any(value is None for point in points for value in point):
                continue
            means = [(in_domain.mean(), other.mean()) for in_domain, other in points]
            place, part = best_at_equal(means, own[seed])
            lower, upper = points[place][1], points[min(place + 1, len(points) - 1)][1]
            bars[seed] = (1 - part) * lower + part * upper
        return pandas.DataFrame(bars).T.rename_axis("seed") if bars else None

    def share(self, candidate: Candidate) -> float | None:
        """Return the share of the task's gradient that a method had at its best rate, the median of what was logged.

        None of a method that adds no loss, or of which nothing is known.
        """
        rate = self.best_rate(candidate)
        logged = []
        for row in self.rows:
            if (row.settings.method, row.settings.lr) == (candidate.method, rate):
                for one in row.history:
                    known = [one[name] for name in SHARES if math.isfinite(one.get(name, math.nan))]
                    logged += [max(known)] if known else []
        return statistics.median(logged) if logged else None

    def is_of_curve(self, candidate: Candidate) -> bool:
        """Return whether a method is a point of the curve itself."""
        return candidate.method == PLAIN and (candidate.state == LAST or candidate.state.startswith("wise "))

    def _curve(self) -> list[str] | None:
        """Return the states of plain fine-tuning from no weight of the trained model to all of it."""
        states = {one.state for one in self.candidates() if one.method == PLAIN}
        weights = sorted(float(state.split()[1]) for state in states if state.startswith("wise "))
        inner = [wise_name(weight) for weight in weights if 0 < weight < 1]
        return [ZERO_SHOT, *inner, LAST] if inner and self.zero_shot else None

    def _of_seed(self, state: str, group: str, seed: int) -> pandas.Series | None:
        """Return the scores of a point of the curve, per image or as the mean of several sets."""
        plain = Candidate(PLAIN)
        if state == ZERO_SHOT:
            one = pandas.DataFrame(index=[seed])
            return self.zero_shot_values(group, one).iloc[0]
        rate, tests = self.best_rate(plain), self.groups[group]
        found = [
            self.scores.loc[PLAIN, rate, state, seed, test]
            for test in tests
            if (PLAIN, rate, state, seed, test) in self.means.index
        ]
        if len(found) < len(tests):
            return None
        return found[0] if len(tests) == 1 else pandas.Series({"all": sum(one.mean() for one in found) / len(found)})

    def _seeds(self, candidate: Candidate, rate: float | None, tests: Sequence[str]) -> pandas.Series:
        chosen = self.means.loc[candidate.method, rate, candidate.state]
        return chosen[chosen.index.isin(tests, level="test")].groupby("seed").mean()

    def _early_stop(self) -> pandas.Series | None:
        """Return the scores of every plain run in its best state on the validation images, as a state of its own."""
        if not self.validation or PLAIN not in self.scores.index.unique("method"):
            return None
        plain = self.scores.loc[[PLAIN]]
        along = [state for state in plain.index.unique("state") if state == LAST or is_along(state)]
        if len(along) < 2:
            return None
        plain = plain[plain.index.isin(along, level="state")]
        # What is tested at the end alone would be there for some seeds only.
        n_states = plain.index.to_frame(index=False).groupby("test")["state"].nunique()
        plain = plain[plain.index.isin(n_states.index[n_states == len(along)], level="test")]
        checked = plain[plain.index.isin(self.validation, level="test")]
        means = checked.groupby(["method", "lr", "seed", "state"]).mean()
        best = means.groupby(["method", "lr", "seed"]).idxmax()
        stopped = [plain.xs(key, level=("method", "lr", "seed", "state"), drop_level=False) for key in best]
        found = pandas.concat(stopped).reset_index()
        return found.assign(state=EARLY_STOP).set_index(list(_LEVELS))[0]


def best_at_equal(curve: Sequence[tuple[float, float]], in_domain: float) -> tuple[int, float]:
    """Return where a curve of (in-domain, other) has its largest other value with so much in the domain or more.

    As the number of a point, and the part of the way to the next.
    """
    found: list[tuple[float, int, float]] = []
    for place, (own, other) in enumerate(curve):
        if own >= in_domain:
            found.append((other, place, 0.0))
        if place + 1 < len(curve):
            next_own, next_other = curve[place + 1]
            if min(own, next_own) < in_domain < max(own, next_own):
                part = (in_domain - own) / (next_own - own)
                found.append((other + part * (next_other - other), place, part))
    if not found:
        place = max(range(len(curve)), key=lambda index: curve[index][0])
        return place, 0.0
    _, place, part = max(found)
    return place, part


def groups(tests: Sequence[str], data: str, transfer: Sequence[str]) -> dict[str, list[str]]:
    """Return the results of each endpoint: by box, or by points alone where a folder has no box; then by points."""
    found: dict[str, list[str]] = {}
    for test in tests:
        name, _, prompt = test.rpartition("/")
        first, *changed = name.split(" ")
        if changed == ["validation"]:
            continue
        kind = "transfer" if first in transfer else "retention"
        if first == data:
            kind = "corruption" if changed else "in-domain"
        beside_box = prompt == "points" and f"{name}/box" in tests
        found.setdefault(f"{kind}, points" if beside_box else kind, []).append(test)
    order = ("in-domain", "transfer", "retention", "corruption")
    return {
        name: found[name] for part in ("", ", points") for name in (f"{one}{part}" for one in order) if name in found
    }


def setting_of(settings: Settings) -> Settings:
    """Return what the runs of an experiment share."""
    return dataclasses.replace(settings, distiller="", seed=0, lr=0.0, share=0.0)


def experiments(rows: Sequence[Row], transfer: Sequence[str] = ()) -> Iterator[Experiment]:
    """Yield the experiments among finished runs that have results beside those of the test images."""
    trained = [row for row in rows if row.settings.peft != ZERO_SHOT and row.also]
    untrained = {row.settings.test: row for row in rows if row.settings.peft == ZERO_SHOT and row.also}
    for setting in dict.fromkeys(setting_of(row.settings) for row in trained):
        own = [row for row in trained if setting_of(row.settings) == setting]
        yield Experiment(own, untrained.get(setting.test), transfer)
