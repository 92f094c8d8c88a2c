"""A paired difference of two tables of scores, and how a table says it."""

from __future__ import annotations

import math

import pandas

from benchmarks.segmentation.statistics import Difference, paired_difference


def paired(method: pandas.DataFrame, baseline: pandas.DataFrame) -> Difference | None:
    """Return the paired difference of scores ``[seeds, images]`` that both have; None of fewer than two pairs."""
    method, baseline = method.align(baseline, join="inner")
    in_all = (method.notna() & baseline.notna()).all()
    method, baseline = method.loc[:, in_all], baseline.loc[:, in_all]
    return paired_difference(method, baseline) if method.size >= 2 else None


def said(difference: Difference | None) -> str:
    """Return a difference in percent points with its interval, its seeds, and what they could have shown."""
    if difference is None:
        return ""
    seeds = "one seed" if difference.n_seeds == 1 else f"{difference.n_seeds} seeds"
    shown = "" if math.isnan(difference.detectable) else f", shows {100 * difference.detectable:.2f}"
    interval = f"[{100 * difference.low:+.2f}, {100 * difference.high:+.2f}]"
    return f"{100 * difference.mean:+.2f} {interval}, {seeds}{shown}"
