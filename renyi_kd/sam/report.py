"""What a tap finds in a model, in words: the first thing to look at when something does not attach."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from renyi_kd.sam.module_paths import plain
from renyi_kd.sam.parts import Decoder, encoder_of, find_decoders
from renyi_kd.sam.run import CallFunction, evaluating
from renyi_kd.sam.tap import Tap, tap

# Tokens beside those of the masks, and where the decoder puts them; SAM 2 puts the object score first.
_BEFORE_IOU = {"obj_score_token": "object score"}
_AFTER_MASKS = {"hf_token": "HQ", "hq_token": "HQ"}


def report(model: nn.Module, batch: Any = None, *, call: CallFunction | None = None) -> str:
    """Return what a tap finds in a model: family, places, token layout, trainable parameters; one fact a line.

    Args:
        model: any module, wrapped or not, that has no tap yet: a tap would collect this run. On the meta device it
            needs no memory.
        batch: what the model runs on, for the shapes of the features; None to leave the model unrun.
        call: as for :func:`tap`.

    Returns:
        Lines of a name and a fact.

    Raises:
        ValueError: nothing is found, as :func:`tap` says it.

    """
    with tap(model, call=call) as tapped:
        decoders = find_decoders(model)
        rows = [("model", f"{type(model).__name__}, {_count(model.parameters())} parameters")]
        marks = ", ".join(sorted(decoders[0].family.marks))
        rows.append(("family", f"{_variant(decoders[0])}, by {marks} of its mask decoder"))
        rows.append(("mask decoder", " and ".join(decoder.name or "the model itself" for decoder in decoders)))
        places = _places(decoders[0])
        missing: list[str] = []
        shapes = _shapes(tapped, batch, missing)
        rows += [("image features", places[0] + shapes[0]), ("mask tokens", places[1] + shapes[1])]
        rows.append(("token layout", _layout(decoders[0])))
    embedding = getattr(decoders[0].module, decoders[0].family.token_embedding)
    rows.append(("loss", f"InfoSAMLoss(dim={embedding.weight.shape[-1]})"))
    try:
        encoder = encoder_of(model, None)
        rows.append(("image encoder", next(plain(name) for name, module in model.named_modules() if module is encoder)))
    except ValueError:
        missing.append("an image encoder for CachedTeacher: name it with encoder='path'")
    rows += [("trainable", line) for line in _trainable(model)]
    if not any(parameter.requires_grad for parameter in model.parameters()):
        missing.append("anything to train: every parameter is frozen, as a teacher's should be")
    rows += [("missing", line) for line in missing or ["nothing"]]
    return "\n".join(f"{name:<15} {fact}" for name, fact in rows)


def _shapes(tapped: Tap, batch: Any, missing: list[str]) -> tuple[str, str]:
    """Return what to say of both features after a run, and add to ``missing`` what kept the model from it."""
    if batch is None:
        missing.append("shapes: no batch to run the model on")
        return "", ""
    try:
        # Running statistics stay as they are.
        with evaluating(tapped.model):
            tapped(batch)
        features = tapped.take()
    except Exception as error:
        # Whatever the model raises: its structure is worth a report all the same.
        missing.append(f"a run as a student: {error}")
        try:
            features = tapped.observe(batch)
        except Exception as second:
            missing.append(f"a run as a teacher: {second}")
            return "", ""
    return _of(features.image_features), _of(features.mask_tokens)


def _variant(decoder: Decoder) -> str:
    children = {name for name, _ in decoder.module.named_children()}
    if children & _BEFORE_IOU.keys():
        return "SAM 2 or 3"
    return "SAM-HQ" if children & _AFTER_MASKS.keys() else "SAM"


def _places(decoder: Decoder) -> tuple[str, str]:
    name = f"{plain(decoder.name)}." if decoder.name else ""
    argument = f"{decoder.family.image_argument}= of {plain(decoder.name) or 'the model'}"
    return argument, f"input of {name}{decoder.family.token_modules}, {len(decoder.token_modules)} of them"


def _layout(decoder: Decoder) -> str:
    children = {name for name, _ in decoder.module.named_children()}
    parts, position = [], 0
    before = [text for name, text in _BEFORE_IOU.items() if name in children]
    after = [text for name, text in _AFTER_MASKS.items() if name in children]
    for text, count in [
        *((text, 1) for text in before),
        ("iou", 1),
        ("mask", decoder.n_tokens),
        *((text, 1) for text in after),
    ]:
        parts.append(f"{position}{f' to {position + count - 1}' if count > 1 else ''} {text}")
        position += count
    return " | ".join([*parts, f"from {position} on prompts"])


def _trainable(model: nn.Module) -> list[str]:
    """Return the trainable parameters of every part of the model, the wrappers' names left out."""
    parts: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parts.setdefault(plain(name).partition(".")[0], []).append(parameter)
    return [f"{_count(parameters)} in {part}" for part, parameters in parts.items()] or ["nothing"]


def _count(parameters: Iterable[Tensor]) -> str:
    number = sum(parameter.numel() for parameter in parameters)
    for unit, size in (("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)


def _of(value: Tensor) -> str:
    gradient = "with gradient" if value.requires_grad else "without gradient"
    return f", {list(value.shape)} in {str(value.dtype).removeprefix('torch.')}, {gradient}"
