"""What one model computed in one step, as all distillers take it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from renyi_kd import SAMFeatures


class Observation(NamedTuple):
    """A model's step.

    Attributes:
        features: image features ``[b, d, h, w]`` and mask tokens ``[s, n, d]``, as a tap gives them.
        logits: mask logits ``[b, p, S, S]`` at the size of the input, far below zero in the padding.
        layers: maps ``[b, c_i, h_i, w_i]`` of the encoder's stages, from early to late; empty unless a distiller asks.
        layer_sources: what the stages put out, of which ``layers`` are views.

    """

    features: SAMFeatures
    logits: Tensor
    layers: tuple[Tensor, ...] = ()
    layer_sources: tuple[Tensor, ...] = ()
