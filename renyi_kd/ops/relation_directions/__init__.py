"""From mask tokens to the directions and offsets of their scores."""

from __future__ import annotations

from torch import Tensor

from renyi_kd.ops.dispatch import Impl, resolve
from renyi_kd.ops.relation_directions import reference
from renyi_kd.ops.relation_directions.types import Relation, RelationWeights

__all__ = ["Relation", "RelationWeights", "relation_directions"]

# All channels of a token must fit in the registers of one program.
MAX_CHANNELS = 4096


def relation_directions(
    mask_tokens: Tensor, weights: RelationWeights, *, eps: float = 1e-5, impl: Impl = "auto"
) -> tuple[Tensor, Tensor]:
    """Return what :func:`reference.relation_directions` defines, by the implementation that ``impl`` names."""
    n_channels = mask_tokens.shape[-1]
    limits = [f"{n_channels} channels (the kernels take at most {MAX_CHANNELS})"] if n_channels > MAX_CHANNELS else []
    if resolve(impl, mask_tokens, *weights, limits=limits) == "triton":
        from renyi_kd.ops.relation_directions import triton

        return triton.relation_directions(mask_tokens, weights, eps=eps)
    return reference.relation_directions(mask_tokens, weights, eps=eps)
