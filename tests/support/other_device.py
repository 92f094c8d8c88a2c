"""A device that is not there: its tensors hold those of a CPU, and are refused where a real one would refuse them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

# The one device beside the CPU for which autograd needs no driver. Nothing is run on it.
NAME = "meta"
_COPIES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}
# Which take indices from anywhere.
_INDEXING = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default}


class OnDevice(Tensor):
    """A tensor that says it is on :data:`NAME`."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnDevice:
        tensor = Tensor._make_wrapper_subclass(
            cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, device=NAME
        )
        tensor.held = held
        return tensor

    def tolist(self) -> Any:
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {}, None)


class Device(TorchDispatchMode):
    """Runs what is made on the device, and refuses numbers that it does not have and operands on two devices."""

    def __init__(self, *, has_fp64: bool) -> None:
        super().__init__()
        self.has_fp64 = has_fp64

    def __torch_dispatch__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {}, self)


def to_device(value: Any) -> Any:
    """Return tensors, parameters and modules on the device, without gradient."""
    if isinstance(value, nn.Module):
        for module in value.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(OnDevice(parameter.detach()))
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = OnDevice(buffer.detach())
        return value
    return tree_map(lambda leaf: OnDevice(leaf.detach()) if isinstance(leaf, Tensor) else leaf, value)


@contextmanager
def other_device(*, has_fp64: bool) -> Iterator[Device]:
    """Let there be the device; autocast, which does not know it, does nothing there."""
    autocast = torch.autocast

    def without(device_type: str, *args: Any, **kwargs: Any) -> Any:
        return nullcontext() if device_type == NAME else autocast(device_type, *args, **kwargs)

    with (
        mock.patch("torch.autocast", without),
        mock.patch("renyi_kd.fp64.has_fp64", lambda device: device.type != NAME or has_fp64),
        mock.patch("renyi_kd.ops.gram_moment.reference.has_fp64", lambda device: device.type != NAME or has_fp64),
        Device(has_fp64=has_fp64) as device,
    ):
        yield device


def _run(function: Any, args: Any, kwargs: dict[str, Any], device: Device | None) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, OnDevice)]
    target = kwargs.get("device")
    makes_there = torch.device(target).type == NAME if target is not None else bool(there)
    if there and function not in _COPIES | _INDEXING:
        elsewhere = [tuple(t.shape) for t in tensors if not isinstance(t, OnDevice) and t.ndim > 0]
        assert not elsewhere, f"{function} has operands on two devices: {elsewhere} are on the CPU"
    if target is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    wrappers = {id(tensor.held): tensor for tensor in there}
    args, kwargs = tree_map(lambda leaf: leaf.held if isinstance(leaf, OnDevice) else leaf, (args, kwargs))
    result = function(*args, **kwargs)
    if function is torch.ops.aten.copy_.default:
        makes_there = bool(wrappers) and id(args[0]) in wrappers

    def wrapped(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or isinstance(leaf, OnDevice):
            return leaf
        assert leaf.dtype != torch.float64 or device is None or device.has_fp64, f"{function} makes fp64 on the device"
        return wrappers.get(id(leaf)) if id(leaf) in wrappers else OnDevice(leaf)

    return tree_map(wrapped, result) if makes_there else result
