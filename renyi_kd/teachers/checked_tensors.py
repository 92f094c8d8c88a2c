"""Tensors in the safetensors format, with a checksum of all that the file holds in its metadata."""

from __future__ import annotations

import ctypes
import json
import math
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

# What an encoder's output can come to: its floats are kept in 16 bits, its thumbnail in fp32.
DTYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}
_LENGTH = 8

Memory: TypeAlias = "bytes | ctypes.Array[ctypes.c_char]"


class DamagedError(Exception):
    """A file that is not as it was written."""


class CheckedTensors:
    """What a file held when it was read: its metadata, and its tensors, which are to be taken where the checksum fits.

    It is opened once, and by its descriptor: safetensors opens a file twice, by its name, and would take the header of
    one and the numbers of another where a process replaces it in between. And it is read once, into memory of its own:
    of a file in mapped memory, what somebody writes into it later would change numbers after their checksum was
    found right, and what is cut off would kill the process.

    Args:
        path: of the file.

    Raises:
        OSError: it cannot be read.
        DamagedError: it has no header of safetensors, or was cut off meanwhile.

    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            # Writable, as tensors want their memory.
            self._data = bytearray(os.fstat(file.fileno()).st_size)
            if file.readinto(self._data) < len(self._data):
                raise DamagedError("it became shorter while it was read")
        if not self._data:
            raise DamagedError("it is empty")
        self._start = _LENGTH + int.from_bytes(self._data[:_LENGTH], "little")
        try:
            self._header: dict[str, Any] = json.loads(self._data[_LENGTH : self._start])
            self.metadata: dict[str, str] = {**self._header.get("__metadata__", {})}
            layouts = [layout.keys() for name, layout in self._header.items() if name != "__metadata__"]
            # Otherwise a flipped bit in "__metadata__" would make this a file of another program.
            if any(keys != {"dtype", "shape", "data_offsets"} for keys in layouts):
                raise ValueError
        except (ValueError, AttributeError, TypeError, RecursionError):
            raise DamagedError("its header cannot be read") from None

    def check(self) -> None:
        """Compare the checksum.

        Raises:
            DamagedError: a number, name, shape or dtype, or the metadata, is not as it was written.

        """
        with memoryview(self._data) as data, data[self._start :] as numbers:
            if self.metadata.get("checksum") != _checksum(self._header, [numbers]):
                raise DamagedError("its checksum does not fit")

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of a file whose checksum fits by their names, in the memory that it was read into."""
        return {name: self._tensor(layout) for name, layout in self._header.items() if name != "__metadata__"}

    def _tensor(self, layout: dict[str, Any]) -> Tensor:
        dtype, shape = DTYPES[layout["dtype"]], layout["shape"]
        count = math.prod(shape)
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        offset = self._start + layout["data_offsets"][0]
        return torch.frombuffer(self._data, dtype=dtype, count=count, offset=offset).reshape(shape)


def packed(tensors: dict[str, Tensor], metadata: dict[str, str]) -> list[Memory]:
    """Return what a file of such tensors holds, in parts: first its header, then their own memory.

    Args:
        tensors: contiguous, on the CPU, of ``DTYPES``.
        metadata: of the file, without a checksum.

    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    # Every tensor begins at a multiple of the size of its numbers, as safetensors lays them out.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.nbytes
        layout = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        header[name] = layout
    numbers = [memory(tensor) for _, tensor in ordered]
    header["__metadata__"] = {**metadata, "checksum": _checksum(header, numbers)}
    text = json.dumps(header, sort_keys=True).encode()
    text += b" " * (-len(text) % _LENGTH)
    return [len(text).to_bytes(_LENGTH, "little") + text, *numbers]


def memory(tensor: Tensor) -> Memory:
    """Return the bytes of a contiguous tensor on the CPU, which are not copied."""
    if tensor.nbytes == 0:
        return b""
    found = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    # As long as its bytes are in use.
    found.owner = tensor  # type: ignore[attr-defined]
    return found


def _checksum(header: dict[str, Any], numbers: Sequence[Memory | memoryview]) -> str:
    """Return the CRC-32 of all but itself.

    Up to 512 MiB it finds every one or two flipped bits, and every run of up to 32; of any other damage it misses one
    in four billion. That suffices against faults of disks and networks. Against intent no checksum would help: whoever
    can write the file can compute it anew. A cryptographic digest takes several times as long.
    """
    metadata = {name: value for name, value in header.get("__metadata__", {}).items() if name != "checksum"}
    checksum = zlib.crc32(json.dumps({**header, "__metadata__": metadata}, sort_keys=True).encode())
    for part in numbers:
        checksum = zlib.crc32(part, checksum)
    return f"{checksum:08x}"
