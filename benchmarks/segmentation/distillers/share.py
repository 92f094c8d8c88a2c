"""A distiller at a given share of the task's gradient, whatever it reads of the student."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from benchmarks.segmentation.distillers.base import Distiller
from benchmarks.segmentation.observation import Observation
from renyi_kd.gradient_share import GradientMeasurement
from renyi_kd.sam.reads import Read, Reads, read
from renyi_kd.share_control import FIRST_WEIGHT, MOST_GROWTH, NEWEST


class ShareControl:
    """The weight at which a loss has a share of the task's gradient, by the share of earlier steps.

    The rule is that of ``gradient_share`` of :class:`renyi_kd.InfoSAMLoss`: the share over a mean of the shares that
    weight 1 would have had, and at most twice the weight of the step before. The largest share counts of all places
    where the loss reads the student. A step that measures nothing finite and positive moves nothing.

    Args:
        share: of the task's gradient, above 0; None for weight 1, whatever the share.

    """

    def __init__(self, share: float | None) -> None:
        self.share, self.weight = share, 1.0 if share is None else FIRST_WEIGHT
        self.measured = math.nan
        self._mean, self._n_steps = 0.0, 0
        self._last: Sequence[GradientMeasurement] = ()

    def next_weight(self) -> float:
        """Return the weight of a step, which follows what the step before has measured."""
        self._measure()
        if self.share is not None and math.isfinite(self.measured) and self.measured > 0:
            self._n_steps += 1
            self._mean += max(1 / self._n_steps, NEWEST) * (self.measured / self.weight - self._mean)
            self.weight = min(self.share / self._mean, MOST_GROWTH * self.weight)
        return self.weight

    def follow(self, measurements: Sequence[GradientMeasurement], weight: float) -> None:
        """Let the next backward be measured, of a loss with this weight."""
        self._last, self.weight = measurements, weight

    def state(self) -> dict[str, float]:
        """Return weight and share of the last step; the share of the one before where backward has not run yet."""
        if self._last:
            self._measure()
        return {"weight": self.weight, "gradient_share": self.measured}

    def _measure(self) -> None:
        shares = [one for each in self._last for one in each.share() if one is not None]
        values = [value for value in (one.item() for one in shares) if math.isfinite(value)]
        self.measured = max(values) if values else math.nan


class AtShare(Distiller):
    """A distiller whose weight follows its share of the task's gradient where it reads the student.

    The share is measured at image features, mask tokens, mask logits and the encoder's stages, as far as it reads them.
    What it sends back from a later place to an earlier one counts as the task's, as in :mod:`renyi_kd.gradient_share`.

    Args:
        distiller: with the weights of its source.
        share: of the task's gradient; None to measure it alone.

    """

    def __init__(self, distiller: Distiller, share: float | None) -> None:
        super().__init__(distiller.layer_channels)
        self.distiller, self.control = distiller, ShareControl(share)
        self.needs_layers = distiller.needs_layers

    def forward(self, teacher: Observation, student: Observation, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the loss at its weight, ``[]`` in fp32."""
        weight = self.control.next_weight()
        logits, of_logits = read(student.logits)
        layers = [read(*pair) for pair in zip(student.layers, student.layer_sources, strict=True)]
        seen = student._replace(logits=logits, layers=tuple(layer for layer, _ in layers))
        loss = self.distiller(teacher, seen, batch)
        measured = [
            getattr(student.features, "reads", Reads()),
            Reads(mask_tokens=_known(of_logits)),
            *(Reads(image_features=_known(of_layer)) for _, of_layer in layers),
        ]
        self.control.follow([GradientMeasurement(each) for each in measured], weight)
        return loss if self.control.share is None else weight * loss

    def state(self) -> dict[str, float]:
        """Return what the distiller says of itself, weight and share."""
        return {**self.distiller.state(), **self.control.state()}


def _known(one: Read | None) -> tuple[Read, ...]:
    return () if one is None else (one,)
