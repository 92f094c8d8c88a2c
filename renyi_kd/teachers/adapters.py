"""What can be seen of the adapters of peft and of transformers: which there are, and whether they are on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from renyi_kd.sam.module_paths import plain


def adapter_model(model: nn.Module) -> Any | None:
    """Return the part of a model that holds its adapters' settings: of peft, or of transformers' ``add_adapter``."""
    for module in model.modules():
        own = getattr(module, "_hf_peft_config_loaded", False)
        if hasattr(module, "peft_config") and (own or hasattr(module, "disable_adapter")):
            return module
    return None


def adapter_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the modules that adapters sit in, and those that peft keeps a trained copy of."""
    for name, module in model.named_modules():
        is_layer = all(hasattr(module, name) for name in ("enable_adapters", "disable_adapters", "active_adapter"))
        if is_layer and not hasattr(module, "peft_config"):
            yield name, module


def adapter_state(model: nn.Module) -> str:
    """Return which adapters are on, and where; empty for a model without any."""
    parts = []
    for name, layer in adapter_layers(model):
        merged = getattr(layer, "merged_adapters", [])
        parts.append(f"{plain(name)} {layer.active_adapter} {bool(layer.disable_adapters)} {merged}")
    return "\n".join(parts)


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are no adapter's and no trained copy's."""
    added = {part for _, layer in adapter_layers(model) for part in getattr(layer, "adapter_layer_names", ())} | {
        "modules_to_save"
    }
    return {name: value for name, value in model.named_parameters() if added.isdisjoint(name.split("."))}


@contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """Switch the adapters of an :func:`adapter_model` off."""
    if hasattr(model, "disable_adapter"):
        with model.disable_adapter():
            yield
        return
    layers = [layer for _, layer in adapter_layers(model) if not layer.disable_adapters]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
