"""The InfoSAM loss of a batch, from features to terms."""

from __future__ import annotations

from renyi_kd.objective import Objective
from renyi_kd.ops import gram_terms, relation_directions
from renyi_kd.ops.dispatch import Impl, implementation
from renyi_kd.ops.feature_terms import reference
from renyi_kd.ops.feature_terms.types import Pair
from renyi_kd.ops.gram_terms.types import RelationTerms
from renyi_kd.ops.relation_directions import Relation
from renyi_kd.samples.samples import Join

__all__ = ["Pair", "feature_terms"]


def feature_terms(
    pair: Pair, relation: Relation, objective: Objective, *, join: Join | None = None, impl: Impl = "auto"
) -> RelationTerms:
    """Return what :func:`reference.feature_terms` defines.

    Where Triton runs all of it, at alpha = 2 and over the batch alone, it is one operation with few launches; elsewhere
    each of its operations runs by the implementation that ``impl`` names.
    """
    n_samples, _, n_channels = pair.teacher_tokens.shape
    fits = (
        join is None
        and objective.alpha == 2
        and n_samples <= gram_terms.MAX_SAMPLES
        and n_channels <= relation_directions.MAX_CHANNELS
    )
    if fits and implementation(*pair[:4], *relation.weights, impl=impl).name == "triton":
        from renyi_kd.ops.feature_terms import triton

        return triton.feature_terms(pair, relation, objective)
    return reference.feature_terms(pair, relation, objective, join=join, impl=impl)
