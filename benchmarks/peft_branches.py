"""The branches that PEFT methods add to the blocks of an image encoder: how they are built and where they are put.

A branch puts out zero until it is trained.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Bottleneck(nn.Module):
    """``scale * up(activation(down(x)))`` on what ``before`` puts out, or the like."""

    def __init__(self, before: nn.Linear, width: int, activation: nn.Module, scale: float = 1.0) -> None:
        super().__init__()
        place: dict[str, Any] = {"device": before.weight.device, "dtype": before.weight.dtype}
        channels = before.out_features
        self.down = nn.Linear(channels, width, **place)
        self.activation = activation
        self.up = nn.Linear(width, channels, **place)
        self.scale = scale
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the branch's output, of the shape of ``x``."""
        return self.scale * self.up(self.activation(self.down(x)))


class After(nn.Module):
    """A module, then a branch with a skip: ``y + branch(y)`` with ``y = module(x)``."""

    def __init__(self, module: nn.Module, branch: nn.Module) -> None:
        super().__init__()
        self.module, self.branch = module, branch

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return the module's output and the branch's on it."""
        output = self.module(hidden_states)
        return output + self.branch(output)


class Beside(nn.Module):
    """A module and a branch on the same input: ``module(x) + branch(x)``, ``branch(module.norm(x))`` if it has a norm.

    The attention and the MLP of a TinyViT normalise their input themselves; in a ViT they are given it normalised.
    """

    def __init__(self, module: nn.Module, branch: nn.Module) -> None:
        super().__init__()
        self.module, self.branch = module, branch

    # The argument has the name by which transformers passes it.
    def forward(self, hidden_states: Tensor, **keywords: Any) -> Any:
        """Return what the module returns, with the branch's output added to the first tensor."""
        output = self.module(hidden_states, **keywords)
        norm = getattr(self.module, "norm", None)
        extra = self.branch(hidden_states if norm is None else norm(hidden_states))
        # Attention in transformers returns its weights as well.
        return (output[0] + extra, *output[1:]) if isinstance(output, tuple) else output + extra


class ConvLoRA(nn.Module):
    """LoRA with convolutions between its two matrices: ``up(p_i E_i(down(x)))``, i the likeliest of the experts.

    Expert i enlarges the map i times, convolves it with a 3 x 3 kernel, and shrinks it again. The gate sees the mean
    over the map. Its probability p_i weighs the expert, so that the gate is trained by the loss alone: the paper's
    noise and its loss for equal use of the experts are left out.
    """

    def __init__(self, linear: nn.Linear, rank: int, n_experts: int) -> None:
        super().__init__()
        place: dict[str, Any] = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        self.down = nn.Linear(linear.in_features, rank, bias=False, **place)
        self.gate = nn.Linear(rank, n_experts, bias=False, **place)
        self.experts = nn.ModuleList(nn.Conv2d(rank, rank, 3, padding=1, **place) for _ in range(n_experts))
        self.up = nn.Linear(rank, linear.out_features, bias=False, **place)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return the update for maps ``[b, h, w, c]``, or for the tokens ``[b, l, c]`` of square maps."""
        if x.ndim == 3:
            return self.forward(_as_squares(x)).flatten(1, 2)
        low = self.down(x).permute(0, 3, 1, 2)
        probability, chosen = self.gate(low.mean((2, 3))).softmax(-1).max(-1)
        mixed = torch.zeros_like(low)
        for index, expert in enumerate(self.experts):
            rows = (chosen == index).nonzero().flatten()
            if len(rows):
                mixed = mixed.index_copy(0, rows, _at_scale(expert, low[rows], index + 1).to(mixed.dtype))
        return self.up((probability.to(mixed.dtype)[:, None, None, None] * mixed).permute(0, 2, 3, 1))


def _as_squares(tokens: Tensor) -> Tensor:
    n_tokens = tokens.shape[1]
    side = math.isqrt(n_tokens)
    if side * side != n_tokens:
        raise ValueError(
            f"ConvLoRA: tokens [b, l, c] must fill square maps, got {n_tokens} to a map; give maps [b, h, w, c]"
        )
    return tokens.unflatten(1, (side, side))


def _at_scale(convolution: nn.Module, x: Tensor, scale: int) -> Tensor:
    if scale == 1:
        return convolution(x)
    enlarged = F.interpolate(x, scale_factor=scale, mode="bilinear", align_corners=False)
    return F.interpolate(convolution(enlarged), x.shape[-2:], mode="bilinear", align_corners=False)
