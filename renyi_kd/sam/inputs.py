"""What reached the encoders of a model in a step, and whether two models saw the same."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from renyi_kd.sam.memory import leaves, storage_of, version

CompareInputs = Literal["first", "always", "never"]

# How often inputs are compared in full that lie in memory as they did before.
_FULL_COMPARISONS = 3


class Seen(NamedTuple):
    """The arguments of one call of an encoder, and how often their tensors had been written to.

    Attributes:
        arguments: by name, as the forward names them.
        versions: of the tensors in them, in their order.

    """

    arguments: dict[str, Any]
    versions: tuple[int, ...]

    def tensors(self) -> list[Tensor]:
        """Return the tensors of the arguments."""
        return [leaf for leaf in leaves(self.arguments) if isinstance(leaf, Tensor)]

    def changed(self) -> bool:
        """Return whether a tensor was written to since."""
        return tuple(map(version, self.tensors())) != self.versions


def argument_names(module: nn.Module) -> tuple[str, ...]:
    """Return the names of what a module's forward takes by position."""
    return tuple(
        name
        for name, parameter in inspect.signature(module.forward).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    )


def seen(names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Seen:
    """Return the arguments of a call by name; those beyond the names by their number."""
    numbers = (f"argument {number}" for number in range(len(names), len(args)))
    arguments = {**dict(zip((*names, *numbers), args, strict=False)), **kwargs}
    tensors = (leaf for leaf in leaves(arguments) if isinstance(leaf, Tensor))
    return Seen(arguments, tuple(map(version, tensors)))


class Inputs(NamedTuple):
    """What reached a model's encoders in a step.

    Attributes:
        images: the calls of its image encoder.
        prompts: the calls of its prompt encoder; the prompts of its decoder calls where it has none.
        maps: the memory of the image features that its decoder was given.
        with_gradient: whether each decoder call counts, in their order: those without gradient do not.
        all_prompts: the calls of its prompt encoder, also for decoder calls that do not count.

    """

    images: tuple[Seen, ...]
    prompts: tuple[Seen, ...]
    maps: frozenset[int]
    with_gradient: tuple[bool, ...]
    all_prompts: tuple[Seen, ...]


class Comparison:
    """Holds what the teacher saw against what the student saw.

    Numbers and shapes are compared in every step; values in the first steps, and whenever they come to lie in memory
    in another way than those that were compared. What is one tensor in one version needs no comparison. Masks that are
    given as prompts are left out: a model that refines its own has others than its teacher.

    Args:
        when: ``"first"`` for all that, ``"always"`` for values in every step, ``"never"`` for nothing.

    Raises:
        ValueError: ``when`` is none of these.

    Cost: a read of both models' inputs and one wait for the device, where values are compared.

    """

    def __init__(self, when: CompareInputs = "first") -> None:
        if when not in get_args(CompareInputs):
            raise ValueError(
                f"InfoSAMLoss: compare_inputs must be one of {get_args(CompareInputs)}, got {when!r}; 'first' compares "
                "values in the first steps"
            )
        self.when = when
        self._compared: dict[tuple[Any, ...], int] = {}

    def __call__(self, student: Inputs, teacher: Inputs) -> None:
        """Raise unless both models saw the same images and prompts.

        Raises:
            ValueError: they did not, or the student's were written to since.

        """
        if self.when == "never":
            return
        if any(each.changed() for each in (*student.images, *student.prompts)):
            raise ValueError(
                "InfoSAMLoss: the student's inputs must stay as they are until the loss is computed, got inputs that "
                "were overwritten in place; give each step tensors of its own"
            )
        if student.images and not teacher.images and student.maps & teacher.maps:
            raise ValueError(
                "InfoSAMLoss: the teacher must see images, got the student's image features, which its decoder was "
                "given; pass the loss a batch with the images, or say how the teacher runs: tap(model, call=...)"
            )
        pairs = _pairs(student, teacher)
        pattern = tuple((pair.name, pair.is_one()) for pair in pairs)
        apart = [pair for pair, (_, is_one) in zip(pairs, pattern, strict=True) if not is_one]
        difference = next((text for pair in apart if (text := pair.difference_of_shapes())), None)
        if (
            difference is None
            and apart
            and (self.when == "always" or self._compared.get(pattern, 0) < _FULL_COMPARISONS)
        ):
            difference = _difference_of_values(apart)
            self._compared[pattern] = self._compared.get(pattern, 0) + 1
        if difference is not None:
            raise ValueError(
                f"InfoSAMLoss: the teacher must see what the student saw, got {difference}; pass the loss the batch "
                "that the student ran on, say how the teacher runs on it: tap(model, call=...), or hand it the "
                "student's prompts: tap(model, replay_prompts=True); if the models are meant to differ in this, "
                "InfoSAMLoss(compare_inputs='never')"
            )


class _Pair(NamedTuple):
    """Tensors of one kind that reached both models."""

    name: str
    student: list[Tensor]
    teacher: list[Tensor]

    def is_one(self) -> bool:
        """Return whether they are the same memory."""
        return len(self.student) == len(self.teacher) and all(map(_is_one, self.student, self.teacher))

    def difference_of_shapes(self) -> str | None:
        if self.name == "images":
            sizes = [sorted({tuple(x.shape[1:]) for x in side}) for side in (self.student, self.teacher)]
            numbers = [sum(map(len, side)) for side in (self.student, self.teacher)]
            if sizes[0] != sizes[1]:
                return f"images of {_listed(sizes[1])} where those of the student are of {_listed(sizes[0])}"
            if numbers[0] != numbers[1]:
                return (
                    f"{numbers[1]} images in its image encoder where there are {numbers[0]} in that of the student "
                    "(clear() on the student's tap drops those that were encoded in advance)"
                )
            return None
        numbers = [sum(x.numel() for x in side) for side in (self.student, self.teacher)]
        if numbers[0] != numbers[1]:
            return f"{numbers[1]} numbers as {self.name} of its prompts where the student has {numbers[0]}"
        return None

    def aligned(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield tensors of both with as many elements."""
        if [x.shape for x in self.student] == [x.shape for x in self.teacher]:
            yield from zip(self.student, self.teacher, strict=True)
        else:
            # As many in all, in calls of other sizes.
            yield tuple(torch.cat([x.detach().flatten() for x in side]) for side in (self.student, self.teacher))  # type: ignore[misc]


def _pairs(student: Inputs, teacher: Inputs) -> list[_Pair]:
    """Return what reached both models by kind; images only where both image encoders ran."""
    pairs = []
    if student.images and teacher.images:
        pairs.append(
            _Pair("images", *([x for each in side.images for x in each.tensors()] for side in (student, teacher)))
        )
    prompts = [_by_kind(side.prompts) for side in (student, teacher)]
    if student.prompts and teacher.prompts:
        kinds = dict.fromkeys([*prompts[0], *prompts[1]])
        pairs += [_Pair(kind, prompts[0].get(kind, []), prompts[1].get(kind, [])) for kind in kinds]
    return pairs


def _by_kind(prompts: Sequence[Seen]) -> dict[str, list[Tensor]]:
    kinds: dict[str, list[Tensor]] = {}
    for each in prompts:
        for kind, tensor in _kinds(each):
            kinds.setdefault(kind, []).append(tensor)
    return kinds


def _kinds(each: Seen) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a prompt encoder's call with what they are, by the names that SAMs have for it."""
    for name, value in each.arguments.items():
        if "mask" in name:
            continue
        tensors = [leaf for leaf in leaves(value) if isinstance(leaf, Tensor)]
        for number, tensor in enumerate(tensors):
            # Meta's prompt encoders take points and their labels as a pair.
            is_label = "label" in name or ("point" in name and len(tensors) == 2 and number == 1)
            kind = "labels" if is_label else "points" if "point" in name or "coord" in name else name
            yield "boxes" if "box" in name else kind, tensor


def _is_one(a: Tensor, b: Tensor) -> bool:
    if a is b:
        return True
    in_one_version = storage_of(a) is not None and storage_of(a) == storage_of(b) and version(a) == version(b)
    return (
        in_one_version and a.storage_offset() == b.storage_offset() and a.shape == b.shape and a.stride() == b.stride()
    )


def _difference_of_values(pairs: Sequence[_Pair]) -> str | None:
    """Return what differs beyond rounding, after one wait for the device."""
    errors, names = [], []
    for pair in pairs:
        for a, b in pair.aligned():
            if a.numel():
                names.append(pair.name)
                errors.append(_excess(a, b.to(a.device)))
    if not errors:
        return None
    excess = torch.stack([error.to(errors[0].device) for error in errors]).tolist()
    return next((f"other {name}" for name, value in zip(names, excess, strict=True) if value > 0), None)


def _excess(a: Tensor, b: Tensor) -> Tensor:
    """Return by how much the largest difference is above the rounding of the coarser dtype; NaN is not compared."""
    a, b = a.detach(), b.detach()
    floating = [x.dtype for x in (a, b) if x.dtype.is_floating_point]
    eps = max((torch.finfo(dtype).eps for dtype in floating), default=0.0)
    # Whole numbers as they are: not every device has the fp64 that would hold them.
    a, b = (x.float() if floating else x.long() for x in (a, b))
    difference = torch.nan_to_num(a - b, 0.0, 0.0, 0.0).abs().amax()
    return difference - 4 * eps * torch.nan_to_num(b, 0.0, 0.0, 0.0).abs().amax()


def _listed(shapes: Sequence[tuple[int, ...]]) -> str:
    return " and ".join(map(str, shapes))
