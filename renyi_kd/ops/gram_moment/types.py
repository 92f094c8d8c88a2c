"""What every implementation takes as a kernel between samples."""

from __future__ import annotations

from typing import Literal, NamedTuple


class SampleKernel(NamedTuple):
    """A kernel between samples, scaled to 1 between a sample and itself.

    Attributes:
        name: which.
        scale: the bandwidth of ``"rbf"``, the offset of ``"polynomial"``.
        degree: of ``"polynomial"``.

    """

    name: Literal["linear", "rbf", "polynomial"]
    scale: float = 0.0
    degree: int = 1
