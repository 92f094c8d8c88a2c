"""The features of micro-batches: what a first pass collects of them, and whether a second pass gives the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from renyi_kd.sam.features import SAMFeatures

# Of a map so many channels and pixels apart are held against one another.
_APART = 16, 2, 2
# Root of the mean squares, beside that of the features: beyond what kernels chosen anew differ by in half precision.
_ALIKE = 2.0**-5
_NAMES = "image features", "mask tokens"


class WholeBatch(NamedTuple):
    """The features of all micro-batches together, the student's as leaves."""

    teacher: SAMFeatures
    student: SAMFeatures
    sample_weight: Tensor | None


class _Student(NamedTuple):
    """What is known of the student's features of a micro-batch, also when they are gone.

    Attributes:
        shapes: of image features and mask tokens.
        with_gradient: whether each has one.
        image_index: the image of each sample, as in :class:`SAMFeatures`.
        some: of their values; None where these are not compared.

    """

    shapes: tuple[torch.Size, torch.Size]
    with_gradient: tuple[bool, bool]
    image_index: Tensor | None
    some: tuple[Tensor, Tensor] | None


class MicroBatches:
    """The features of teacher and student in micro-batches, until they are joined; and what a second pass must give.

    Args:
        compares_values: whether features of the second pass are held against those of the first.

    Memory: the features; the student's in fp32 where they are in half precision, as the gradient there is then. A
    GradScaler scales what passes through the micro-batches, and fp16 would have lost small gradients before.

    """

    def __init__(self, compares_values: bool) -> None:
        self._compares_values = compares_values
        self._kind = ""
        self._students: list[_Student] = []
        self._teacher_maps: list[Tensor] = []
        self._teacher_tokens: list[Tensor] = []
        self._student_maps: list[Tensor] = []
        self._student_tokens: list[Tensor] = []
        self._weights: list[Tensor] = []

    def __len__(self) -> int:
        return len(self._students)

    @property
    def sizes(self) -> tuple[list[int], list[int]]:
        """Numbers of images and of samples."""
        images, samples = zip(*((maps[0], tokens[0]) for (maps, tokens), *_ in self._students), strict=True)
        return list(images), list(samples)

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
        maps, tokens, image_index = student
        some = (_some(maps), _some(tokens)) if self._compares_values else None
        self._students.append(
            _Student((maps.shape, tokens.shape), (maps.requires_grad, tokens.requires_grad), image_index, some)
        )
        # Copies, as buffers of the models may be written again.
        self._teacher_maps.append(teacher.image_features.detach().clone())
        self._teacher_tokens.append(teacher.mask_tokens.detach().clone())
        self._student_maps.append(_copy(maps))
        self._student_tokens.append(_copy(tokens))
        if sample_weight is not None:
            self._weights.append(sample_weight.detach().clone())

    def join(self) -> WholeBatch:
        """Return the features of all micro-batches, in their order, and let go of them."""
        image_index = _joined_index(self._students)
        student = SAMFeatures(_joined(self._student_maps), _joined(self._student_tokens), image_index)
        for index, value in enumerate(student[:2]):
            value.requires_grad_(any(each.with_gradient[index] for each in self._students))
        teacher = SAMFeatures(_joined(self._teacher_maps), _joined(self._teacher_tokens), image_index)
        return WholeBatch(teacher, student, _joined(self._weights) if self._weights else None)

    def check(self, number: int, features: SAMFeatures) -> None:
        """Raise unless the student's features are those that a micro-batch had, as far as the host knows.

        Raises:
            RuntimeError: they are not; or, where these are compared, their values are not.

        """
        difference = _difference(features, self._students[number])
        if difference is not None:
            raise RuntimeError(
                f"Accumulation: the second pass must give the features of the first, got {difference} in micro-batch "
                f"{number + 1} of {len(self)}; run the student on the micro-batch that replay() gives, once, in the "
                "mode and autocast of collect(), and draw what is random from PyTorch's own random numbers"
            )


def _difference(features: SAMFeatures, first: _Student) -> str | None:
    values = features[:2]
    for name, value, shape, with_gradient in zip(_NAMES, values, first.shapes, first.with_gradient, strict=True):
        if value.shape != shape:
            return f"{name} of {tuple(value.shape)} where they were of {tuple(shape)}"
        if value.requires_grad != with_gradient:
            return f"{name} {'without' if with_gradient else 'with'} gradient"
    if not _same_index(features.image_index, first.image_index):
        return "samples of other images"
    if first.some is None:
        return None
    apart = [_distance(_some(value), some) for value, some in zip(values, first.some, strict=True)]
    # The one wait for the device.
    shares = torch.stack(apart).tolist()
    names = [name for name, share in zip(_NAMES, shares, strict=True) if share > _ALIKE]
    return f"other {' and '.join(names)}, {100 * max(shares):.0f} % apart" if names else None


def _kind(teacher: SAMFeatures, student: SAMFeatures, sample_weight: Tensor | None) -> str:
    """Return what micro-batches must share to be one batch."""
    values = teacher.image_features, student.image_features, student.mask_tokens
    features = ", ".join(f"{list(value.shape[1:])} {value.dtype} {value.device}" for value in values)
    return f"{features}, {'without' if sample_weight is None else 'with'} weights"


def _copy(value: Tensor) -> Tensor:
    """Return a copy without graph, in fp32 at least."""
    return value.detach().to(torch.promote_types(value.dtype, torch.float32), copy=True)


def _joined(parts: list[Tensor]) -> Tensor:
    # Under autocast a CPU joins no numbers in float16.
    with torch.autocast(parts[0].device.type, enabled=False):
        whole = torch.cat(parts)
    # Not both in memory for longer than that.
    parts.clear()
    return whole


def _joined_index(students: Sequence[_Student]) -> Tensor | None:
    """Return the image of each sample of all micro-batches."""
    if all(each.image_index is None for each in students):
        return None
    parts, first = [], 0
    for each in students:
        n_images = each.shapes[0][0]
        own = torch.arange(n_images) if each.image_index is None else each.image_index.cpu()
        parts.append(first + own)
        first += n_images
    return torch.cat(parts)


def _same_index(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))


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
