"""Whether values are the same or have changed, by their memory and versions: nothing here waits for a device."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from types import MappingProxyType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

# Those of which models hold hundreds, and which are no subclass that hides its memory.
_PLAIN = (Tensor, nn.Parameter)
# A container may hold itself.
_DEPTH = 8


class Snapshot(NamedTuple):
    """A value as it was: containers copied, tensors kept with their versions.

    Attributes:
        value: what was given, with mappings, lists, tuples and dataclasses of its own, as far as they can be copied
            and to the depth that tensors are looked for.
        versions: its tensors, and how often each had been written to.

    """

    value: Any
    versions: tuple[tuple[Tensor, int], ...]

    def changed(self) -> bool:
        """Return whether a tensor was written to since."""
        return any(version(tensor) != before for tensor, before in self.versions)


def snapshot(value: Any) -> Snapshot:
    """Return a value as it is now; later changes of its containers do not reach it."""
    copied = _copied(value)
    return Snapshot(copied, tuple((leaf, version(leaf)) for leaf in leaves(copied) if isinstance(leaf, Tensor)))


def version(tensor: Tensor) -> int:
    """Return how often a tensor's memory was written to, as far as autograd knows."""
    # Inference tensors have no version: autograd does not track what happens to them.
    return 0 if tensor.is_inference() else tensor._version


def storage_of(value: Any) -> int | None:
    """Return the address of the memory that a tensor or an array is a part of; None where there is none."""
    if type(value) in _PLAIN and value.layout is torch.strided:
        return value.untyped_storage().data_ptr() or None
    if not isinstance(value, Tensor) and (address := _address_of_array(value)) is not None:
        while (base := getattr(value, "base", None)) is not None and (whole := _address_of_array(base)) is not None:
            value, address = base, whole
        return address or None
    # A shard of FSDP holds its memory in a tensor of its own.
    tensor = getattr(value, "_local_tensor", value)
    if not isinstance(tensor, Tensor) or is_fake(tensor) or tensor.layout != torch.strided:
        return None
    return tensor.untyped_storage().data_ptr() or None


def _address_of_array(value: Any) -> int | None:
    # Of a class the name is there too, and stands for a descriptor.
    interface = getattr(value, "__array_interface__", None)
    data = interface.get("data") if isinstance(interface, dict) else None
    return data[0] if isinstance(data, tuple) else None


def memory_of(value: Any) -> StorageWeakRef | None:
    """Return what tells a tensor's memory from any other, also after it is freed, without keeping it."""
    tensor = getattr(value, "_local_tensor", value)
    if storage_of(tensor) is None or not isinstance(tensor, Tensor):
        return None
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


def is_fake(value: Any) -> bool:
    """Return whether a tensor has a shape and no numbers, as under torch.export."""
    return hasattr(value, "fake_mode")


def leaves(value: Any, depth: int = _DEPTH) -> Iterator[Any]:
    """Yield what a nested value holds: the contents of mappings, lists, tuples, and of objects with attributes."""
    if isinstance(value, Tensor) or depth == 0:
        yield value
    elif isinstance(value, Mapping):
        for item in _items(value):
            yield from leaves(item, depth - 1)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from leaves(item, depth - 1)
    elif _has_fields(value):
        # An object may know half of the program.
        for item in _fields(value).values():
            yield from leaves(item, min(depth - 1, 2))
    else:
        yield value


def differ(a: Any, b: Any) -> bool:
    """Return whether two batches have something in common that shows them to be different ones.

    Tensors are compared by their memory, not by their values.
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


def _copied(value: Any, depth: int = _DEPTH) -> Any:
    if depth == 0 or isinstance(value, Tensor | str):
        return value
    try:
        return _copy_of_container(value, depth)
    except Exception:
        # One that is read-only, takes other arguments than its contents or is not complete, by an error of its own
        # making; it stands as it is.
        return value


def _copy_of_container(value: Any, depth: int) -> Any:
    if isinstance(value, Mapping):
        given = {name: value[name] for name in value}
        items = {name: _copied(item, depth - 1) for name, item in given.items()}
        if type(value) is dict:
            return items
        if type(value) is MappingProxyType:
            return MappingProxyType(items)
        twin: Any = copy.copy(value)
        for name, item in items.items():
            if item is not given[name]:
                twin[name] = item
        return twin
    if isinstance(value, tuple) and hasattr(value, "_make"):
        # Whatever its class makes of arguments.
        return value._make(_copied(item, depth - 1) for item in value)
    if type(value) in (tuple, list):
        return type(value)(_copied(item, depth - 1) for item in value)
    if isinstance(value, list):
        twin = copy.copy(value)
        twin[:] = [_copied(item, depth - 1) for item in value]
        return twin
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        twin = copy.copy(value)
        for name, item in _fields(value).items():
            object.__setattr__(twin, name, _copied(item, depth - 1))
        return twin
    return value


def _items(mapping: Mapping[Any, Any]) -> list[Any]:
    """Return the values of a mapping; none where it cannot tell them, as a configuration that is not complete."""
    try:
        return list(mapping.values())
    except Exception:
        return []


def _has_fields(value: Any) -> bool:
    known = hasattr(value, "__dict__") or dataclasses.is_dataclass(value)
    return known and not callable(value) and not isinstance(value, type | nn.Module | ModuleType)


def _fields(value: Any) -> dict[str, Any]:
    """Return the attributes that an object holds; a dataclass may hold them in slots."""
    own: dict[str, Any] = getattr(value, "__dict__", {})
    if not dataclasses.is_dataclass(value):
        return own
    names = (each.name for each in dataclasses.fields(value))
    return {**{name: getattr(value, name) for name in names if hasattr(value, name)}, **own}
