"""Where each family of SAMs keeps its image features and mask tokens, recognised by structure alone."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn


class Family(NamedTuple):
    """How the mask decoder of a family is recognised, and where the two features pass through it.

    Attributes:
        name: for messages.
        marks: the submodules that only this family's mask decoder has together.
        image_argument: the decoder's argument that holds the image features ``[b, d, h, w]``.
        image_position: its position when it is not passed by name.
        token_modules: the attribute with one module per mask token; the input of module i is mask token i.

    """

    name: str
    marks: frozenset[str]
    image_argument: str
    image_position: int
    token_modules: str


FAMILIES = (
    Family(
        name="SAM mask decoder (segment_anything and its kin, transformers' SamModel)",
        marks=frozenset({"transformer", "iou_token", "mask_tokens", "output_hypernetworks_mlps"}),
        image_argument="image_embeddings",
        image_position=0,
        token_modules="output_hypernetworks_mlps",
    ),
)


def find_decoders(model: nn.Module) -> list[tuple[nn.Module, Family]]:
    """Return every mask decoder in ``model``: two where peft keeps a trained copy beside the original."""
    return [
        (module, family)
        for module in model.modules()
        for family in FAMILIES
        if family.marks <= {name for name, _ in module.named_children()}
    ]
