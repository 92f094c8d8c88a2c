"""Running a model on a batch of any common form, as its forward wants it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def run_model(model: nn.Module, batch: Any) -> Any:
    """Run the model on a mapping, a tensor, a tuple or list of arguments, or a list of dicts (Meta's format).

    Of a mapping only the names that the forward takes are passed.

    Raises:
        TypeError: the batch is none of these.
        ValueError: it holds no argument of the forward, or is a list of dicts for a model of transformers.

    """
    if isinstance(batch, Mapping):
        names = forward_parameters(model)
        known = {name: value for name, value in batch.items() if name in names}
        if not known:
            raise ValueError(
                f"tap: batch must hold arguments of the model's forward, got the names {sorted(map(str, batch))} where "
                f"it takes {sorted(names)}; rename them, or pass tap(model, call=lambda model, batch: ...)"
            )
        return model(**known)
    if isinstance(batch, Tensor):
        return model(batch)
    if isinstance(batch, tuple | list) and batch:
        if all(isinstance(item, Mapping) for item in batch):
            if "pixel_values" in forward_parameters(model):
                raise ValueError(
                    "tap: batch must be a mapping for a model of transformers, got a list of dicts, Meta's format; "
                    "pass tap(model, call=lambda model, batch: ...)"
                )
            multimask = forward_parameters(model).get("multimask_output")
            required = multimask is not None and multimask.default is inspect.Parameter.empty
            return model(list(batch), multimask_output=False) if required else model(list(batch))
        return model(*batch)
    raise TypeError(
        f"tap: batch must be a mapping, a tensor, a tuple, or a list of dicts, got {type(batch).__name__}; "
        "for anything else pass tap(model, call=lambda model, batch: ...)"
    )


def forward_parameters(model: nn.Module) -> dict[str, inspect.Parameter]:
    """Return the named parameters of the forward, of the wrapped model where a wrapper only passes all through."""
    for module in model.modules():
        named = {
            name: parameter
            for name, parameter in inspect.signature(module.forward).parameters.items()
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        }
        if named:
            return named
    return {}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch the model to eval mode and every module back to the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    if any(training for _, training in modes):
        model.eval()
    try:
        yield
    finally:
        # train() reaches the children too, and parents come first in modules().
        for module, training in modes:
            if module.training != training:
                module.train(training)


def differ(a: Any, b: Any) -> bool:
    """Return whether two batches have something in common that shows them to be different ones.

    Tensors are compared by their memory, not by their values: that would wait for the device.
    """
    if a is b:
        return False
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.device == b.device and (a.shape != b.shape or a.data_ptr() != b.data_ptr())
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return any(differ(a[name], b[name]) for name in a.keys() & b.keys())
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) != len(b) or any(differ(x, y) for x, y in zip(a, b, strict=True))
    return isinstance(a, int | float | str) and isinstance(b, int | float | str) and a != b
