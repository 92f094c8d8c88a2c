"""The gradient of a whole batch at its features, kept for micro-batches whose graphs pass it on one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from renyi_kd.gradient_share import GradientMeasurement
from renyi_kd.ops.autograd import refuse_second_derivative
from renyi_kd.sam.features import SAMFeatures
from renyi_kd.sam.reads import ReadFeatures

# Of a map so many channels and pixels apart are held against one another.
_APART = 16, 2, 2
# Root of the mean squares, beside that of the features: beyond what kernels chosen anew differ by in half precision.
_ALIKE = 2.0**-5


class WholeBatch(NamedTuple):
    """The features of all micro-batches together, the student's as leaves."""

    teacher: SAMFeatures
    student: SAMFeatures
    sample_weight: Tensor | None


class _MicroBatch(NamedTuple):
    """What is known of the student's features of a first pass, when they are gone."""

    maps: torch.Size
    tokens: torch.Size
    image_index: Tensor | None
    some: tuple[Tensor, Tensor] | None


class _Features:
    """Those of one model."""

    def __init__(self) -> None:
        self.maps: list[Tensor] = []
        self.tokens: list[Tensor] = []

    def join(self, image_index: Tensor | None) -> SAMFeatures:
        """Return all as one, and let go of the parts."""
        maps = torch.cat(self.maps)
        self.maps.clear()
        tokens = torch.cat(self.tokens)
        self.tokens.clear()
        return SAMFeatures(maps, tokens, image_index)


class GradientCache:
    """First the features of micro-batches, then the loss of them together, and its gradients.

    Args:
        compares_values: whether features of the second pass are held against those of the first.

    Memory: the image features of teacher and student, and while the loss is differentiated once more the student's;
    from then on the gradient at those. In fp32 where they are in half precision, but for the teacher's: a GradScaler
    scales what passes through the micro-batches, and fp16 would have lost small gradients before.

    """

    def __init__(self, compares_values: bool) -> None:
        self.gradients: Gradients | None = None
        self._compares_values = compares_values
        self._teacher, self._student = _Features(), _Features()
        self._weights: list[Tensor] = []
        self._micro_batches: list[_MicroBatch] = []
        self._requires_grad = [False, False]
        self._kind = ""

    def __len__(self) -> int:
        return len(self._micro_batches)

    def add(self, teacher: SAMFeatures, student: SAMFeatures, sample_weight: Tensor | None) -> None:
        """Keep copies of the features of a micro-batch.

        Raises:
            ValueError: they do not fit those of the micro-batches before.

        """
        kind = _kind(teacher, student, sample_weight)
        if kind != (self._kind or kind):
            raise ValueError(
                f"Accumulation: micro-batches must be of one kind, got {kind} after {self._kind}; use one image size, "
                "one autocast, and sample_weight for all or for none"
            )
        self._kind = kind
        # Copies, as buffers of the models may be written again.
        self._teacher.maps.append(teacher.image_features.detach().clone())
        self._teacher.tokens.append(teacher.mask_tokens.detach().clone())
        maps, tokens, image_index = student
        self._student.maps.append(_copy(maps))
        self._student.tokens.append(_copy(tokens))
        self._requires_grad = [
            was or value.requires_grad for was, value in zip(self._requires_grad, (maps, tokens), strict=True)
        ]
        if sample_weight is not None:
            self._weights.append(sample_weight.detach().clone())
        some = (_some(maps), _some(tokens)) if self._compares_values else None
        self._micro_batches.append(_MicroBatch(maps.shape, tokens.shape, image_index, some))

    def join(self) -> WholeBatch:
        """Return the features of all micro-batches, in their order, and let go of them."""
        image_index = _joined_index(self._micro_batches)
        student = self._student.join(image_index)
        for value, requires_grad in zip(student[:2], self._requires_grad, strict=True):
            value.requires_grad_(requires_grad)
        weight = torch.cat(self._weights) if self._weights else None
        self._weights.clear()
        return WholeBatch(self._teacher.join(image_index), student, weight)

    def differentiate(
        self, loss: Tensor, student: SAMFeatures, parameters: Sequence[Tensor], measurement: GradientMeasurement | None
    ) -> None:
        """Keep the loss and its gradients at the student's features and at parameters, and nothing of its graph."""
        inputs = [*student[:2], *parameters]
        asked = [value for value in inputs if value.requires_grad]
        found = iter(torch.autograd.grad(loss, asked, allow_unused=True) if asked else ())
        maps, tokens, *of_parameters = (next(found) if value.requires_grad else None for value in inputs)
        self.gradients = Gradients(
            loss.detach(),
            _split(maps, [each.maps[0] for each in self._micro_batches]),
            _split(tokens, [each.tokens[0] for each in self._micro_batches]),
            of_parameters,
            measurement,
        )

    def part(self, number: int, features: ReadFeatures, parameters: Sequence[Tensor]) -> Tensor:
        """Return the loss of the whole batch, with the gradient of which a micro-batch is due its part.

        The mean over the micro-batches has the gradient of the loss. That of the parameters is all of it in each part,
        so that each alike takes part in what a wrapper synchronises.

        Raises:
            RuntimeError: the features are not those that the micro-batch had in the first pass.

        """
        self._check(number, features)
        assert self.gradients is not None
        loss, maps, tokens, of_parameters, _ = self.gradients
        due = [(maps[number], len(self)), (tokens[number], len(self)), *((each, 1) for each in of_parameters)]
        # Each is due once, and is not needed after its backward.
        maps[number] = tokens[number] = None
        inputs = [*features[:2], *parameters]
        known = [
            (value, gradient, times)
            for value, (gradient, times) in zip(inputs, due, strict=True)
            if gradient is not None and value.requires_grad
        ]
        gradients, times = [each[1] for each in known], [each[2] for each in known]
        part: Tensor = _Part.apply(loss, gradients, times, *(each[0] for each in known))  # type: ignore[no-untyped-call]
        return part

    def _check(self, number: int, features: SAMFeatures) -> None:
        """Raise unless the features are those of the first pass, as far as the host knows, or in value where asked."""
        first = self._micro_batches[number]
        maps, tokens, image_index = features
        values = (("image features", maps, first.maps), ("mask tokens", tokens, first.tokens))
        difference = next(
            (
                f"{name} of {tuple(value.shape)} where they were of {tuple(shape)}"
                for name, value, shape in values
                if value.shape != shape
            ),
            None,
        )
        if difference is None and not _same_index(image_index, first.image_index):
            difference = "samples of other images"
        if difference is None and first.some is not None:
            now = _some(maps), _some(tokens)
            apart = torch.stack([_distance(a, b) for a, b in zip(now, first.some, strict=True)]).tolist()
            names = [
                name for name, value in zip(("image features", "mask tokens"), apart, strict=True) if value > _ALIKE
            ]
            if names:
                difference = f"other {' and '.join(names)}, {100 * max(apart):.0f} % apart"
        if difference is not None:
            raise RuntimeError(
                f"Accumulation: the second pass must give the features of the first, got {difference} in micro-batch "
                f"{number + 1} of {len(self)}; run the student on the micro-batch that replay() gives, once, in the "
                "mode and autocast of collect(), and draw what is random from PyTorch's own random numbers"
            )


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


def _kind(teacher: SAMFeatures, student: SAMFeatures, sample_weight: Tensor | None) -> str:
    """Return what micro-batches must share to be one batch."""
    values = teacher.image_features, student.image_features, student.mask_tokens
    features = ", ".join(f"{list(value.shape[1:])} {value.dtype} {value.device}" for value in values)
    return f"{features}, {'without' if sample_weight is None else 'with'} weights"


def _copy(value: Tensor) -> Tensor:
    """Return a copy without graph, in fp32 at least."""
    return value.detach().to(torch.promote_types(value.dtype, torch.float32), copy=True)


def _joined_index(micro_batches: Sequence[_MicroBatch]) -> Tensor | None:
    """Return the image of each sample of all micro-batches."""
    if all(each.image_index is None for each in micro_batches):
        return None
    parts, first = [], 0
    for each in micro_batches:
        own = torch.arange(each.maps[0]) if each.image_index is None else each.image_index.cpu()
        parts.append(first + own)
        first += each.maps[0]
    return torch.cat(parts)


def _same_index(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))


def _split(gradient: Tensor | None, sizes: list[int]) -> list[Tensor | None]:
    return [None] * len(sizes) if gradient is None else list(torch.split(gradient, sizes))


def _some(value: Tensor) -> Tensor:
    """Return a copy of what is compared of features: all tokens, or some channels and pixels of a map."""
    if value.ndim == 4:
        channels, rows, columns = _APART
        value = value[:, ::channels, ::rows, ::columns]
    return _copy(value)


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """Return the norm of a difference over that of the features; 0 where it is none, as with NaN in both."""
    distance = (a - b).norm() / b.norm()
    return torch.where(distance.isnan(), 0.0, distance)
