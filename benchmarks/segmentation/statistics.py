"""How sure a difference of two methods is, measured with the same seeds on the same images."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class Difference(NamedTuple):
    """A paired difference of two methods.

    Attributes:
        mean: over seeds and images.
        low: lower end of the confidence interval.
        high: upper end.
        n_seeds: 1 means that the interval speaks of this seed alone.
        n_images: of each seed.
        p: probability of a mean as far from zero or farther, if the truth is zero.
        detectable: the smallest true difference that so many seeds show four times in five; NaN of one seed.

    """

    mean: float
    low: float
    high: float
    n_seeds: int
    n_images: int
    p: float
    detectable: float


def paired_difference(method: ArrayLike, baseline: ArrayLike, *, confidence: float = 0.95) -> Difference:
    """Return the mean difference and its confidence interval for other seeds and other images.

    Seeds and images are crossed random effects: ``d[s, i] = mean + seed_s + image_i + error_si``. With the mean squares
    MS of a two-way table without repetition, ``(MS_seed + MS_image - MS_error) / (S I)`` is the unbiased variance of
    the mean (Satterthwaite, 1946, has its degrees of freedom, for the t distribution); it is not taken below what
    either effect gives alone. With one seed, seeds cannot be told from chance, and the interval is for other images
    only; likewise with one image.

    Args:
        method: ``[n_seeds, n_images]``, a metric of one method.
        baseline: of another, for the same seeds and images.
        confidence: of the interval, two-sided.

    Raises:
        ValueError: the shapes differ or are not two-dimensional, or there is only one number.

    """
    from scipy import stats

    method, baseline = np.asarray(method, float), np.asarray(baseline, float)
    if method.shape != baseline.shape or method.ndim != 2 or method.size < 2:
        raise ValueError(
            "paired_difference: both must have one shape [n_seeds, n_images] of at least two numbers, got "
            f"{method.shape} and {baseline.shape}; leave out what only one of them has"
        )
    difference = method - baseline
    n_seeds, n_images = difference.shape
    mean = difference.mean()
    of_seeds, of_images = difference.mean(1) - mean, difference.mean(0) - mean
    error = difference - mean - of_seeds[:, None] - of_images
    # Sums of squares with their degrees of freedom.
    seed = n_images * (of_seeds**2).sum(), n_seeds - 1
    image = n_seeds * (of_images**2).sum(), n_images - 1
    rest = (error**2).sum(), (n_seeds - 1) * (n_images - 1)
    seed, image, rest = (_mean_square(*each) for each in (seed, image, rest))
    both = seed[0] + image[0] - rest[0]
    if both > max(seed[0], image[0]) and rest[1]:
        freedom = both**2 / sum(square**2 / df for square, df in (seed, image, rest))
    else:
        both, freedom = max(seed, image)
    error_of_mean = math.sqrt(both / difference.size)
    width = stats.t.ppf(0.5 + confidence / 2, freedom) * error_of_mean
    p = 2 * stats.t.sf(abs(mean) / error_of_mean, freedom) if error_of_mean else float(mean == 0)
    detectable = detectable_deviations(n_seeds) * difference.mean(1).std(ddof=1) if n_seeds > 1 else math.nan
    return Difference(mean, mean - width, mean + width, n_seeds, n_images, float(p), float(detectable))


@functools.cache
def detectable_deviations(n_seeds: int, *, level: float = 0.05, power: float = 0.8) -> float:
    """Return the smallest difference that a paired t test shows, in standard deviations of the seeds' differences.

    Args:
        n_seeds: 2 or more.
        level: of the test, two-sided.
        power: how often the test is to show it.

    """
    from scipy import optimize, stats

    freedom = n_seeds - 1
    critical = stats.t.ppf(1 - level / 2, freedom)
    # The deviation of the seeds over the true one, at evenly spaced probabilities: the noncentral t distribution of
    # SciPy is NaN in a tail.
    spread = np.sqrt(stats.chi2.ppf((np.arange(4096) + 0.5) / 4096, freedom) / freedom)

    def lacking(shift: float) -> float:
        shown = stats.norm.cdf(shift - critical * spread) + stats.norm.cdf(-shift - critical * spread)
        return float(power - shown.mean())

    return float(optimize.brentq(lacking, 0, 10 * critical) / math.sqrt(n_seeds))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number, in their order.

    Source: Holm: A Simple Sequentially Rejective Multiple Test Procedure, Scandinavian Journal of Statistics 6, 1979.
    """
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    corrected, largest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        corrected[index] = largest
    return corrected


def _mean_square(squares: float, df: int) -> tuple[float, int]:
    return (float(squares) / df if df else 0.0), df
