"""Why a tap has nothing to give, in words."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from renyi_kd.sam.module_paths import plain
from renyi_kd.sam.parts import Decoder, find_decoders
from renyi_kd.sam.recording import Recording

AS_REPLICAS = (
    "tap: the model must run in one thread, got a replica made by nn.DataParallel; use one process per GPU "
    "(DistributedDataParallel), or show the process a single GPU"
)
BESIDE_A_TEACHER = (
    "tap: a model must not be trained while another thread runs it in eval mode, got both at once, and a teacher's "
    "run, or a validation of the loss, switches modes and adapters for both; use one thread, or give each a copy of "
    "the model"
)


def why_nothing(model: nn.Module, decoders: Sequence[Decoder], recording: Recording, *, after_a_run: bool) -> str:
    """Return why nothing was collected, and the way out.

    Args:
        model: the one that was tapped.
        decoders: those that were found in it; empty where places were named.
        recording: what was recorded instead.
        after_a_run: whether the tap itself has just run the model.

    """
    names = [plain(decoder.name) or "the model itself" for decoder in decoders]
    fact = "got a run with nothing collected" if after_a_run else "got no batch and nothing collected"
    if recording.ran_without_gradient:
        return (
            f"tap: the model must run with gradient to be a student, {fact}: its mask decoder ran without gradient, as "
            "in a forward or predictor decorated with torch.no_grad (Meta's Sam.forward), under torch.no_grad itself, "
            "or under reentrant checkpointing; call the model's parts in a loop of your own (tap(model, call=...)) and "
            "checkpoint with use_reentrant=False"
        )
    if recording.ran_past_its_call and not names:
        return (
            "tap: image_features must be seen before mask_tokens in every forward, got mask tokens first; "
            "name a module of image_features that runs before the one of mask_tokens"
        )
    if recording.ran_past_its_call:
        return (
            "tap: the mask decoder must be called, got a run of its parts past its call, as by decoder.forward(...) or "
            f"decoder.predict_masks(...); call the decoder itself, {' or '.join(names)}, or name the places"
        )
    untapped = _untapped(model, decoders)
    if untapped:
        return (
            "tap: the model must be as it was when it was tapped, got a mask decoder without hooks at "
            f"{untapped[0]!r}, which came later, as by peft's modules_to_save or a copy; tap the model again"
        )
    way_out = "pass a batch or run the model"
    if after_a_run:
        way_out = "call the decoder in the forward, run it in tap(model, call=...), or name the places of another"
    if any(_is_compiled(module) for module in model.modules()):
        way_out += "; tap a compiled model before its first call, hooks that are set later never run"
    elif recording.ran_without_decoder and names:
        fact += f": it ran, and none of its decoders ({', '.join(names)}) was called"
        way_out = "name the places: tap(model, image_features=..., mask_tokens=...)"
    return f"tap: the model must call its mask decoder before the loss, {fact}; {way_out}"


def _untapped(model: nn.Module, decoders: Sequence[Decoder]) -> list[str]:
    """Return the names of mask decoders that came after the tap."""
    known = {id(decoder.module) for decoder in decoders}
    return [decoder.name for decoder in find_decoders(model) if known and id(decoder.module) not in known]


def _is_compiled(module: nn.Module) -> bool:
    return type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None
