"""Triton's interpreter under a shadow of memory, which knows what a GPU would not tell.

Every argument of a launch is moved to a place of its own, with room around it that belongs to nobody. Of each byte is
known whether it is an element of that argument, whether anybody wrote it, and which programs of the launch read it and
wrote it. What the programs ask for is counted, a byte as often as it is asked for.
"""

from __future__ import annotations

import bisect
import ctypes
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder

NOBODY, SEVERAL = -1, -2
# Bytes on either side of an argument. A stride of a small map does not leap over them.
_ROOM = 2**16
_ALLOCATIONS = ((torch, "empty", "empty_like", "empty_strided"), (Tensor, "new_empty", "new_empty_strided"))


class Watch:
    """What was seen.

    Attributes:
        faults: each once, as kernel and fault.
        read, written: bytes that were asked for, by kernel.

    """

    def __init__(self) -> None:
        self.faults: dict[str, None] = {}
        self.read: dict[str, int] = {}
        self.written: dict[str, int] = {}
        # Of what was allocated and not filled: which bytes were written, and the tensor, that its memory stays its own.
        self._allocated: dict[int, tuple[np.ndarray, Tensor]] = {}
        self._kernel = ""
        self._arguments: list[_Argument] = []
        # Of a program, between two barriers.
        self._epoch = 0
        self._program = NOBODY

    @property
    def requested(self) -> int:
        """All bytes that were asked for."""
        return sum(self.read.values()) + sum(self.written.values())

    def allocate(self, original: Callable[..., Tensor], *args: Any, **keywords: Any) -> Tensor:
        tensor = original(*args, **keywords)
        storage = tensor.untyped_storage()
        if tensor.device.type == "cpu" and storage.nbytes():
            self._allocated[storage.data_ptr()] = np.zeros(storage.nbytes(), bool), tensor
        return tensor

    def launch(self, original: Callable[..., None], kernel: InterpretedFunction, *args: Any, **keywords: Any) -> None:
        """Run a launch on copies of its arguments, and copy back what it wrote."""
        self._kernel, self._program = kernel.__name__, NOBODY
        self.read.setdefault(self._kernel, 0)
        self.written.setdefault(self._kernel, 0)
        tensors = {id(tensor): tensor for tensor in _tensors((args, keywords)) if tensor.numel()}
        self._arguments = [_Argument(group, self._written_of(group[0])) for group in _overlapping(tensors.values())]
        self._arguments.sort(key=lambda argument: argument.start)
        moved = {id(own): place for argument in self._arguments for own, place in argument.moved}
        original(kernel, *_replaced(args, moved), **_replaced(keywords, moved))
        for argument in self._arguments:
            argument.copy_back()
        self._arguments = []

    def _written_of(self, tensor: Tensor) -> np.ndarray | None:
        """Return which bytes of a storage were written, from a tensor's first on; None: all."""
        storage = tensor.untyped_storage().data_ptr()
        if storage not in self._allocated:
            return None
        return self._allocated[storage][0][tensor.data_ptr() - storage :]

    def barrier(self, original: Callable[..., Any], *args: Any) -> Any:
        self._epoch += 1
        return original(*args)

    def load(self, original: Callable[..., Any], builder: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        self._access(pointers, mask, _Argument.read, self.read)
        return original(builder, pointers, mask, *rest)

    def store(
        self, original: Callable[..., Any], builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any
    ) -> Any:
        self._access(pointers, mask, _Argument.write, self.written)
        return original(builder, pointers, value, mask, *rest)

    def _access(self, pointers: Any, mask: Any, of_argument: Any, counted: dict[str, int]) -> None:
        size = np.dtype(interpreter._get_np_dtype(pointers.get_element_ty())).itemsize
        addresses = np.asarray(pointers.data).astype(np.int64)
        addresses = addresses[np.broadcast_to(np.asarray(mask.data, bool), addresses.shape)]
        counted[self._kernel] += addresses.size * size
        (x, y, z), (_, height, depth) = (
            interpreter.interpreter_builder.grid_idx,
            interpreter.interpreter_builder.grid_dim,
        )
        program = (x * height + y) * depth + z
        if program != self._program:
            self._program = program
            self._epoch += 1
        while addresses.size:
            after = bisect.bisect_right(self._arguments, addresses[0], key=lambda argument: argument.start)
            argument = self._arguments[max(0, after - 1)]
            inside = (addresses >= argument.start) & (addresses + size <= argument.start + len(argument.valid))
            if not inside[0]:
                self._note("is out of bounds")
                return
            places = (addresses[inside, None] - argument.start + np.arange(size)).ravel()
            addresses = addresses[~inside]
            if not argument.valid[places].all():
                self._note("is out of bounds")
                continue
            for fault in of_argument(argument, places, program, self._epoch):
                self._note(fault)

    def _note(self, fault: str) -> None:
        self.faults[f"{self._kernel} {fault}"] = None


class _Argument:
    """Tensors that overlap, in a place of their own, and what became of their bytes."""

    def __init__(self, tensors: list[Tensor], written: np.ndarray | None) -> None:
        first = tensors[0].data_ptr()
        n_bytes = max(tensor.data_ptr() + _span(tensor) for tensor in tensors) - first
        self._original = np.ctypeslib.as_array((ctypes.c_uint8 * n_bytes).from_address(first))
        room = torch.zeros(_ROOM + n_bytes + _ROOM, dtype=torch.uint8)
        self._copy = room[_ROOM : _ROOM + n_bytes].numpy()
        self._copy[:] = self._original
        self.start = room.data_ptr() + _ROOM
        self.valid = np.zeros(n_bytes, bool)
        self.moved: list[tuple[Tensor, Tensor]] = []
        for tensor in tensors:
            offset = tensor.data_ptr() - first
            storage_offset = (_ROOM + offset) // tensor.element_size()
            place = torch.zeros(0, dtype=tensor.dtype)
            place.set_(room.untyped_storage(), storage_offset, tensor.shape, tensor.stride())
            self.moved.append((tensor, place))
            elements = np.zeros(1, np.int64)
            for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
                elements = np.add.outer(elements, np.arange(length if stride else 1) * stride * tensor.element_size())
            self.valid[offset + elements.reshape(-1, 1) + np.arange(tensor.element_size())] = True
        self._written = np.ones(n_bytes, bool) if written is None else written[:n_bytes]
        self._writer, self._reader = (np.full(n_bytes, NOBODY, np.int32) for _ in range(2))
        self._written_at = np.zeros(n_bytes, np.int32)

    def read(self, places: np.ndarray, program: int, epoch: int) -> Iterator[str]:
        writers = self._writer[places]
        if not self._written[places].all():
            yield "reads what nobody wrote"
        if ((writers != NOBODY) & (writers != program)).any():
            yield "reads in one program what another writes"
        if ((writers == program) & (self._written_at[places] == epoch)).any():
            yield "reads what it wrote without a barrier between"
        readers = self._reader[places]
        self._reader[places] = np.where((readers == NOBODY) | (readers == program), program, SEVERAL)

    def write(self, places: np.ndarray, program: int, epoch: int) -> Iterator[str]:
        writers, readers = self._writer[places], self._reader[places]
        if ((writers != NOBODY) & (writers != program)).any():
            yield "writes in two programs to one place"
        if ((readers != NOBODY) & (readers != program)).any():
            yield "reads in one program what another writes"
        self._writer[places], self._written_at[places], self._written[places] = program, epoch, True

    def copy_back(self) -> None:
        changed = self._writer != NOBODY
        self._original[changed] = self._copy[changed]


def _span(tensor: Tensor) -> int:
    """Return the bytes from a tensor's first element to its last."""
    last = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _overlapping(tensors: Any) -> Iterator[list[Tensor]]:
    """Yield groups of tensors that share memory."""
    group: list[Tensor] = []
    end = 0
    for tensor in sorted(tensors, key=Tensor.data_ptr):
        if group and tensor.data_ptr() >= end:
            yield group
            group = []
        group.append(tensor)
        end = max(end if len(group) > 1 else 0, tensor.data_ptr() + _span(tensor))
    if group:
        yield group


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


def _replaced(value: Any, by: dict[int, Tensor]) -> Any:
    if isinstance(value, Tensor):
        return by.get(id(value), value)
    if isinstance(value, dict):
        return {name: _replaced(item, by) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return tuple(_replaced(item, by) for item in value)
    return value


@contextmanager
def shadow() -> Iterator[Watch]:
    """Watch what the interpreter runs."""
    watch = Watch()

    def stand_in(place: Any, name: str, watcher: Callable[..., Any]) -> None:
        original = getattr(place, name)
        stack.enter_context(mock.patch.object(place, name, lambda *a, **k: watcher(original, *a, **k)))

    with ExitStack() as stack:
        stand_in(InterpretedFunction, "run", watch.launch)
        stand_in(InterpreterBuilder, "create_masked_load", watch.load)
        stand_in(InterpreterBuilder, "create_masked_store", watch.store)
        stand_in(InterpreterBuilder, "create_barrier", watch.barrier)
        for place, *names in _ALLOCATIONS:
            for name in names:
                stand_in(place, name, watch.allocate)
        yield watch
