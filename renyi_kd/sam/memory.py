"""Whether values are the same or have changed, by their memory and versions: nothing here waits for a device."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

# Those of which models hold hundreds, and which are no subclass that hides its memory.
_PLAIN = (Tensor, nn.Parameter)


class Snapshot(NamedTuple):
    """A value as it was: containers copied, tensors kept with their versions.

    Attributes:
        value: what was given, with mappings, lists, tuples and dataclasses of its own.
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
    interface = getattr(value, "__array_interface__", None)
    if interface is not None and not isinstance(value, Tensor):
        base = value
        while getattr(base.base, "__array_interface__", None) is not None:
            base = base.base
        return base.__array_interface__["data"][0] or None
    # A shard of FSDP holds its memory in a tensor of its own.
    tensor = getattr(value, "_local_tensor", value)
    if not isinstance(tensor, Tensor) or is_fake(tensor) or tensor.layout != torch.strided:
        return None
    return tensor.untyped_storage().data_ptr() or None


def memory_of(value: Any) -> StorageWeakRef | None:
    """Return what tells a tensor's memory from any other, also after it is freed, without keeping it."""
    tensor = getattr(value, "_local_tensor", value)
    if storage_of(tensor) is None or not isinstance(tensor, Tensor):
        return None
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


def is_fake(value: Any) -> bool:
    """Return whether a tensor has a shape and no numbers, as under torch.export."""
    return hasattr(value, "fake_mode")


def leaves(value: Any, depth: int = 8) -> Iterator[Any]:
    """Yield what a nested value holds: the contents of mappings, lists, tuples, and of objects with attributes."""
    if isinstance(value, Tensor) or depth == 0:
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from leaves(item, depth - 1)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from leaves(item, depth - 1)
    elif _has_fields(value):
        # An object may know half of the program.
        for item in vars(value).values():
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


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        items = {name: _copied(item) for name, item in value.items()}
        if type(value) is dict:
            return items
        twin: Any = copy.copy(value)
        for name, item in items.items():
            if item is not value[name]:
                twin[name] = item
        return twin
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_copied, value))
    if type(value) in (tuple, list):
        return type(value)(map(_copied, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        twin = copy.copy(value)
        for name, item in vars(value).items():
            object.__setattr__(twin, name, _copied(item))
        return twin
    return value


def _has_fields(value: Any) -> bool:
    return hasattr(value, "__dict__") and not callable(value) and not isinstance(value, type | nn.Module)
