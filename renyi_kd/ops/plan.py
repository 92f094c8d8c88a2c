"""What a launch plan is made of, and how it runs: memory, and steps that work on parts of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime import driver


class Number:
    """Stands for a number that every run of a plan is given, so that nothing can be computed from it."""

    def __init__(self, index: int) -> None:
        self.index = index


class Place(NamedTuple):
    """A tensor of a plan: the number of its memory, the byte where it begins there, and how it lies."""

    memory: int
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def tensor(self, memory: list[Tensor]) -> Tensor:
        """Return the tensor that lies there in a run."""
        base = memory[self.memory]
        first = (base.storage_offset() * base.element_size() + self.offset) // self.dtype.itemsize
        tensor = torch.empty(0, dtype=self.dtype, device=base.device)
        return tensor.set_(base.untyped_storage(), first, self.size, self.stride)


class Allocation(NamedTuple):
    """Memory that a run allocates for what it returns."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class Launch:
    """The launch of a kernel over a grid, with all arguments in the kernel's order, and options such as num_warps."""

    def __init__(self, kernel: Any, grid: tuple[int, ...], arguments: list[Any], options: dict[str, Any]) -> None:
        self.kernel, self.grid, self.arguments, self.options = kernel, grid, arguments, options
        # What takes the arguments out of the values of a run.
        self.pick: Callable[[list[Any]], tuple[Any, ...]] = tuple
        # How what Triton compiled is run; nothing in its interpreter.
        self.compiled: tuple[Any, ...] | None = None

    def through_triton(self, memory: list[Tensor], numbers: Sequence[float]) -> None:
        """Launch as anybody does, which compiles what is new."""
        kernel = self.kernel[self.grid](*filled(self.arguments, memory, numbers), **self.options)
        if kernel is not None:
            x, y, z = (*self.grid, 1, 1)[:3]
            self.compiled = kernel.run, x, y, z, kernel.function, kernel.packed_metadata, self.pick


class Operation:
    """An operation of PyTorch between two launches.

    Attributes:
        arguments: by position and by name.
        made: of each new tensor in the result, its index there and the number of its memory.
        addresses: of each of these, the places of its addresses in the values of a run, with their offsets.

    """

    def __init__(self, function: Any, arguments: list[Any], made: list[tuple[int, int]]) -> None:
        self.function, self.arguments, self.made = function, arguments, made
        self.addresses: list[list[tuple[int, int]]] = []

    def __call__(self, memory: list[Tensor], numbers: Sequence[float], values: list[Any]) -> None:
        """Do it, and put what is new where it belongs."""
        args, keywords = filled(self.arguments, memory, numbers)
        # Autocast would change dtypes, and refuse another half precision than its own.
        with torch.autocast(memory[0].device.type, enabled=False):
            result = self.function(*args, **keywords)
        results = [result] if isinstance(result, Tensor) else result
        for (index, new), addresses in zip(self.made, self.addresses, strict=True):
            memory[new] = results[index]
            for place, offset in addresses:
                values[place] = results[index].data_ptr() + offset


class Plan:
    """What to do for tensors of some layouts.

    The memories of a run are its inputs, what it allocates for its outputs, the workspace, and what operations make,
    for which the workspace stands before.

    Args:
        steps: in their order.
        n_numbers: that a run is given.
        allocations: of the outputs.
        n_made: memories that operations make.
        n_bytes: of the workspace.
        outputs: their memories, or their places in these; None for one that is not there.

    """

    def __init__(
        self,
        steps: list[Launch | Operation],
        n_numbers: int,
        allocations: list[Allocation],
        n_made: int,
        n_bytes: int,
        outputs: list[Place | int | None],
    ) -> None:
        self.steps, self.allocations, self.n_made, self.n_bytes = steps, allocations, n_made, n_bytes
        self.outputs = outputs
        self.launches = [step for step in steps if isinstance(step, Launch)]
        self.is_compiled = False
        arguments = [value for step in self.launches for value in step.arguments]
        self.addresses = list(dict.fromkeys((x.memory, x.offset) for x in arguments if isinstance(x, Place)))
        self.constants: list[Any] = []
        places = {address: n_numbers + index for index, address in enumerate(self.addresses)}

        def place(value: Any) -> int:
            """Return where a run has the value of an argument."""
            if isinstance(value, Number):
                return value.index
            if isinstance(value, Place):
                return places[value.memory, value.offset]
            self.constants.append(value)
            return n_numbers + len(places) + len(self.constants) - 1

        for step in steps:
            if isinstance(step, Launch):
                step.pick = itemgetter(*map(place, step.arguments))
            else:
                step.addresses = [
                    [(place, offset) for (memory, offset), place in places.items() if memory == new]
                    for _, new in step.made
                ]

    def __call__(self, tensors: Sequence[Tensor | None], numbers: Sequence[float]) -> list[Tensor | None]:
        """Run it for tensors of its layouts and return what it makes of them."""
        memory = [x for x in tensors if x is not None]
        device = memory[0].device
        memory += [
            torch.empty_strided(size, stride, dtype=dtype, device=device) for size, stride, dtype in self.allocations
        ]
        memory += [torch.empty(self.n_bytes, dtype=torch.uint8, device=device)] * (1 + self.n_made)
        starts = [x.data_ptr() for x in memory]
        values = [*numbers, *[starts[index] + offset for index, offset in self.addresses], *self.constants]
        with torch.cuda.device_of(memory[0]):
            if self.is_compiled and not _is_observed():
                gpu = driver.active
                stream = gpu.get_current_stream(gpu.get_current_device())
                for step in self.steps:
                    if isinstance(step, Launch):
                        run, x, y, z, function, metadata, pick = step.compiled  # type: ignore[misc]
                        run(x, y, z, stream, function, metadata, None, None, None, *pick(values))
                    else:
                        step(memory, numbers, values)
            else:
                for step in self.steps:
                    if isinstance(step, Launch):
                        step.through_triton(memory, numbers)
                    else:
                        step(memory, numbers, values)
                self.is_compiled = any(self.launches) and all(step.compiled for step in self.launches)
        # As a rule an output is all of a memory.
        return [x if x is None else memory[x] if isinstance(x, int) else x.tensor(memory) for x in self.outputs]


def mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """Return lists, tuples and dictionaries with ``function`` of everything else in them."""
    if type(value) in (list, tuple):
        return type(value)([mapped(function, item) for item in value])
    if type(value) is dict:
        return {name: mapped(function, item) for name, item in value.items()}
    return function(value)


def filled(value: Any, memory: list[Tensor], numbers: Sequence[float]) -> Any:
    """Return arguments with the tensors and numbers of a run."""

    def fill(item: Any) -> Any:
        if isinstance(item, Place):
            return item.tensor(memory)
        return numbers[item.index] if isinstance(item, Number) else item

    return mapped(fill, value)


def _is_observed() -> bool:
    """Return whether somebody, such as a profiler, listens to the launches of Triton."""
    runtime = triton.knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(enter.calls or leave.calls)
