"""The gradient of a whole batch at its features, kept for micro-batches whose graphs pass it on one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from renyi_kd.gradient_share import GradientMeasurement
from renyi_kd.micro_batches import MicroBatches
from renyi_kd.ops.autograd import refuse_second_derivative
from renyi_kd.sam.features import SAMFeatures
from renyi_kd.sam.reads import ReadFeatures


class Gradients(NamedTuple):
    """The loss of a whole batch and its gradients, None where there is none.

    Attributes:
        loss: ``[]``, without graph.
        maps: at the student's image features, of each micro-batch.
        tokens: likewise at its mask tokens.
        parameters: at those of the relation module.
        measurement: of its share in the gradient; None where nothing can be measured.

    """

    loss: Tensor
    maps: list[Tensor | None]
    tokens: list[Tensor | None]
    parameters: list[Tensor | None]
    measurement: GradientMeasurement | None


class GradientCache:
    """First the features of micro-batches, then the loss of them together, and its gradients.

    Args:
        micro_batches: what the first pass collects.

    Attributes:
        gradients: None until the loss was computed.

    """

    def __init__(self, micro_batches: MicroBatches) -> None:
        self.micro_batches = micro_batches
        self.gradients: Gradients | None = None

    def differentiate(
        self, loss: Tensor, student: SAMFeatures, parameters: Sequence[Tensor], measurement: GradientMeasurement | None
    ) -> None:
        """Keep the loss and its gradients at the student's features and at parameters, and nothing of its graph."""
        inputs = [*student[:2], *parameters]
        asked = [value for value in inputs if value.requires_grad]
        found = iter(torch.autograd.grad(loss, asked, allow_unused=True))
        maps, tokens, *of_parameters = (next(found) if value.requires_grad else None for value in inputs)
        n_images, n_samples = self.micro_batches.sizes
        self.gradients = Gradients(
            loss.detach(), _split(maps, n_images), _split(tokens, n_samples), of_parameters, measurement
        )

    def part(self, number: int, features: ReadFeatures, parameters: Sequence[Tensor]) -> Tensor:
        """Return the loss of the whole batch, with the gradient of which a micro-batch is due its part.

        The mean over the micro-batches has the gradient of the loss. That of the parameters is all of it in each part,
        so that each alike takes part in what a wrapper synchronises.

        Raises:
            RuntimeError: the features are not those that the micro-batch had in the first pass.

        """
        self.micro_batches.check(number, features)
        assert self.gradients is not None
        loss, maps, tokens, of_parameters, _ = self.gradients
        count = len(self.micro_batches)
        due = [(maps[number], count), (tokens[number], count), *((each, 1) for each in of_parameters)]
        # Each is due once, and is not needed after its backward.
        maps[number] = tokens[number] = None
        known = [
            (value, gradient, times)
            for value, (gradient, times) in zip([*features[:2], *parameters], due, strict=True)
            if gradient is not None and value.requires_grad
        ]
        gradients, times = [each[1] for each in known], [each[2] for each in known]
        part: Tensor = _Part.apply(loss, gradients, times, *(each[0] for each in known))  # type: ignore[no-untyped-call]
        return part


class Replayed:
    """A micro-batch in the second pass, which takes the student's place in a call of the loss.

    No tuple: wrappers look into those, and would hand the loss other tensors.
    """

    def __init__(self, cache: GradientCache, number: int, features: SAMFeatures) -> None:
        self.cache = cache
        self.number = number
        self.features = features


class _Part(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor], times: list[int], *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        ctx.times, ctx.dtypes = times, [value.dtype for value in inputs]
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("Accumulation", "compute the loss on the whole batch")
        due = zip(ctx.saved_tensors, ctx.times, ctx.dtypes, strict=True)
        return None, None, None, *((gradient * (n * grad)).to(dtype) for gradient, n, dtype in due)


def _split(gradient: Tensor | None, sizes: list[int]) -> list[Tensor | None]:
    return [None] * len(sizes) if gradient is None else list(torch.split(gradient, sizes))
