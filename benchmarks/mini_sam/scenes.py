"""Generated scenes with instance labels: what mini SAM is pretrained on.

A scene is a background with many class-agnostic objects of varied shape, size, texture and contrast, drawn back to
front, then blurred and made noisy. The same generator state gives the same scene on any machine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

if TYPE_CHECKING:
    from numpy.random import Generator
    from numpy.typing import NDArray

# Smaller fragments, left over by occlusion, are painted but carry no label: nobody would prompt for them.
MIN_AREA = 16
MAX_OBJECTS = 48
N_ANGLES = 256


class Scene(NamedTuple):
    """A rendered image and which object each pixel shows."""

    image: NDArray[np.float32]
    """RGB in [0, 1], [h, w, 3]."""
    labels: NDArray[np.int32]
    """0 for the background, else the object's id (ids have gaps), [h, w]."""


class Outline(NamedTuple):
    """A star-shaped closed curve under a rotation, a squeeze and a bend."""

    centre: tuple[float, float]
    radius: float
    aspect: float
    angle: float
    bend: float
    hole: float
    profile: NDArray[np.float64]


def random_scene(rng: Generator, height: int, width: int) -> Scene:
    """Draw a scene of `height` x `width` pixels with at least one labelled object.

    Args:
        rng: source of all randomness; advanced by the call.
        height: pixels, at least 32.
        width: pixels, at least 32.

    Returns:
        Scene with image [h, w, 3] float32 and labels [h, w] int32.

    Raises:
        ValueError: a side is below 32 pixels, too small for the largest objects.
    """
    if min(height, width) < 32:
        raise ValueError(
            f"random_scene: height and width must be at least 32 pixels, got {height} x {width}; use a larger scene"
        )
    while True:
        image, base = _background(rng, height, width)
        labels = np.zeros((height, width), np.int32)
        _draw_objects(rng, image, labels, base)
        ids, areas = np.unique(labels, return_counts=True)
        labels[np.isin(labels, ids[areas < MIN_AREA])] = 0
        if labels.any():
            return Scene(_degrade(rng, image), labels)


def smooth_noise(rng: Generator, height: int, width: int, cell: float) -> NDArray[np.float32]:
    """Return noise of about unit scale and correlation length `cell` pixels, [h, w]."""
    coarse = rng.standard_normal((int(height / cell) + 2, int(width / cell) + 2)).astype(np.float32)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def _background(rng: Generator, height: int, width: int) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    low, high = [(0.0, 0.2), (0.15, 0.85), (0.75, 1.0)][rng.choice(3, p=(0.3, 0.45, 0.25))]
    base = rng.uniform(low, high) + rng.normal(0, 0.08, 3)
    ys, xs = np.mgrid[-0.5 : 0.5 : height * 1j, -0.5 : 0.5 : width * 1j]
    direction = rng.uniform(0, 2 * np.pi)
    light = rng.uniform(0, 0.25) * (np.cos(direction) * xs + np.sin(direction) * ys)
    for cell in rng.choice((2, 4, 12, 32, 80), size=rng.integers(0, 4), replace=False):
        light = light + rng.uniform(0, 0.08) * smooth_noise(rng, height, width, cell)
    tint = 1 + rng.normal(0, 0.2, 3)
    return (base + light[..., None] * tint).astype(np.float32), base


def _draw_objects(
    rng: Generator, image: NDArray[np.float32], labels: NDArray[np.int32], base: NDArray[np.float64]
) -> None:
    height, width = labels.shape
    smallest, largest = np.log(3.5), np.log(min(height, width) / 3)
    # Half of the scenes show one kind of thing many times, the others a jumble.
    family = rng.random() < 0.5
    typical = rng.uniform(smallest, largest)
    kind, colour = _random_kind(rng), _contrasting_colour(rng, base)
    clustered, may_overlap = rng.random() < 0.35, rng.random() < 0.7
    area, count = 0.0, rng.integers(3, MAX_OBJECTS)
    centre = None
    for identity in range(1, count + 1):
        log_radius = max(typical + rng.normal(0, 0.2), smallest) if family else rng.uniform(smallest, largest)
        radius = float(np.exp(log_radius))
        if clustered and centre is not None and rng.random() < 0.8:
            centre = tuple(np.add(centre, rng.normal(0, 1.3 * radius, 2)))
        else:
            centre = (rng.uniform(0, height), rng.uniform(0, width))
        row, column = int(np.clip(centre[0], 0, height - 1)), int(np.clip(centre[1], 0, width - 1))
        area += 2 * radius**2
        if area > 0.9 * height * width:
            break
        if labels[row, column] and not may_overlap:
            continue
        outline = _random_outline(rng, centre, radius, kind if family else _random_kind(rng))
        paint = colour + rng.normal(0, 0.04, 3) if family else _contrasting_colour(rng, base)
        _draw(rng, image, labels, outline, paint, identity)


def _random_kind(rng: Generator) -> str:
    return str(rng.choice(("ellipse", "blob", "polygon", "ring", "elongated"), p=(0.25, 0.3, 0.2, 0.1, 0.15)))


def _contrasting_colour(rng: Generator, base: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return a colour at least 0.08 away from `base` in some channel."""
    while True:
        anywhere = rng.random() < 0.7
        colour = (rng.uniform(-0.05, 1.05) if anywhere else base) + rng.normal(0, 0.15, 3)
        if np.abs(colour - base).max() > 0.08:
            return colour


def _random_outline(rng: Generator, centre: tuple[float, float], radius: float, kind: str) -> Outline:
    theta = np.linspace(0, 2 * np.pi, N_ANGLES, endpoint=False)
    profile, aspect, bend, hole = np.ones(N_ANGLES), np.exp(rng.uniform(0, 0.7)), 0.0, 0.0
    if kind == "blob":
        for k in range(2, 8):
            profile += rng.normal(0, 0.22 / k**0.7) * np.cos(k * theta + rng.uniform(0, 2 * np.pi))
        profile = np.clip(profile, 0.25, 2.0) / profile.max()
    elif kind == "polygon":
        profile = _polygon_profile(rng, theta)
    elif kind == "ring":
        hole = rng.uniform(0.35, 0.7)
    elif kind == "elongated":
        aspect, bend = rng.uniform(2.2, 5.0), rng.normal(0, 1.5)
    return Outline(centre, radius, aspect, rng.uniform(0, 2 * np.pi), bend, hole, profile)


def _polygon_profile(rng: Generator, theta: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the distance from the centre to a random polygon's edge in the directions `theta`, largest 1."""
    corners = rng.integers(3, 9)
    angles = (np.arange(corners + 1) + np.append(jitter := rng.uniform(-0.25, 0.25, corners), jitter[0])) / corners
    angles *= 2 * np.pi
    lengths = rng.uniform(0.6, 1.0, corners)
    edge = (np.searchsorted(angles, theta, side="right") - 1) % corners
    start = (lengths * np.exp(1j * angles[:-1]))[edge]
    step = (np.roll(lengths, -1) * np.exp(1j * angles[1:]))[edge] - start
    # The ray t e^(i theta) meets the edge start + s step where both sides' cross product with step agree.
    profile = np.imag(np.conj(start) * step) / np.imag(np.exp(-1j * theta) * step)
    return profile / profile.max()


def _draw(
    rng: Generator,
    image: NDArray[np.float32],
    labels: NDArray[np.int32],
    outline: Outline,
    colour: NDArray[np.float64],
    identity: int,
) -> None:
    (row, column), radius = outline.centre, outline.radius
    reach = radius + 2
    top, left = max(int(row - reach), 0), max(int(column - reach), 0)
    window = np.s_[top : max(int(row + reach) + 1, 0), left : max(int(column + reach) + 1, 0)]
    if labels[window].size == 0:
        return
    ys, xs = np.indices(labels[window].shape, np.float32)
    ys, xs = ys + np.float32(top - row), xs + np.float32(left - column)
    along = np.cos(outline.angle) * xs + np.sin(outline.angle) * ys
    across = np.cos(outline.angle) * ys - np.sin(outline.angle) * xs
    across = outline.aspect * across - outline.bend * (along**2 / radius - radius / 3)
    rho = np.hypot(along, across)
    direction = (np.arctan2(across, along) * (N_ANGLES / (2 * np.pi))).astype(np.int32) % N_ANGLES
    edge = radius * outline.profile[direction]
    inside = np.minimum(edge - rho, rho - outline.hole * edge) if outline.hole else edge - rho
    alpha = np.clip(inside / rng.uniform(1.0, 2.5) + 0.5, 0, 1) * (1 if rng.random() < 0.8 else rng.uniform(0.5, 0.9))

    relative = rho / edge
    light = rng.normal(0, 0.08) * (along / radius) + rng.normal(0, 0.08) * relative**2
    if rng.random() < 0.5:
        light = light + rng.uniform(0, 0.12) * smooth_noise(rng, *rho.shape, cell=rng.uniform(1, 0.5 * radius))
    if rng.random() < 0.2:
        light = light + rng.normal(0, 0.15) * np.sin(along * rng.uniform(0.3, 1.5))
    if rng.random() < 0.25:
        light = light + rng.normal(0, 0.3) * (inside < rng.uniform(1, 3))
    paint = colour + light[..., None]
    image[window] += (alpha[..., None] * (paint - image[window])).astype(np.float32)
    labels[window][inside > 0] = identity


def _degrade(rng: Generator, image: NDArray[np.float32]) -> NDArray[np.float32]:
    """Blur, drop the colour, change the tone curve and add noise, each at random; clip to [0, 1]."""
    if rng.random() < 0.4:
        image = image.mean(2, keepdims=True).repeat(3, 2)
    if rng.random() < 0.5:
        image = gaussian_filter(image, (sigma := rng.uniform(0.3, 1.5), sigma, 0))
    if rng.random() < 0.5:
        image = np.clip(image, 0, 1) ** np.exp(rng.normal(0, 0.35))
    if rng.random() < 0.7:
        grain = rng.standard_normal((*image.shape[:2], rng.choice((1, 3))), dtype=np.float32)
        image = image + rng.uniform(0, 0.08) * grain
    return np.clip(image, 0, 1).astype(np.float32)
