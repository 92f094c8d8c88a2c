"""Places in a model that the user names: a path of a module, and what of its output is meant."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

Place = str | tuple[str, Callable[[Any], Tensor]]

# What wrappers put into the names of modules; peft keeps a trained copy and the original of a module.
_WRAPPERS = re.compile(
    r"\.(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_model\.model|modules_to_save\.[^.]+"
    r"|original_module)(?=\.)"
)


def modules_at(model: nn.Module, argument: str, place: Place) -> list[nn.Module]:
    """Return the modules of a path, whether or not the path or the model has the names of wrappers in it."""
    path = place if isinstance(place, str) else place[0]
    if not isinstance(path, str):
        raise TypeError(
            f"tap: {argument} must be a path or a pair of a path and a function, got {place!r}; "
            "a path is a name of model.named_modules()"
        )
    modules = [module for name, module in model.named_modules() if plain(name) == plain(path)]
    if not modules:
        last = path.rpartition(".")[2]
        near = [name for name, _ in model.named_modules() if last and last in name][:8]
        raise ValueError(
            f"tap: {argument} must name a module of the model, got {path!r}; "
            f"{'near it are ' + ', '.join(near) if near else 'its names are those of model.named_modules()'}"
        )
    return modules


def plain(name: str) -> str:
    """Return the name of a module without what wrappers put into it."""
    return _WRAPPERS.sub("", f".{name}.").strip(".")


def taken(argument: str, place: Place, output: Any) -> Tensor:
    """Return the tensor that a place means in the output of its module.

    Raises:
        TypeError: it is no tensor.
        ValueError: it cannot be mask tokens.

    """
    path, take = (place, None) if isinstance(place, str) else place
    value = output if take is None else take(output)
    if not isinstance(value, Tensor):
        raise TypeError(
            f"tap: {argument} must be a tensor, got {type(value).__name__} from {path!r}; "
            f"pick it: tap(model, {argument}=({path!r}, lambda output: ...))"
        )
    if argument == "mask_tokens" and value.ndim < 2:
        raise ValueError(
            f"tap: mask_tokens must have shape [s, n, d], [s, d] or [b, p, n, d], got {tuple(value.shape)} from "
            f"{path!r}; reshape it in the function of the place"
        )
    return value
