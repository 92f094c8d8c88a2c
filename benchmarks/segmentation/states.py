"""The trained weights of one run in several states: along the run, averaged over it, and on the way back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from benchmarks.segmentation.evaluation import LAST

Weights = dict[str, Tensor]


class States:
    """Keeps the trained weights of a model while it is trained.

    Args:
        model: as it is before the first step.
        n_steps: of the run.
        fractions: of the steps, each in (0, 1): the weights then.
        ema: decay of an exponential mean of the weights, as Polyak and Juditsky (1992) and after them most of the
            field have it; None for no mean.
        wise: weights of the last state, each in [0, 1], in a mean with the pre-trained weights: WiSE-FT (Wortsman et
            al., CVPR 2022, arXiv 2109.01903). The mean is of the weights as they act: of LoRA's product the factor that
            begins at zero is scaled. The weights of other branches are interpolated from where they began.

    """

    def __init__(
        self,
        model: nn.Module,
        n_steps: int,
        *,
        fractions: Sequence[float] = (),
        ema: float | None = None,
        wise: Sequence[float] = (),
    ) -> None:
        self.model, self.ema, self.wise = model, ema, tuple(wise)
        # A run of few steps has one state for several fractions.
        self.fractions = {f"{fraction:g}": max(1, round(fraction * n_steps)) for fraction in fractions if fraction < 1}
        self.names = state_names(fractions, ema, wise)
        self._kept: dict[str, Weights] = {}
        self._first = copied(trained_weights(model)) if wise else {}
        self._mean = copied(trained_weights(model)) if ema is not None else {}

    @torch.no_grad()
    def after(self, n_steps: int) -> None:
        """Take note of the weights after so many steps."""
        now = trained_weights(self.model)
        if self.ema is not None:
            torch._foreach_lerp_(list(self._mean.values()), list(now.values()), 1 - self.ema)
        for name, step in self.fractions.items():
            if step == n_steps:
                self._kept[name] = copied(now)

    def __iter__(self) -> Iterator[str]:
        """Yield the name of every state while the model is in it; the last is the state after the last step."""
        for name, weights in self._kept.items():
            with swapped(self.model, weights):
                yield name
        if self.ema is not None:
            with swapped(self.model, self._mean):
                yield ema_name(self.ema)
        for weight in self.wise:
            with swapped(self.model, interpolated(self._first, trained_weights(self.model), weight)):
                yield wise_name(weight)
        yield LAST


def state_names(fractions: Sequence[float], ema: float | None, wise: Sequence[float]) -> list[str]:
    """Return the names of the states in their order."""
    along = [f"{fraction:g}" for fraction in fractions if fraction < 1]
    return [*along, *([] if ema is None else [ema_name(ema)]), *map(wise_name, wise), LAST]


def ema_name(decay: float) -> str:
    """Return the name of the state of averaged weights."""
    return f"ema {decay:g}"


def wise_name(weight: float) -> str:
    """Return the name of a state on the way from the pre-trained weights to the last ones."""
    return f"wise {weight:g}"


def is_of_last(name: str) -> bool:
    """Return whether a state can be made of the weights before the first step and after the last one."""
    return name == LAST or name.startswith("wise ")


def trained_weights(model: nn.Module) -> Weights:
    """Return the trained parameters, not copied."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def copied(weights: Weights) -> Weights:
    """Return weights of their own memory."""
    return {name: value.clone() for name, value in weights.items()}


def interpolated(first: Weights, last: Weights, weight: float) -> Weights:
    """Return ``(1 - weight) first + weight last`` as it acts."""
    # The product of two interpolated factors would be quadratic in the weight.
    return {
        name: value if ".lora_A." in name else torch.lerp(first[name], value, weight) for name, value in last.items()
    }


@contextmanager
def swapped(model: nn.Module, weights: Weights) -> Iterator[None]:
    """Give a model other values of its trained weights for a while."""
    own = trained_weights(model)
    before = copied(own)
    try:
        for name, value in weights.items():
            own[name].copy_(value)
        yield
    finally:
        for name, value in before.items():
            own[name].copy_(value)
