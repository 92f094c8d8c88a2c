"""A weight of the loss that follows its measured share of the gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, distributed, nn

from renyi_kd.gradient_share import GradientMeasurement
from renyi_kd.samples.agreement import agree, meeting
from renyi_kd.samples.processes import n_processes
from renyi_kd.whole_state import is_dense, listed_errors

# Of the step before which nothing was measured: next to no effect, and enough to be measured in every dtype.
FIRST_WEIGHT = 2.0**-10
# A mean over about ten steps.
NEWEST = 0.1
# From step to step. Where the student begins as the teacher, a form whose optimum that is has next to no gradient; the
# weight that makes a tenth of the task's of it is far too large one step later.
MOST_GROWTH = 2.0
# In so many steps the host waits, to say that there is no task loss.
_CHECKED_STEPS = 3
# Losses that were never differentiated; more than a step would compute.
_MOST_WAITING = 256


class ShareControl(nn.Module):
    """The weight at which the loss has a given share of the task's gradient, by the share of earlier steps.

    With u the share that the loss had in a step, divided by its weight there, and a mean of u over earlier steps that
    forgets those long past, the weight is ``share / mean(u)``, but at most twice that of the step before. Of the shares
    at image features and mask tokens the larger counts. A step that measures nothing finite and positive moves nothing.
    Everything stays on the device; in several processes their sums are added, so that all have one weight.

    Args:
        share: of the task's gradient, in (0, 10].

    """

    mean: Tensor
    n_steps: Tensor
    weight: Tensor

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share
        # Loaders of models set a default dtype of half precision, in which nothing would ever move: see _apply.
        self.register_buffer("mean", torch.zeros((), dtype=torch.float32))
        self.register_buffer("n_steps", torch.zeros((), dtype=torch.float32))
        self.register_buffer("weight", torch.full((), FIRST_WEIGHT, dtype=torch.float32))
        # Of this process alone, and so no buffer, which DDP would take from the first process.
        self._squares = torch.zeros(2, 2, dtype=torch.float32)
        self._waiting: list[tuple[GradientMeasurement, Tensor]] = []
        self._n_checked = 0
        # Whether all processes were found to have the same settings.
        self.agreed = False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ShareControl:
        before = {"mean": self.mean, "n_steps": self.n_steps, "weight": self.weight}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # Squares of gradients over those of weights leave the range of fp16, and nothing would ever move.
        for name, value in before.items():
            moved = getattr(self, name)
            if torch.finfo(moved.dtype).bits < 32:
                setattr(self, name, value.to(moved.device))
        return self

    def next_weight(
        self, settings: Mapping[str, object] | None = None, *, group: distributed.ProcessGroup | None = None
    ) -> Tensor:
        """Return the weight of a step with gradient, ``[]``, which follows what was measured before.

        Args:
            settings: of the loss; several processes compare them in the first step, for which the host waits.
            group: of the processes that have one weight; None for the default one.

        Raises:
            RuntimeError: in the first steps the task has had no gradient where the loss has; or a process is missing,
                see :func:`meeting`.
            ValueError: in every process, if their settings differ.

        """
        measured = self.collect()
        squares = self._squares.to(self.mean)
        self._squares = torch.zeros_like(squares)
        if n_processes(group) > 1:
            if not self.agreed:
                agree("InfoSAMLoss", settings or {}, squares.device, group=group)
                self.agreed = True
            with meeting("InfoSAMLoss", group=group):
                distributed.all_reduce(squares, group=group)
        if measured and self._n_checked < _CHECKED_STEPS:
            # A run that goes on after some steps has found its task.
            if self.n_steps > 0:
                self._n_checked = _CHECKED_STEPS
            else:
                self._check_task(squares)
        own, task = squares.unbind(1)
        share = (own / task).sqrt()
        share = torch.where(share.isfinite(), share, torch.zeros_like(share)).amax()
        # A step is judged whole: where one of its gradients overflowed, none of them counts.
        moves = (share > 0) & squares.isfinite().all() & (_task_of(squares) > 0)
        self.n_steps += moves
        newest = (1 / self.n_steps.clamp_min(1)).clamp_min(NEWEST)
        self.mean += torch.where(moves, newest * (share - self.mean), torch.zeros_like(share))
        weight = torch.minimum(self.share / self.mean, MOST_GROWTH * self.weight)
        self.weight.copy_(torch.where(moves, weight, self.weight))
        # Of its own, as the graph of the loss keeps it.
        return self.weight.clone()

    def follow(self, measurement: GradientMeasurement, weight: Tensor) -> None:
        """Let a step count whose loss had this weight, once backward has run through it."""
        self._waiting = [*self._waiting[1 - _MOST_WAITING :], (measurement, weight)]

    def collect(self) -> bool:
        """Add what the backward passes since the last time have measured; return whether there was any."""
        waiting, self._waiting = self._waiting, []
        for measurement, weight in waiting:
            squares = measurement.squares
            if squares is None:
                self._waiting.append((measurement, weight))
            else:
                ones = torch.ones_like(weight)
                self._squares = (
                    self._squares.to(self.mean) + squares.to(self.mean) / torch.stack([weight, ones]).square()
                )
        return len(self._waiting) < len(waiting)

    def get_extra_state(self) -> Tensor:
        """Return what the last step has measured, which is part of the state."""
        self.collect()
        return self._squares

    def set_extra_state(self, state: Tensor) -> None:
        """Go on where another run was.

        Raises:
            ValueError: it is not what another run has measured.

        """
        if not isinstance(state, Tensor) or state.shape != (2, 2) or state.is_complex() or not _has_numbers(state):
            got = f"a tensor of {state.dtype}, shape {list(state.shape)}" if isinstance(state, Tensor) else repr(state)
            raise ValueError(
                "InfoSAMLoss: the state of gradient_share must be the 2 x 2 squares of gradients of a step, got "
                f"{got}; load what was saved"
            )
        self._squares, self._waiting = state.detach().clone(), []

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        errors: list[str] = args[-1]
        n_errors = len(errors)
        before = [(name, value, value.clone()) for name, value in self.named_buffers()]
        squares, waiting = self._squares, self._waiting
        with listed_errors(errors):
            super()._load_from_state_dict(state_dict, prefix, *args)
        # With assign=True they are those of the state dict, in whatever dtype that has.
        for name, value in list(self.named_buffers()):
            dtype = torch.promote_types(value.dtype, torch.float32) if value.is_floating_point() else value.dtype
            setattr(self, name, value.detach().to(dtype))
        if all(_has_numbers(value) and not value.is_complex() for value in self.buffers()):
            mean, n_steps, weight = self.mean.item(), self.n_steps.item(), self.weight.item()
            # From any other no step would come back, as the weight follows that of the step before.
            if not (0 <= mean < math.inf and 0 <= n_steps < math.inf and 0 < weight < math.inf):
                errors.append(
                    "InfoSAMLoss: the state of gradient_share must be a positive weight after some steps, got weight "
                    f"{weight}, mean {mean} and n_steps {n_steps}; load what was saved, in single precision"
                )
        if len(errors) > n_errors or not all(map(is_dense, self.buffers())):
            # A module that holds the loss keeps what it has loaded; what the weight follows belongs together.
            for name, value, numbers in before:
                setattr(self, name, value.copy_(numbers))
            self._squares, self._waiting = squares, waiting

    def _check_task(self, squares: Tensor) -> None:
        own, task = torch.stack([squares[:, 0].amax(), _task_of(squares)]).tolist()
        if task > 0:
            # From here on a step without a gradient of the task is one that moves nothing.
            self._n_checked = _CHECKED_STEPS
        elif own > 0 and task == 0:
            self._n_checked += 1
            if self._n_checked == _CHECKED_STEPS:
                raise RuntimeError(
                    "InfoSAMLoss: gradient_share must have a task loss to be a share of, got "
                    f"{_CHECKED_STEPS} steps in which the student's mask tokens had no gradient but that of InfoSAM; "
                    "add both losses and call backward once on the sum, or leave gradient_share out"
                )

    def __getstate__(self) -> Mapping[str, Any]:
        # A copy begins with what was measured, not with graphs that are under way.
        self.collect()
        return {**self.__dict__, "_waiting": []}


def _has_numbers(value: Tensor) -> bool:
    return value.layout == torch.strided and value.device.type != "meta"


def _task_of(squares: Tensor) -> Tensor:
    """Return the square of the task's gradient, of the mask tokens where the loss reads them.

    At the image features what the loss sends back through the decoder counts as the task's, and comes without any task.
    """
    image_features, mask_tokens = squares.unbind()
    return torch.where(mask_tokens[0] > 0, mask_tokens[1], image_features[1])
