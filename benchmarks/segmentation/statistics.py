"""How sure a difference of two methods is, measured with the same seeds on the same images."""

from __future__ import annotations

import math
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

    """

    mean: float
    low: float
    high: float
    n_seeds: int
    n_images: int


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
    width = stats.t.ppf(0.5 + confidence / 2, freedom) * math.sqrt(both / difference.size)
    return Difference(mean, mean - width, mean + width, n_seeds, n_images)


def _mean_square(squares: float, df: int) -> tuple[float, int]:
    return (float(squares) / df if df else 0.0), df
