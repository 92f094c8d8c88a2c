"""Compiled kernels for Triton's interpreter: launched with addresses alone, as on a GPU, and then interpreted."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from renyi_kd.ops import plan

# The interpreter has one place for the program that it is at.
_LOCK = threading.Lock()


@contextmanager
def compiled_kernels() -> Iterator[list[str]]:
    """Let the interpreter return what a plan then launches; yields the names of what was launched so."""
    names: list[str] = []
    interpret = InterpretedFunction.__getitem__

    def launcher(kernel: Any, grid: Any) -> Any:
        def launch(*args: Any, **options: Any) -> _Compiled:
            with _LOCK:
                interpret(kernel, grid)(*args, **options)
            return _Compiled(kernel, args, partial(interpret, kernel), options, names)

        return launch

    gpu = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: 0)
    with (
        mock.patch.object(InterpretedFunction, "__getitem__", launcher),
        mock.patch.object(plan, "driver", SimpleNamespace(active=gpu)),
    ):
        yield names


class _Compiled:
    """What stands for a compiled kernel: it knows the types of its arguments, and not where they are."""

    function = packed_metadata = None

    def __init__(self, kernel: Any, args: Any, interpret: Any, options: dict[str, Any], names: list[str]) -> None:
        self.kernel, self.interpret, self.options, self.names = kernel, interpret, options, names
        self.types = [(x.dtype, _n_bytes(x)) if isinstance(x, Tensor) else None for x in args]

    def run(self, x: int, y: int, z: int, stream: int, *values: Any) -> None:
        """Launch with addresses; before them come function, metadata and hooks."""
        args = [
            value if kind is None else _tensor_at(value, *kind)
            for value, kind in zip(values[5:], self.types, strict=True)
        ]
        self.names.append(self.kernel.__name__)
        with _LOCK:
            self.interpret((x, y, z))(*args, **self.options)


def _n_bytes(x: Tensor) -> int:
    if x.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return (last + 1) * x.element_size()


def _tensor_at(address: int, dtype: torch.dtype, n_bytes: int) -> Tensor:
    return torch.frombuffer((ctypes.c_byte * n_bytes).from_address(address), dtype=dtype)
