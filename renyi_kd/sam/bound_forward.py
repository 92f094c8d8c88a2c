"""A ``forward`` set on an instance, which a deep copy of the model keeps: it then runs the original."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from torch import nn


def refuse_forward_of_another_model(model: nn.Module) -> None:
    """Raise where a module's own ``forward`` is a method of a module that is no part of the model.

    Raises:
        ValueError: it is.

    """
    own = {id(module) for module in model.modules()}
    for name, module in model.named_modules():
        forward = vars(module).get("forward")
        for bound in () if forward is None else _modules_bound_to(forward):
            if id(bound) not in own and type(bound) is type(module):
                raise ValueError(
                    f"tap: model must run its own modules, got {name or type(model).__name__!r} with a forward of its "
                    "own that runs another model's, as after a deep copy of a model with a compiled forward (sam2's "
                    "compile_image_encoder) or one that Accelerate prepared; copy the model before that is done"
                )


def _modules_bound_to(function: Any, depth: int = 4) -> Iterator[nn.Module]:
    """Yield the modules whose method a function is, or wraps."""
    if depth == 0 or function is None:
        return
    owner = getattr(function, "__self__", None)
    if isinstance(owner, nn.Module):
        yield owner
    if isinstance(function, functools.partial):
        yield from _modules_bound_to(function.func, depth - 1)
    for wrapped in ("__wrapped__", "_torchdynamo_orig_callable", "__func__"):
        yield from _modules_bound_to(getattr(function, wrapped, None), depth - 1)
