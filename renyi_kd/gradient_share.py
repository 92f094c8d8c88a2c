"""How large the gradient of the loss is beside the task's, where the loss reads the student; without a second backward.

The loss reads aliases of the student's tensors. A hook on an alias sees the gradient of the loss alone, one on the
tensor the total, and their difference is the task's. At the mask tokens that is exact. The image features lie before
the decoder: what the loss sends back to them through tokens and decoder arrives with the task's gradient, and counts as
the task's.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from renyi_kd.sam.reads import Read, Reads

# Of a map so many channels are looked at, in every second row where there are more than so many; to look at all of it
# would cost many times as much. The gradient is that of few pixels, and rows further apart miss them; channels agree.
_CHANNELS, _ROWS = 16, 8
_PLACES = ("image_features", "mask_tokens")


class GradientShare(NamedTuple):
    """The norm of the loss's gradient over that of the task's, each ``[]`` without gradient.

    Attributes:
        image_features: at the image features; None before a backward, and where they get no gradient.
        mask_tokens: likewise, at the mask tokens.

    """

    image_features: Tensor | None = None
    mask_tokens: Tensor | None = None


class GradientMeasurement:
    """What the backward of one step tells of both gradients; holds sums, and no tensor of the step.

    Args:
        reads: the tensors that the loss reads, with their aliases.

    """

    def __init__(self, reads: Reads) -> None:
        # Of the loss and of the task in turns, as they come; to sum them is for whoever reads them.
        self._norms: dict[str, list[Tensor]] = {}
        self.watch(reads)

    def watch(self, reads: Reads) -> None:
        """Measure at these tensors too, as those of one more micro-batch of the step."""
        for each in reads.image_features:
            self._watch("image_features", each, _some)
        for each in reads.mask_tokens:
            self._watch("mask_tokens", each, _all)

    @property
    def squares(self) -> Tensor | None:
        """Sums of squares ``[2, 2]``: of image features and mask tokens, the loss's and the task's; None before any."""
        if not self._norms:
            return None
        nothing = next(iter(self._norms.values()))[0].new_zeros(2)
        return torch.stack([_squares(self._norms[place]) if place in self._norms else nothing for place in _PLACES])

    def share(self) -> GradientShare:
        """Return the shares, inf where the task alone has no gradient, and 0 where the loss has none."""
        return GradientShare(*(_ratio(self._norms.get(place)) for place in _PLACES))

    def _watch(self, place: str, read: Read, looked_at: Callable[[Tensor], Tensor]) -> None:
        own = _OwnGradient(self, place, read, looked_at)
        read.alias.register_hook(own.keep)  # type: ignore[no-untyped-call]
        if not read.source.is_leaf:
            read.source.register_hook(own.compare)  # type: ignore[no-untyped-call]
            return
        # A leaf outlives the step, and would keep every step's hook.
        alive = weakref.ref(own)

        def compare(total: Tensor | None) -> None:
            kept = alive()
            if kept is not None:
                kept.compare(total)

        weakref.finalize(own, read.source.register_hook(compare).remove)  # type: ignore[no-untyped-call]

    def _add(self, place: str, own: Tensor, task: Tensor) -> None:
        self._norms.setdefault(place, []).extend(torch._foreach_norm([own, task]))


class _OwnGradient:
    """Keeps the loss's own gradient from the hook of an alias to that of its source, which comes later."""

    def __init__(
        self, measurement: GradientMeasurement, place: str, read: Read, looked_at: Callable[[Tensor], Tensor]
    ) -> None:
        self._measurement = measurement
        self._place = place
        self._part = read.part
        self._looked_at = looked_at
        self._own: Tensor | None = None
        self._is_leaf = read.source.is_leaf
        self._over = False

    # Autograd hands None to a hook where nothing comes back, as at an output of a split that only others are read of.
    def keep(self, own: Tensor | None) -> None:
        if own is None:
            return
        with torch.no_grad():
            # A copy, as autograd adds the task's gradient to it in place.
            self._own = self._looked_at(own).to(_at_least_single(own), copy=True)

    def compare(self, total: Tensor | None) -> None:
        own, self._own = self._own, None
        if total is None or (own is None and self._over):
            return
        # A leaf may be read again, and what comes to it then is of a later step.
        self._over = self._is_leaf and own is not None
        with torch.no_grad():
            looked_at = self._looked_at(total if self._part is None else self._part.of(total))
            # Where the task is differentiated before the loss there is none of its own yet.
            own = torch.zeros_like(looked_at, dtype=_at_least_single(total)) if own is None else own
            self._measurement._add(self._place, own, looked_at - own)


def _squares(norms: list[Tensor]) -> Tensor:
    return torch.stack(norms).reshape(-1, 2).square().sum(0)


def _ratio(norms: list[Tensor] | None) -> Tensor | None:
    if norms is None:
        return None
    own, task = _squares(norms)
    return torch.where(own == 0, own, own / task).sqrt()


def _some(gradient: Tensor) -> Tensor:
    first = max(0, gradient.shape[1] - _CHANNELS) // 2
    return gradient[:, first : first + _CHANNELS, :: 2 if gradient.shape[2] > _ROWS else 1]


def _all(gradient: Tensor) -> Tensor:
    return gradient


def _at_least_single(gradient: Tensor) -> torch.dtype:
    return torch.promote_types(gradient.dtype, torch.float32)
