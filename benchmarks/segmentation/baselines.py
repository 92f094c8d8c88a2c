"""What fine-tuning can do without a distiller: train less, slower in places, or near the pre-trained weights.

Other baselines are states of any run (``states``): early stop, a mean of the weights, WiSE-FT.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler

from benchmarks.segmentation.distillers.share import ShareControl
from renyi_kd.gradient_share import GradientMeasurement
from renyi_kd.sam.reads import Read, Reads

# "decoder_tenth": the decoder at a tenth of the rate. "output_tokens": the decoder's mask tokens alone are trained.
# "l2_sp": the weights are held near where they began.
BASELINES = ("decoder_tenth", "output_tokens", "l2_sp")
# Of the peak rate, at the end of the cosine and for the decoder of "decoder_tenth".
TENTH = 0.1
# The source chooses it by cross-validation. At a share of the gradient it is of no account.
L2_SP_WEIGHT = 0.01


def restrict(model: nn.Module, baseline: str) -> None:
    """Freeze what a baseline does not train.

    Raises:
        ValueError: the model has no mask tokens of its own to train.

    """
    if baseline != "output_tokens":
        return
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    tokens = [name for name, _ in trained if name.endswith(".mask_tokens.weight")]
    if not tokens:
        raise ValueError("restrict: output_tokens must find trained mask tokens, got none; tune the mask decoder")
    for name, parameter in trained:
        parameter.requires_grad_(name in tokens)


def optimizer_and_schedule(
    model: nn.Module, extra: Iterable[nn.Parameter], baseline: str, lr: float, n_steps: int
) -> tuple[Adam, LRScheduler]:
    """Return Adam over all that is trained, and a cosine from each rate to a tenth of it."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    extra = [parameter for parameter in extra if parameter.requires_grad]
    if baseline != "decoder_tenth":
        optimizer = Adam([parameter for _, parameter in named] + extra, lr)
        return optimizer, CosineAnnealingLR(optimizer, n_steps, eta_min=lr * TENTH)
    decoder = [parameter for name, parameter in named if "mask_decoder" in name]
    others = [parameter for name, parameter in named if "mask_decoder" not in name] + extra
    groups: list[dict[str, Any]] = [{"params": others, "lr": lr}, {"params": decoder, "lr": lr * TENTH}]
    optimizer = Adam([group for group in groups if group["params"]], lr)
    # The other schedule has one end for all groups.
    return optimizer, LambdaLR(
        optimizer, lambda step: TENTH + (1 - TENTH) * (1 + math.cos(math.pi * step / n_steps)) / 2
    )


class L2SP(nn.Module):
    """weight times the squared distance of the trained weights from where they began.

    Of LoRA's factors it is the squared norm of their product, what they add to the pre-trained weight. Of adapters and
    the decoder it is the distance from their initial values, at which an adapter adds nothing.

    Source: Li, Grandvalet, Davoine: Explicit Inductive Bias for Transfer Learning with Convolutional Networks, ICML
    2018, arXiv 1802.01483. There new layers are drawn to zero.

    Args:
        model: before the first step.
        share: of the task's gradient, over all trained weights; 0 for the weight.

    """

    def __init__(self, model: nn.Module, share: float = 0.0) -> None:
        super().__init__()
        self.control = ShareControl(share or None)
        self._parameters_of = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._first = {name: p.detach().clone() for name, p in self._parameters_of.items() if ".lora_" not in name}

    def forward(self) -> Tensor:
        """Return the loss of the weights as they are, ``[]`` in fp32, also under autocast."""
        with torch.autocast(next(iter(self._parameters_of.values())).device.type, enabled=False):
            return self._loss()

    def _loss(self) -> Tensor:
        aliases = {name: parameter.view_as(parameter) for name, parameter in self._parameters_of.items()}
        distances = [(aliases[name] - first).square().sum() for name, first in self._first.items()]
        for name, up in aliases.items():
            if ".lora_B." in name:
                distances.append((up @ aliases[name.replace(".lora_B.", ".lora_A.")]).square().sum())
        distance = torch.stack(distances).sum()
        weight = self.control.next_weight()
        reads = tuple(Read(self._parameters_of[name], alias) for name, alias in aliases.items())
        # Of tokens all is looked at, of maps a part.
        self.control.follow([GradientMeasurement(Reads(mask_tokens=reads))], weight)
        return (L2_SP_WEIGHT if self.control.share is None else weight) * distance

    def state(self) -> dict[str, float]:
        """Return weight and share of the last step; a weight of 1 is that of the source."""
        return self.control.state()
