"""The weights of a relation module, by name."""

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
