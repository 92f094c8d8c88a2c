"""What the runs of a protocol come to, as Markdown: means, differences, WiSE-FT's curve, rates, and the gates."""

from __future__ import annotations

from collections.abc import Sequence

import pandas

from benchmarks.markdown import markdown
from benchmarks.segmentation.evaluation import LAST, is_along
from benchmarks.segmentation.experiment import PLAIN, Candidate, Experiment
from benchmarks.segmentation.said import paired, said
from benchmarks.segmentation.statistics import holm

# Points of IoU below zero-shot, and below the best state, from which a setting has something to keep.
RETENTION_GATE, STATE_GATE = 2.0, 1.0
# The forms of the protocol, of which the p-values are corrected for their number.
FORMS = ("infosam_debiased at 0.1", "infosam_jensen_renyi at 0.1")
BOTH = {"in-domain", "retention"}


def means_table(experiment: Experiment) -> str:
    """Return every method's rate and mean IoU ± standard deviation over the seeds, in percent.

    "Share" is that of the task's gradient: the median of what was measured at the ends of the run's quarters.
    "Both" is the mean of in-domain and retention, and their harmonic mean, as published comparisons have them.
    """
    rows = {}
    if experiment.zero_shot:
        zero = {group: experiment.zero_shot_mean(group) for group in experiment.groups}
        rows["zero-shot"] = {"rate": "", "share": "", **{name: _percent(value) for name, value in zero.items()}}
        if zero.keys() >= BOTH and None not in zero.values():
            rows["zero-shot"]["both"] = _both(*(pandas.Series([zero[name]]) for name in sorted(BOTH)))
    for candidate in _with_rate(experiment):
        rows[candidate.label] = {
            "rate": f"{experiment.best_rate(candidate):g}",
            "share": "" if (share := experiment.share(candidate)) is None else f"{share:.3g}",
            **{group: _mean(experiment.seeds(candidate, group)) for group in experiment.groups},
        }
        if experiment.groups.keys() >= BOTH:
            rows[candidate.label]["both"] = _both(*(experiment.seeds(candidate, name) for name in sorted(BOTH)))
    return _table(rows, "method")


def differences_table(experiment: Experiment) -> str:
    """Return every method's paired difference from plain fine-tuning, each at its own best rate, in percent points."""
    rows = {
        candidate.label: {
            group: said(paired(experiment.values(candidate, group), experiment.values(Candidate(PLAIN), group)))
            for group in experiment.groups
        }
        for candidate in _with_rate(experiment)
        if candidate != Candidate(PLAIN)
    }
    return _table(rows, "less plain fine-tuning")


def curve_table(experiment: Experiment, forms: Sequence[str] = FORMS) -> str:
    """Return every method's difference from WiSE-FT's curve of plain fine-tuning at equal in-domain IoU.

    The p-values of the forms are corrected for their number by Holm's procedure.
    """
    compared = [one for one in _with_rate(experiment) if not experiment.is_of_curve(one)]
    cells: dict[str, dict[str, str]] = {one.label: {} for one in compared}
    for group in experiment.groups:
        if group.startswith("in-domain"):
            continue
        found = {}
        for one in compared:
            bar = experiment.curve_values(one, group)
            found[one.label] = None if bar is None else paired(experiment.values(one, group), bar)
        tested = [name for name in forms if found.get(name) is not None]
        corrected = dict(zip(tested, holm([found[name].p for name in tested]), strict=True))
        for name, difference in found.items():
            p = f", p {corrected[name]:.3f}" if name in corrected else ""
            cells[name][group] = said(difference) + p
    return _table(cells, "less WiSE-FT's curve")


def rates_table(experiment: Experiment) -> str:
    """Return the mean IoU at every rate, their mean and the worst, by method, in percent."""
    shown = [group for group in ("in-domain", "transfer", "retention") if group in experiment.groups]
    rates = sorted({rate for one in experiment.candidates() for rate in experiment.rates(one)})
    rows = {}
    for candidate in experiment.candidates():
        own = experiment.rates(candidate)
        cells = {}
        for group in shown:
            values = {rate: experiment.seeds(candidate, group, rate).mean() for rate in own}
            for rate in rates:
                cells[f"{group} at {rate:g}"] = _percent(values.get(rate))
            # Of a method that lacks a rate the mean would be of other rates.
            whole = list(values.values()) if own == rates else []
            cells[f"{group}, mean"] = _percent(sum(whole) / len(whole) if whole else None)
            cells[f"{group}, worst"] = _percent(min(whole) if whole else None)
        rows[candidate.label] = cells
    return _table(rows, "method")


def gates_table(found: Sequence[Experiment]) -> str:
    """Return where plain fine-tuning at its best rate loses something, one row a setting.

    A setting passes for retention if its mean lies 2 points or more below zero-shot, likewise for transfer; and for
    overfitting if the state after the last step lies 1 point or more below the best state in the domain.
    """
    rows = []
    for experiment in found:
        plain, one = Candidate(PLAIN), experiment.settings
        cells = {"data": one.data, "PEFT": one.peft, "images": str(one.train_images or "all")}
        candidates = experiment.candidates()
        rate = experiment.best_rate(plain) if plain in candidates else None
        if rate is None:
            continue
        cells["rate"] = f"{rate:g}"
        passed = []
        for group in ("in-domain", "transfer", "retention", "corruption"):
            if group not in experiment.groups or experiment.zero_shot_mean(group) is None:
                cells[f"{group} less zero-shot"] = ""
                continue
            own = experiment.values(plain, group)
            difference = paired(own, experiment.zero_shot_values(group, own))
            cells[f"{group} less zero-shot"] = said(difference)
            if group in ("transfer", "retention") and difference and 100 * difference.mean <= -RETENTION_GATE:
                passed.append(group)
        best = _best_state(experiment, rate)
        cells["last state less best"] = "" if best is None else f"{100 * best[1]:+.2f} ({best[0]})"
        if best is not None and 100 * best[1] <= -STATE_GATE:
            passed.append("overfitting")
        rows.append({**cells, "passes for": ", ".join(passed) or "nothing"})
    return markdown(pandas.DataFrame(rows).set_index("data")) if rows else ""


def report(found: Sequence[Experiment], forms: Sequence[str] = FORMS) -> str:
    """Return all tables of all experiments."""
    parts = ["Where plain fine-tuning loses something:", gates_table(found)]
    for experiment in found:
        parts += [f"**{experiment.title}**"]
        if any(experiment.best_rate(one) is None for one in experiment.candidates()):
            parts += ["Several rates and no validation images: no rate can be chosen for some methods."]
        parts += ["Mean IoU, each method at its best rate on the validation images:", means_table(experiment)]
        if Candidate(PLAIN) in _with_rate(experiment):
            parts += ["Differences, with the smallest effect that so many seeds show:", differences_table(experiment)]
        parts += ["Against WiSE-FT's curve at equal in-domain IoU:", curve_table(experiment, forms)]
        parts += ["Over the rates:", rates_table(experiment)]
    return "\n\n".join(part for part in parts if part)


def _best_state(experiment: Experiment, rate: float) -> tuple[str, float] | None:
    """Return the plain state of the highest in-domain IoU along the run, and the last state's difference from it."""
    means = {
        one.state: experiment.seeds(one, "in-domain", rate).mean()
        for one in experiment.candidates()
        if one.method == PLAIN and (one.state == LAST or is_along(one.state))
    }
    if len(means) < 2:
        return None
    best = max(means, key=lambda state: means[state])
    return best, means[LAST] - means[best]


def _with_rate(experiment: Experiment) -> list[Candidate]:
    return [one for one in experiment.candidates() if experiment.best_rate(one) is not None]


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _mean(seeds: pandas.Series) -> str:
    if seeds.empty:
        return ""
    return f"{100 * seeds.mean():.1f}" + (f" ± {100 * seeds.std():.1f}" if len(seeds) > 1 else "")


def _both(own: pandas.Series, other: pandas.Series) -> str:
    return f"{100 * ((own + other) / 2).mean():.1f}, {100 * (2 * own * other / (own + other)).mean():.1f}"


def _table(rows: dict[str, dict[str, str]], name: str) -> str:
    if not rows or not next(iter(rows.values())):
        return ""
    return markdown(pandas.DataFrame.from_dict(rows, orient="index").fillna("").rename_axis(name))
