"""What the operations take of a relation module."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class RelationWeights(NamedTuple):
    """The weights of a relation module, as ``relation_directions`` takes them.

    Attributes:
        norm_weight: ``[d]``, of the tokens' LayerNorm.
        norm_bias: ``[d]``, likewise.
        query_weight: ``[d, d]``, W_Q.
        query_bias: ``[d]``, b_Q.
        key_weight: ``[d, d]``, W_K.
        key_bias: ``[d]``, b_K.
        feature_weight: ``[d]``, gamma of the features' LayerNorm.
        feature_bias: ``[d]``, its beta.

    """

    norm_weight: Tensor
    norm_bias: Tensor
    query_weight: Tensor
    query_bias: Tensor
    key_weight: Tensor
    key_bias: Tensor
    feature_weight: Tensor
    feature_bias: Tensor


class Relation(NamedTuple):
    """A relation module as its operations take it.

    Attributes:
        weights: by name, with gradients.
        token_eps: added to the variance of a token.
        feature_eps: added to the variance of a pixel.

    """

    weights: RelationWeights
    token_eps: float
    feature_eps: float
