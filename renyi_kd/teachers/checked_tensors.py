"""Tensors in the safetensors format, with a checksum of all that the file holds in its metadata."""

from __future__ import annotations

import json
import math
import mmap
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# What an encoder's output can come to: its floats are kept in 16 bits, its thumbnail in fp32.
_DTYPES = {
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
    "C64": torch.complex64,
}
_LENGTH = 8


class DamagedError(Exception):
    """A file that is not as it was written."""


class CheckedTensors:
    """An open file. Its metadata can be read at once, its tensors if the checksum fits.

    It is opened once, and by its descriptor: safetensors opens a file twice, by its name, and would take the header of
    one and the numbers of another where a process replaces it in between.

    Args:
        path: of the file.

    Raises:
        OSError: it cannot be opened.
        DamagedError: it has no header of safetensors.

    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            try:
                # Pages are read when they are needed, into memory that is this process's own.
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            except ValueError:
                raise DamagedError("it is empty") from None
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

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by their names, in memory that the file backs.

        Raises:
            DamagedError: a number, name, shape or dtype, or the metadata, is not as it was written.

        """
        with memoryview(self._data) as data, data[self._start :] as numbers:
            if self.metadata.get("checksum") != _checksum(self._header, numbers):
                raise DamagedError("its checksum does not fit")
        return {name: self._tensor(layout) for name, layout in self._header.items() if name != "__metadata__"}

    def _tensor(self, layout: dict[str, Any]) -> Tensor:
        dtype, shape = _DTYPES[layout["dtype"]], layout["shape"]
        count = math.prod(shape)
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        offset = self._start + layout["data_offsets"][0]
        return torch.frombuffer(self._data, dtype=dtype, count=count, offset=offset).reshape(shape)


def packed(tensors: dict[str, Tensor], metadata: dict[str, str]) -> Sequence[bytes | memoryview]:
    """Return what a file of such tensors holds, in parts; in memory this takes as much again as the tensors."""
    from safetensors.torch import save

    laid_out = memoryview(save(tensors, metadata))
    start = _LENGTH + int.from_bytes(laid_out[:_LENGTH], "little")
    header, numbers = json.loads(bytes(laid_out[_LENGTH:start])), laid_out[start:]
    header["__metadata__"]["checksum"] = _checksum(header, numbers)
    text = json.dumps(header, sort_keys=True).encode()
    # Tensors begin at a multiple of eight bytes.
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(_LENGTH, "little"), text, numbers]


def _checksum(header: dict[str, Any], numbers: memoryview) -> str:
    """Return the CRC-32 of all but itself.

    Up to 512 MiB it finds every one or two flipped bits, and every run of up to 32; of any other damage it misses one
    in four billion. That suffices against faults of disks and networks. Against intent no checksum would help: whoever
    can write the file can compute it anew. A cryptographic digest takes several times as long.
    """
    metadata = {name: value for name, value in header.get("__metadata__", {}).items() if name != "checksum"}
    text = json.dumps({**header, "__metadata__": metadata}, sort_keys=True)
    return f"{zlib.crc32(numbers, zlib.crc32(text.encode())):08x}"
