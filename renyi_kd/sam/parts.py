"""Where each family of SAMs keeps its image features and mask tokens, recognised by structure alone."""

from __future__ import annotations

from collections.abc import Callable
from itertools import takewhile
from typing import NamedTuple

from torch import Tensor, nn

from renyi_kd.sam.module_paths import modules_at, plain


class Family(NamedTuple):
    """How the mask decoder of a family is recognised, and where the two features pass through it.

    Attributes:
        name: for messages.
        marks: the submodules that only this family's mask decoder has together.
        image_argument: the decoder's argument that holds the image features ``[b, d, h, w]``.
        image_position: its position when it is not passed by name.
        token_modules: the attribute with one module per mask token; the input of module i is mask token i.
        token_embedding: the submodule that holds the initial mask tokens, and so their number.

    """

    name: str
    marks: frozenset[str]
    image_argument: str
    image_position: int
    token_modules: str
    token_embedding: str


class Unsupported(NamedTuple):
    """A model for segmentation without mask tokens: how it is recognised, and what to say."""

    marks: frozenset[str]
    reason: str


# One entry serves Meta's decoder and all its descendants (SAM-HQ, SAM 2 and 3, EdgeTAM, the distilled SAMs, those of
# kornia and transformers): they kept the names of these parts, whatever they added to them.
FAMILIES = (
    Family(
        name="SAM mask decoder (segment_anything and its kin, transformers' SamModel)",
        marks=frozenset({"transformer", "iou_token", "mask_tokens", "output_hypernetworks_mlps"}),
        image_argument="image_embeddings",
        image_position=0,
        token_modules="output_hypernetworks_mlps",
        token_embedding="mask_tokens",
    ),
)

# The attribute that holds the image encoder, in Meta's models and their kin, and in transformers.
_ENCODERS = ("image_encoder", "vision_encoder")
# Likewise the prompt encoder, with whatever stands before it.
_PROMPT_ENCODER = "prompt_encoder"

_NAME_PLACES = "name what stands for both features: tap(model, image_features='path', mask_tokens='path')"

UNSUPPORTED = (
    Unsupported(
        frozenset({"detr_decoder"}),
        "a DETR, whose object queries know no prompt; take Sam3TrackerModel, which has SAM 3's encoder and a mask "
        f"decoder, or {_NAME_PLACES}",
    ),
    Unsupported(
        frozenset({"image_encoder", "mask_decoder"}),
        "whose mask decoder has no mask_tokens with output_hypernetworks_mlps (MONAI's CellSamWrapper decodes by "
        f"convolutions); keep the SAM's own decoder, or {_NAME_PLACES}",
    ),
)


class Decoder(NamedTuple):
    """A mask decoder that was found in a model."""

    name: str
    module: nn.Module
    family: Family

    @property
    def n_tokens(self) -> int:
        """The number of its mask tokens."""
        n_tokens: int = getattr(getattr(self.module, self.family.token_embedding), "num_embeddings", 1)
        return n_tokens

    @property
    def token_modules(self) -> list[nn.Module]:
        """The hypernetworks: one for each mask token, or one for all."""
        modules = getattr(self.module, self.family.token_modules)
        return list(modules) if isinstance(modules, nn.ModuleList) else [modules]

    def mask_tokens(self, number: int, value: Tensor) -> list[tuple[int | None, Tensor]]:
        """Return what the input of hypernetwork ``number`` holds: pairs of a mask token's number and ``[..., d]``.

        AutoGluon's Conv-LoRA passes all tokens to the first, ``[b, p, n, d]``. A hypernetwork that several tokens share
        gets them at once, ``[s, n, d]``, or in one call after the other, and the number is then that of the call.
        """
        shared = self.n_tokens > 1 and len(self.token_modules) == 1
        if value.ndim == 4 or (shared and value.ndim == 3 and value.shape[1] == self.n_tokens):
            return list(enumerate(value.unbind(-2)))
        return [(None if shared else number, value)]


def find_decoders(model: nn.Module) -> list[Decoder]:
    """Return every mask decoder in ``model``: two where peft keeps a trained copy beside the original."""
    return [
        Decoder(name, module, family)
        for name, module in model.named_modules()
        for family in FAMILIES
        if family.marks <= {child for child, _ in module.named_children()}
    ]


def known_decoders(model: nn.Module) -> list[Decoder]:
    """Return every mask decoder in a model to be tapped.

    Raises:
        ValueError: there is none that is known.

    """
    decoders = find_decoders(model)
    if not decoders:
        reason = _why_unsupported(model)
        if reason is not None:
            raise ValueError(f"tap: model must have mask tokens, got {type(model).__name__}, {reason}")
        sought = "; ".join(f"a {family.name}: a module with {', '.join(sorted(family.marks))}" for family in FAMILIES)
        children = [f"{name} ({type(child).__name__})" for name, child in model.named_children()]
        raise ValueError(
            f"tap: model must hold a mask decoder that is known, got {type(model).__name__} with the parts "
            f"{', '.join(children) or 'none'}; looked for {sought}. Name the places of any other model: "
            "tap(model, image_features='path.of.module', mask_tokens='path.of.module')"
        )
    return decoders


def _why_unsupported(model: nn.Module) -> str | None:
    """Return why a model without a known mask decoder has no mask tokens, and the way out; None if it is unknown."""
    for module in model.modules():
        children = {name for name, _ in module.named_children()}
        for unsupported in UNSUPPORTED:
            if unsupported.marks <= children:
                return unsupported.reason
    return None


def encoder_of(model: nn.Module, path: str | None) -> nn.Module:
    """Return the image encoder of a model, or the module at ``path``.

    Raises:
        ValueError: there is none.

    """
    if path is not None:
        return modules_at(model, "encoder", path)[0]
    module: nn.Module
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in _ENCODERS:
            return module
    raise ValueError(
        f"CachedTeacher: the teacher must have an image encoder, got {type(model).__name__} without "
        f"{' or '.join(_ENCODERS)}; name it: encoder='path.of.module'"
    )


def image_encoder_of(model: nn.Module, decoder: str) -> nn.Module | None:
    """Return the image encoder that stands nearest to a decoder of this name; None where there is none."""
    return _nearest(model, decoder, lambda name: name in _ENCODERS)


def prompt_encoder_of(model: nn.Module, decoder: str) -> nn.Module | None:
    """Return the prompt encoder that stands nearest to a decoder of this name; None where there is none."""
    return _nearest(model, decoder, lambda name: name.endswith(_PROMPT_ENCODER))


def _nearest(model: nn.Module, decoder: str, is_meant: Callable[[str], bool]) -> nn.Module | None:
    """Return the module of a meant name that shares most of its path with the decoder; of nested ones the outer."""
    best: nn.Module | None = None
    most = -1
    for name, module in model.named_modules():
        if is_meant(name.rpartition(".")[2]):
            same = (a == b for a, b in zip(plain(name).split("."), plain(decoder).split("."), strict=False))
            common = len(list(takewhile(bool, same)))
            if common > most:
                best, most = module, common
    return best
