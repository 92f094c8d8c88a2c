"""Launches of kernels: at once, or noted as a plan that repeats them at little cost on the host.

    run(function, tensors, numbers, *settings)

returns what ``function(tensors, numbers, *settings)`` does: a list of tensors that it made, or None; tensors in a list
of their own are returned as one, which ``unpacked`` takes apart in the function of the backward. It allocates, makes
views, and launches kernels through :func:`launcher`; nothing that it does may depend on values or addresses, and
:func:`device_of` says where it will run. For tensors of new layouts it is called once, on stand-ins without memory, and
what it launches is noted: which kernel, over which grid, on which part of which memory. Every run then allocates what
it returns, and all the rest as one workspace, and launches. Operations of PyTorch between the launches are repeated
too; each costs what it costs anywhere.

A plan holds no tensors, reads no values and waits for nothing. It launches on the stream that is current at the run. It
holds for one device, for sizes, strides and dtypes, and for which tensors begin at a multiple of 16 bytes: for what
Triton compiles for. Numbers that change from step to step are given to each run: in ``function`` they are placeholders,
which can only go to a kernel.

The first run of a plan, and every one that a hook of Triton listens to, launches through Triton, which compiles what is
new. All others run the compiled kernels. In Triton's interpreter there are none, and all runs are as the first.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from renyi_kd.ops.plan import Allocation, Launch, Number, Operation, Place, Plan, mapped

Function = Callable[..., "list[Tensor | list[Tensor] | None]"]
# Size, stride, dtype, and whether it begins at a multiple of 16 bytes.
Layout = tuple[torch.Size, tuple[int, ...], torch.dtype, bool]

# That are kept, those used last; one takes some ten kilobytes.
MAX_PLANS = 256
# Of tensors in one memory, in bytes: a multiple of what Triton looks at, and of every cache line.
_ALIGNMENT = 256
# They fill nothing, so there is nothing to repeat.
_ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
_META = torch.device("meta")
_thread = threading.local()


def launcher(kernel: Any, grid: tuple[int, ...]) -> Callable[..., Any]:
    """Return ``kernel[grid]`` or, while a plan is made, what notes the launch."""
    recorder: _Recorder | None = getattr(_thread, "recorder", None)
    return kernel[grid] if recorder is None else partial(recorder.note_launch, kernel, grid)


def device_of(tensor: Tensor) -> torch.device:
    """Return the device of a tensor or, while a plan is made, the one that the plan is for."""
    recorder: _Recorder | None = getattr(_thread, "recorder", None)
    return tensor.device if recorder is None else recorder.device


def run(
    function: Function, tensors: Sequence[Tensor | None], numbers: Sequence[float], *settings: Any
) -> list[Tensor | None]:
    """Return what ``function(tensors, numbers, *settings)`` does, by the plan of these layouts and settings.

    The first tensor is there, and all are on its device. Settings are hashable.
    """
    layouts = tuple([None if x is None else (x.shape, x.stride(), x.dtype, x.data_ptr() % 16 == 0) for x in tensors])
    assert tensors[0] is not None
    return plan(function, layouts, tensors[0].device, len(numbers), settings)(tensors, numbers)


@lru_cache(MAX_PLANS)
def plan(
    function: Function,
    layouts: tuple[Layout | None, ...],
    device: torch.device,
    n_numbers: int,
    settings: tuple[Any, ...],
) -> Plan:
    """Return the plan of a function for tensors of these layouts."""
    # Each has a storage of its own, whatever the real ones share.
    stand_ins = [None if x is None else torch.empty_strided(x[0], x[1], dtype=x[2], device=_META) for x in layouts]
    recorder = _Recorder([x for x in stand_ins if x is not None], device)
    with recorder:
        outputs = function(stand_ins, [Number(index) for index in range(n_numbers)], *settings)
    return recorder.plan(n_numbers, mapped(lambda x: None if x is None else recorder.place(x), outputs))


def empty_packed(tensors: Sequence[Tensor]) -> Tensor:
    """Return room for tensors like these, packed."""
    return tensors[0].new_empty(sum(_aligned(x.numel() * x.element_size()) for x in tensors), dtype=torch.uint8)


def unpacked(packed: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return what a run packed, as views; it was like ``tensors``."""
    views, start = [], 0
    for x in tensors:
        n_bytes = x.numel() * x.element_size()
        views.append(packed[start : start + n_bytes].view(x.dtype).view(x.shape))
        start += _aligned(n_bytes)
    return views


def _aligned(n_bytes: int) -> int:
    return -(-n_bytes // _ALIGNMENT) * _ALIGNMENT


class _Recorder(TorchDispatchMode):
    """Notes what is done to stand-ins, and which memory that takes."""

    def __init__(self, inputs: list[Tensor], device: torch.device) -> None:
        super().__init__()
        self.inputs, self.device = inputs, device
        self.steps: list[Launch | Operation] = []
        # By their addresses, and alive, so that none is given the address of another.
        self.storages: dict[int, torch.UntypedStorage] = {}
        for tensor in inputs:
            self.place(tensor)

    def __enter__(self) -> _Recorder:
        _thread.recorder = self
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        _thread.recorder = None

    def place(self, tensor: Tensor) -> Place:
        """Return the place of a stand-in, in a memory of its own if it is new."""
        storage = tensor.untyped_storage()
        self.storages.setdefault(storage._cdata, storage)
        memory = list(self.storages).index(storage._cdata)
        offset = int(tensor.storage_offset()) * tensor.element_size()
        return Place(memory, offset, tuple(tensor.shape), tensor.stride(), tensor.dtype)

    def noted(self, value: Any) -> Any:
        """Return what stands for an argument in a plan."""
        if isinstance(value, Tensor):
            return self.place(value)
        return self.device if isinstance(value, torch.device) and value == _META else value

    def note_launch(self, kernel: Any, grid: tuple[int, ...], *args: Any, **keywords: Any) -> None:
        """Note what ``kernel[grid](*args, **keywords)`` would launch."""
        named = {**dict(zip(kernel.arg_names, args, strict=False)), **keywords}
        arguments = [self.noted(named.pop(name)) for name in kernel.arg_names]
        self.steps.append(Launch(kernel, grid, arguments, named))

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note an operation, unless it allocates or makes views."""
        arguments = [list(args), kwargs or {}]
        known = set(self.storages)
        mapped(lambda x: known.add(x.untyped_storage()._cdata) if isinstance(x, Tensor) else None, arguments)
        result = function(*args, **(kwargs or {}))
        results = [result] if isinstance(result, Tensor) else list(result)
        new = [index for index, x in enumerate(results) if x.untyped_storage()._cdata not in known]
        allocates = function._schema.name.removeprefix("aten::") in _ALLOCATIONS
        if function._schema.is_mutable or (new and not allocates):
            noted = mapped(self.noted, arguments)
            self.steps.append(Operation(function, noted, [(index, self.place(results[index]).memory) for index in new]))
        return result

    def plan(self, n_numbers: int, outputs: list[Place | list[Place] | None]) -> Plan:
        """Return the plan, its memory in the order of a run: inputs, outputs, workspace, what operations made."""
        sizes = [storage.nbytes() for storage in self.storages.values()]
        operations = [step for step in self.steps if isinstance(step, Operation)]
        made = [memory for step in operations for _, memory in step.made]
        # Where each memory of the recording is in a run: in which of its memories, and from which byte on.
        spots = {memory: (memory, 0) for memory in range(len(self.inputs))}
        allocations: list[Allocation] = []

        def lay_out(memories: Iterable[int], index: int) -> int:
            """Let these memories be one, and return its size."""
            n_bytes = 0
            for memory in memories:
                spots[memory] = index, n_bytes
                n_bytes += _aligned(sizes[memory])
            return n_bytes

        for output in outputs:
            index = len(self.inputs) + len(allocations)
            if isinstance(output, list):
                assert not {place.memory for place in output} & {*spots, *made}, "what is packed must be allocated"
                n_bytes = lay_out([place.memory for place in output], index)
                allocations.append(Allocation((n_bytes,), (1,), torch.uint8))
            elif output is not None and output.memory not in {*spots, *made}:
                spots[output.memory] = index, 0
                allocations.append(_allocation(output, sizes[output.memory]))
        index = len(self.inputs) + len(allocations)
        n_bytes = lay_out([memory for memory in range(len(sizes)) if memory not in {*spots, *made}], index)
        spots |= {memory: (index + 1 + offset, 0) for offset, memory in enumerate(made)}

        def moved(value: Any) -> Any:
            if not isinstance(value, Place):
                return value
            memory, start = spots[value.memory]
            return value._replace(memory=memory, offset=start + value.offset)

        def returned(output: Place | list[Place] | None) -> Place | int | None:
            if isinstance(output, list):
                return spots[output[0].memory][0]
            if output is None:
                return None
            place: Place = moved(output)
            allocation = allocations[place.memory - len(self.inputs)] if output.memory not in made else None
            return place.memory if allocation == place[2:] and place.offset == 0 else place

        for step in self.steps:
            step.arguments = mapped(moved, step.arguments)
        for step in operations:
            step.made = [(index, spots[memory][0]) for index, memory in step.made]
        return Plan(self.steps, n_numbers, allocations, len(made), n_bytes, [returned(output) for output in outputs])


def _allocation(place: Place, n_bytes: int) -> Allocation:
    """Return the memory of an output: it alone, or elements side by side where it is a part."""
    n_elements = n_bytes // place.dtype.itemsize
    if n_elements == torch.Size(place.size).numel():
        return Allocation(place.size, place.stride, place.dtype)
    return Allocation((n_elements,), (1,), place.dtype)
