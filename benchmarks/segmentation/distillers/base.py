"""What all distillers share: one call, a teacher without gradient, fp32 inside."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from benchmarks.segmentation.observation import Observation

# Added where a norm or a variance may be zero.
EPS = 1e-6


class Distiller(nn.Module):
    """A distillation loss: ``loss = distiller(teacher, student, batch)``, ``[]`` in fp32, with its weight in it.

    Its parameters, if it has any, belong in the optimiser beside the student's. A child defines :meth:`loss`, which
    gets observations in fp32 with a teacher without gradient, and runs with autocast off.

    Args:
        layer_channels: channels of the encoder's stages, from early to late, if the distiller needs them.

    Attributes:
        needs_layers: whether the observations must hold the encoder's stages.

    Raises:
        ValueError: the distiller needs stages and there are none.

    """

    needs_layers: bool = False

    def __init__(self, layer_channels: Sequence[int] = ()) -> None:
        super().__init__()
        if self.needs_layers and not layer_channels:
            raise ValueError(
                f"{type(self).__name__}: layer_channels must not be empty, got {layer_channels!r}; pass those of "
                "the encoder's stages"
            )
        self.layer_channels = tuple(layer_channels)

    def forward(self, teacher: Observation, student: Observation, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the loss of a step, ``[]`` in fp32.

        Args:
            teacher: what the frozen model computed; gets no gradient.
            student: likewise of the model in training, of the same shapes.
            batch: ``masks [b, p, S, S]``, 0 or 1, and ``inside [b, 1, S, S]``, 1 where the image is.

        Raises:
            ValueError: shapes do not fit each other, or the batch is too small for the loss.

        """
        self._check(teacher, student)
        with torch.autocast(student.logits.device.type, enabled=False):
            return self.loss(self._prepared(teacher, Tensor.detach), self._prepared(student), batch)

    def loss(self, teacher: Observation, student: Observation, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the loss of prepared observations."""
        raise NotImplementedError

    def state(self) -> dict[str, float]:
        """Return what to log about the last step; waits for the device."""
        return {}

    def _prepared(
        self, observation: Observation, change: Callable[[Tensor], Tensor] = lambda value: value
    ) -> Observation:
        """Return an observation in fp32 after a change to its tensors, without stages that are not asked for."""
        features, logits, layers = observation[:3]
        image_features, mask_tokens = (change(value).float() for value in features[:2])
        return Observation(
            features._replace(image_features=image_features, mask_tokens=mask_tokens),
            change(logits).float(),
            tuple(change(layer).float() for layer in layers) if self.needs_layers else (),
        )

    def _check(self, teacher: Observation, student: Observation) -> None:
        name = type(self).__name__
        pairs = [
            ("image_features", teacher.features.image_features, student.features.image_features),
            ("mask_tokens", teacher.features.mask_tokens, student.features.mask_tokens),
            ("logits", teacher.logits, student.logits),
        ]
        if self.needs_layers:
            for owner, observation in (("teacher", teacher), ("student", student)):
                channels = tuple(layer.shape[1] for layer in observation.layers)
                if channels != self.layer_channels:
                    raise ValueError(
                        f"{name}: {owner}.layers must have the channels {self.layer_channels}, got {channels}; "
                        "observe the stages that the distiller was made for"
                    )
            layers = zip(teacher.layers, student.layers, strict=True)
            pairs += [(f"layers[{index}]", *pair) for index, pair in enumerate(layers)]
        for member, of_teacher, of_student in pairs:
            if of_teacher.shape != of_student.shape:
                raise ValueError(
                    f"{name}: {member} of teacher and student must have one shape, got {tuple(of_teacher.shape)} and "
                    f"{tuple(of_student.shape)}; run both on the same images and prompts"
                )


class NoDistillation(Distiller):
    """Zero: the student learns from the masks alone."""

    def loss(self, teacher: Observation, student: Observation, batch: Mapping[str, Tensor]) -> Tensor:
        """Return 0, of which nothing depends on the student."""
        return student.logits.new_zeros(())
