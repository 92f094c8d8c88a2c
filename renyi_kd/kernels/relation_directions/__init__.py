"""From mask tokens to the directions and offsets of their scores."""

from renyi_kd.kernels.relation_directions.reference import RelationWeights, relation_directions

__all__ = ["RelationWeights", "relation_directions"]
