"""The relation between image features and mask tokens: one attention score per pixel, without its projections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from renyi_kd.ops.dispatch import Impl, check_impl
from renyi_kd.ops.relation_directions import Relation, RelationWeights, relation_directions
from renyi_kd.ops.relation_scores import relation_scores
from renyi_kd.sam.features import SAMFeatures, check_features, image_of_samples
from renyi_kd.whole_state import LoadsWhole

# Unlike those that programs begin with, whose first layers would be drawn alike; the paper's number on arXiv.
_SEED = 2505_21920


class RelationModule(LoadsWhole):
    r"""Relation of mask tokens and image features, as InfoSAM defines it.

    With ``m = LN(z_m)``, ``Q = W_Q m + b_Q`` and ``K = W_K LN(z_i) + b_K`` the score of a pixel for a token is
    ``Q . K / sqrt(D) + m . LN(z_i)``, without a softmax. It is computed as ``LN_0(z_i) . w + c``: LN_0 is the LayerNorm
    without its affine part, ``u = W_K^T Q / sqrt(D) + m``, ``w = u gamma`` and ``c = Q . b_K / sqrt(D) + u . beta``.
    Neither the keys nor the normalised features are ever made. A state dict of the official module loads into this one.

    Args:
        dim: channels of image features and mask tokens.
        generator: what the projections are drawn from, as nn.Linear draws them; None for one with a seed of its own.
            All modules of one ``dim`` then begin alike, in every process and whatever the program was seeded with;
            ``torch.Generator().manual_seed(seed)`` gives another start. No global random state is read or moved.

    Shape: ``module(image_features [b, d, h, w], mask_tokens [s, n, d], image_index [s] or None)`` gives the relation
    maps ``[s, n, h, w]``, each sample's scores divided by their L2 norm; a sample whose scores are all zero stays so.

    Cost: 2 D^2 + 6 D parameters (132,608 at D = 256); O(s n h w D / b) per image, see ``ops/relation_scores``.

    Source: Zhang et al., InfoSAM, ICML 2025: the relation module.

    >>> relation = RelationModule(8)
    >>> relation(torch.randn(2, 8, 5, 5), torch.randn(2, 1, 8)).shape
    torch.Size([2, 1, 5, 5])

    """

    def __init__(self, dim: int = 256, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        check_start("RelationModule", dim, generator)
        if generator is None:
            generator = torch.Generator().manual_seed(_SEED)
        self.dim = dim
        self.query_proj = _projection(dim, generator)
        self.key_proj = _projection(dim, generator)
        self.layer_norm_feat = nn.LayerNorm(dim)
        self.layer_norm_mask = nn.LayerNorm(dim)

    def forward(self, image_features: Tensor, mask_tokens: Tensor, image_index: Tensor | None = None) -> Tensor:
        """Return the relation maps ``[s, n, h, w]``, L2-normalised per sample."""
        features = SAMFeatures(image_features, mask_tokens, image_index)
        check_features("RelationModule", "features", features)
        images = image_of_samples("RelationModule", "features", features)
        scores = self.scores(image_features, mask_tokens, images)
        unit = F.normalize(scores.flatten(1), dim=-1).view_as(scores)
        height = image_features.shape[2]
        return rearrange(unit, "s n (h w) -> s n h w", h=height)

    def scores(
        self,
        image_features: Tensor,
        mask_tokens: Tensor,
        images: Sequence[int] | None = None,
        *,
        impl: Impl = "auto",
    ) -> Tensor:
        """Return the scores before normalisation, ``[s, n, h * w]`` in fp32 (fp64 if anything is fp64).

        Args:
            image_features: ``[b, d, h, w]``.
            mask_tokens: ``[s, n, d]``.
            images: the image of each sample; None when sample i belongs to image i.
            impl: implementation of the pass over the features.

        Raises:
            ValueError: the features do not have ``dim`` channels, or are on another device than the module; or there is
                no such ``impl``.

        """
        check_impl("RelationModule", impl)
        dtype = torch.promote_types(image_features.dtype, torch.float32)
        tokens = mask_tokens.to(torch.promote_types(mask_tokens.dtype, dtype))
        relation = self.value(mask_tokens)
        directions, offsets = relation_directions(tokens, relation.weights, eps=relation.token_eps, impl=impl)
        eps = relation.feature_eps
        return relation_scores(image_features, directions, images, offsets=offsets, eps=eps, impl=impl)

    def value(self, mask_tokens: Tensor, *, function: str = "RelationModule") -> Relation:
        """Return what the operations take of the module, for mask tokens that fit it.

        Raises:
            ValueError: the tokens do not have ``dim`` channels, or are on another device than the module;
                ``function`` begins the message.

        """
        # From where modules keep their own, as parameters below.
        parts: dict[str, Any] = self._modules
        norm, features = parts["layer_norm_mask"], parts["layer_norm_feat"]
        query, key = parts["query_proj"], parts["key_proj"]
        key_weight = _parameter(key, "weight")
        if mask_tokens.shape[-1] != self.dim:
            raise ValueError(
                f"{function}: features must have dim = {self.dim} channels, got {mask_tokens.shape[-1]}; "
                f"build the loss with dim={mask_tokens.shape[-1]}"
            )
        if mask_tokens.device != key_weight.device:
            raise ValueError(
                f"{function}: features must be on the module's device {key_weight.device}, got "
                f"{mask_tokens.device}; move the loss with infosam_loss.to('{mask_tokens.device}')"
            )
        weights = RelationWeights(
            norm_weight=_parameter(norm, "weight"),
            norm_bias=_parameter(norm, "bias"),
            query_weight=_parameter(query, "weight"),
            query_bias=_parameter(query, "bias"),
            key_weight=key_weight,
            key_bias=_parameter(key, "bias"),
            feature_weight=_parameter(features, "weight"),
            feature_bias=_parameter(features, "bias"),
        )
        return Relation(weights, token_eps=norm.eps, feature_eps=features.eps)


def _parameter(module: nn.Module, name: str) -> Tensor:
    """Return ``module.name`` from where modules keep parameters; as an attribute it costs as much as an allocation."""
    parameter = module._parameters.get(name)
    return getattr(module, name) if parameter is None else parameter


def check_start(function: str, dim: int, generator: torch.Generator | None) -> None:
    """Raise unless a relation module can begin so; ``function`` begins the message.

    Raises:
        ValueError: ``dim`` is no size.
        TypeError: ``generator`` is none.

    """
    if isinstance(dim, bool) or not isinstance(dim, int) or dim < 1:
        raise ValueError(f"{function}: dim must be a positive integer, got {dim!r}; 256 is that of every SAM")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"{function}: generator must be a torch.Generator, got {type(generator).__name__}; "
            "torch.Generator().manual_seed(0) makes one"
        )


def _projection(dim: int, generator: torch.Generator) -> nn.Linear:
    """Return a linear layer as nn.Linear begins, uniform in +-1 / sqrt(dim), without the global draws of that."""
    layer: nn.Linear = nn.utils.skip_init(  # type: ignore[no-untyped-call]
        nn.Linear, dim, dim, device=torch.get_default_device()
    )
    with torch.no_grad():
        for parameter in layer.parameters():
            drawn = torch.empty(parameter.shape, dtype=torch.float32, device=generator.device)
            parameter.copy_(drawn.uniform_(-(dim**-0.5), dim**-0.5, generator=generator))
    return layer
