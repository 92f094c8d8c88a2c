"""What several tests share: tolerances from data, seeded features, small models."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from renyi_kd import RelationModule, SAMFeatures


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return seeded normal numbers, the same in every dtype up to rounding."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def sam_features(
    n_samples: int = 4,
    *,
    seed: int,
    dim: int = 12,
    size: tuple[int, int] = (5, 7),
    n_tokens: int = 1,
    image_index: list[int] | None = None,
    dtype: torch.dtype = torch.float32,
) -> SAMFeatures:
    """Return random features of ``n_samples`` samples; the images are as many, or as ``image_index`` counts."""
    n_images = n_samples if image_index is None else max(image_index) + 1
    n_samples = n_samples if image_index is None else len(image_index)
    return SAMFeatures(
        randn(n_images, dim, *size, seed=seed, dtype=dtype),
        randn(n_samples, n_tokens, dim, seed=seed + 1, dtype=dtype),
        None if image_index is None else torch.tensor(image_index),
    )


def in_training(features: SAMFeatures) -> SAMFeatures:
    """Return a copy whose image features and mask tokens are leaves that require grad."""
    return features._replace(
        image_features=features.image_features.detach().clone().requires_grad_(),
        mask_tokens=features.mask_tokens.detach().clone().requires_grad_(),
    )


def to(features: SAMFeatures, dtype: torch.dtype) -> SAMFeatures:
    """Return a copy in ``dtype``, without gradient."""
    return features._replace(
        image_features=features.image_features.detach().to(dtype), mask_tokens=features.mask_tokens.detach().to(dtype)
    )


def relation_module(dim: int = 12, *, seed: int = 100, dtype: torch.dtype = torch.float32) -> RelationModule:
    """Return a relation module with every parameter random, the norms' too, so that none can be left out."""
    relation = RelationModule(dim).to(dtype)
    with torch.no_grad():
        for index, parameter in enumerate(relation.parameters()):
            noise = randn(*parameter.shape, seed=seed + index, dtype=dtype)
            parameter.copy_(noise / dim**0.5 if parameter.ndim == 2 else parameter.round() + 0.3 * noise)
    return relation


def gradients(
    loss: Tensor, student: SAMFeatures, relation: RelationModule
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the gradients of the student's features and of the relation module, by name."""
    leaves = {"image_features": student.image_features, "mask_tokens": student.mask_tokens}
    parameters = dict(relation.named_parameters())
    flat = torch.autograd.grad(loss, [*leaves.values(), *parameters.values()])
    return dict(zip(leaves, flat[:2], strict=True)), dict(zip(parameters, flat[2:], strict=True))


def module_gradients(loss: Tensor, *modules: nn.Module) -> dict[str, Tensor]:
    """Run backward and return every gradient by its parameter, after the number of the module if there are several."""
    named = {
        f"{number}.{name}" if len(modules) > 1 else name: parameter
        for number, module in enumerate(modules)
        for name, parameter in module.named_parameters()
    }
    for parameter in named.values():
        parameter.grad = None
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in named.items() if parameter.grad is not None}
