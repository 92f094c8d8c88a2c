"""Outputs of an image encoder on disk: one file per image, written whole or not at all, never taken for another's."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import TreeSpec, treespec_dumps, treespec_loads

from renyi_kd.sam.module_paths import plain
from renyi_kd.teachers.checked_tensors import DTYPES, CheckedTensors, DamagedError, memory, packed
from renyi_kd.teachers.whole_files import remove_abandoned, write_whole

_FORMAT = "renyi_kd encoder output 2"
_WITHOUT_CHECKSUM = "renyi_kd encoder output 1"
# A thumbnail tells images, flips and crops apart, also where most of an image is empty.
_THUMBNAIL = 16


class Entry(NamedTuple):
    """What an encoder returned for one image.

    Attributes:
        leaves: its tensors, without the dimension of the batch.
        structure: how they were arranged.
        probe: a thumbnail of the image it was computed from.

    """

    leaves: list[Tensor]
    structure: TreeSpec
    probe: Tensor


class EncoderCache:
    """A folder of encoder outputs, each bound to an id, the encoder's weights, the preprocessing and the image's size.

    Args:
        folder: made if it is not there.
        preprocessing: anything that tells ways to prepare an image apart.
        dtype: in which floating-point tensors are kept: fp16 or bf16.

    Raises:
        TypeError: ``dtype`` is another.
        OSError: the folder cannot be made.

    """

    def __init__(self, folder: Path, *, preprocessing: str, dtype: torch.dtype) -> None:
        if dtype not in (torch.float16, torch.bfloat16):
            raise TypeError(
                f"CachedTeacher: dtype must be torch.float16 or torch.bfloat16, got {dtype}; "
                "fp16 has the more digits, bf16 the larger range"
            )
        self.folder = folder
        self.preprocessing = preprocessing
        self.dtype = dtype
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(
                error.errno,
                f"CachedTeacher: folder must be one that is there or can be made, got {error.strerror!r} for {folder}; "
                "choose another, or look at its permissions",
            ) from error
        remove_abandoned(folder)

    def read(self, sample: str, weights: str, size: tuple[int, ...]) -> Entry | None:
        """Return the entry of a sample, or None if it has none.

        Raises:
            ValueError: the file is no encoder output, or one of another sample, encoder, preprocessing or size.
            OSError: it cannot be read.

        Warns:
            UserWarning: the file is damaged, or of an earlier version, and counts as absent.

        """
        path = self._path(sample)
        identity = self._identity(sample, weights, size)
        try:
            file = CheckedTensors(path)
            if file.metadata.get("format") == _WITHOUT_CHECKSUM:
                self._check(path, file.metadata, {**identity, "format": _WITHOUT_CHECKSUM})
                warnings.warn(
                    f"CachedTeacher: {path} must have a checksum, got a file of an earlier version, without; it is "
                    "written again",
                    stacklevel=2,
                )
                return None
            # First whether it is a file of this cache, then whether it is whole, and then whose it is. What is damaged
            # may be the name of the format.
            if file.metadata.get("format") == _FORMAT or file.metadata.keys() >= {"checksum", "structure"}:
                file.check()
            self._check(path, file.metadata, {"format": _FORMAT})
            tensors = file.tensors()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise OSError(
                error.errno,
                f"CachedTeacher: {path} must be a file that can be read, got {error.strerror!r}; delete it, or look at "
                "its permissions",
            ) from error
        except DamagedError as error:
            warnings.warn(
                f"CachedTeacher: {path} must be a whole file, got a damaged one ({error}); it is written again",
                stacklevel=2,
            )
            return None
        self._check(path, file.metadata, identity)
        leaves = [tensors[str(number)] for number in range(len(tensors) - 1)]
        return Entry(leaves, treespec_loads(file.metadata["structure"]), tensors["probe"])

    def entry(self, sample: str, leaves: list[Tensor], structure: TreeSpec, probe: Tensor) -> Entry:
        """Return the entry of a sample as it will be read.

        Raises:
            ValueError: a value does not fit into the dtype of the cache.
            TypeError: a tensor is complex, or the structure cannot be written.

        """
        if not _can_be_written(structure):
            raise TypeError(
                "CachedTeacher: the encoder's output must be of tensors, tuples, lists and dicts, got "
                f"{' '.join(str(structure).split())}; name a module that returns such an output: encoder='path'"
            )
        return Entry([self._rounded(sample, leaf) for leaf in leaves], structure, probe)

    def write(self, sample: str, weights: str, size: tuple[int, ...], entry: Entry) -> None:
        """Write the entry of a sample in place of what was there.

        Raises:
            OSError: the folder does not take it; what was there stays.

        """
        kept = {str(number): leaf for number, leaf in enumerate(entry.leaves)}
        metadata = {**self._identity(sample, weights, size), "structure": treespec_dumps(entry.structure)}
        path, parts = self._path(sample), packed({**kept, "probe": entry.probe.contiguous()}, metadata)
        try:
            write_whole(path, parts)
        except OSError as error:
            raise OSError(
                error.errno,
                f"CachedTeacher: {path} must be a file that can be written, got {error.strerror!r} for "
                f"{sum(map(len, parts))} bytes; make room, allow writing there or choose another folder. What is "
                "cached already stays",
            ) from error

    def _path(self, sample: str) -> Path:
        # Readable, and unlike for ids that differ in what a file name cannot hold. Its bytes are what is limited.
        readable = re.sub(r"[^\w.-]", "_", sample)[:64].encode()[:192].decode(errors="ignore")
        # Names of files that are not of UTF-8 hold surrogates.
        digest = hashlib.blake2b(sample.encode(errors="surrogatepass"), digest_size=6).hexdigest()
        return self.folder / f"{readable}-{digest}.safetensors"

    def _identity(self, sample: str, weights: str, size: tuple[int, ...]) -> dict[str, str]:
        return {
            "format": _FORMAT,
            "sample": sample,
            "encoder weights": weights,
            "preprocessing": self.preprocessing,
            "image size": str(size),
            "dtype": str(self.dtype),
        }

    def _check(self, path: Path, found: dict[str, str], wanted: dict[str, str]) -> None:
        for name, value in wanted.items():
            if found.get(name) != value:
                raise ValueError(
                    f"CachedTeacher: the {name} of {path} must be {value!r}, got {found.get(name)!r}; "
                    "give each teacher, preprocessing and image size a folder of its own, or delete this file"
                )

    def _rounded(self, sample: str, leaf: Tensor) -> Tensor:
        # A copy in any case: a row would keep its whole batch, and files take no tensors that share memory.
        if not leaf.is_floating_point():
            if leaf.dtype not in DTYPES.values():
                raise TypeError(
                    f"CachedTeacher: the encoder's output must hold floats, integers or booleans, got {leaf.dtype}; "
                    "name a module that returns such tensors: encoder='path'"
                )
            return leaf.to("cpu", copy=True).contiguous()
        rounded = leaf.to("cpu", self.dtype, copy=True).contiguous()
        if not rounded.isfinite().all():
            raise ValueError(
                f"CachedTeacher: the encoder's output must be finite in {self.dtype}, got values up to "
                f"{leaf.abs().max():.3g} for sample {sample!r}; use dtype=torch.bfloat16 if it overflows, and look for "
                "NaN in the image if not"
            )
        return rounded


def _can_be_written(structure: TreeSpec) -> bool:
    """Return whether a structure is read as it was written: a namedtuple is not, nor are a dict's keys of tuples."""
    try:
        return treespec_loads(treespec_dumps(structure)) == structure
    except (NotImplementedError, TypeError, ValueError):
        return False


def probe(images: Tensor) -> Tensor:
    """Return a thumbnail of every image, ``[b, ...]`` in fp32 on the CPU; waits for the device."""
    values = images.detach()
    with torch.autocast(values.device.type, enabled=False):
        if values.ndim == 4:
            values = F.adaptive_avg_pool2d(values.float(), _THUMBNAIL)
        return values.float().cpu()


def show_other_images(cached: Tensor, seen: Tensor) -> bool:
    """Return whether two probes are of different images, beyond the rounding of another device or dtype."""
    if cached.shape != seen.shape:
        return True
    # What is not finite is like its own kind alone, and makes no other difference small.
    largest = seen.nan_to_num(0, 0, 0).abs().max().clamp_min(1e-3)
    return not torch.allclose(cached, seen, rtol=0, atol=0.005 * largest.item(), equal_nan=True)


def some_numbers(tensors: Sequence[Tensor]) -> bytes:
    """Return up to 64 numbers of each tensor, spread over it; waits for the device."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        values, left = getattr(tensor, "_local_tensor", tensor).detach(), 64
        spread = []
        # Dimension by dimension: to flatten what is not contiguous, as under channels_last, would copy all of it.
        for size in values.shape:
            step = max(1, -(-size // left))
            spread.append(slice(None, None, step))
            left //= max(1, -(-size // step))
        by_device.setdefault(values.device, []).append(values[tuple(spread)].reshape(-1).float())
    return b"".join(bytes(memory(torch.cat(each).cpu())) for each in by_device.values())


def fingerprint(module: nn.Module, adapters: str = "") -> str:
    """Return a digest of all weights and buffers that a module saves, with their names, shapes and dtypes.

    Args:
        module: the image encoder.
        adapters: which of its adapters are on; empty where it has none.

    Raises:
        TypeError: a weight is of a subclass of tensors whose numbers cannot be read.

    """
    digest = hashlib.blake2b(adapters.encode(), digest_size=16)
    for name, value in module.state_dict().items():
        # The shards of FSDP; every process gets here, and gets the whole.
        whole = value.full_tensor() if hasattr(value, "full_tensor") else value
        if type(whole) not in (Tensor, nn.Parameter):
            raise TypeError(
                f"CachedTeacher: the encoder's weights must be plain tensors, got {type(whole).__name__} at {name!r}; "
                "use the tap itself as teacher"
            )
        digest.update(f"{plain(name)} {tuple(whole.shape)} {whole.dtype}".encode())
        digest.update(memory(whole.detach().cpu().contiguous()))
    return digest.hexdigest()


def image_part(leaf: Any, row: int, n_images: int) -> Tensor:
    """Return the part of an encoder's output that belongs to one image.

    Raises:
        ValueError: the output has no row for every image.

    """
    if not isinstance(leaf, Tensor) or leaf.ndim == 0 or len(leaf) != n_images:
        fact = tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__
        raise ValueError(
            f"CachedTeacher: the encoder's output must hold tensors with one row per image, got {fact} for {n_images} "
            "images; name a module that returns such tensors: encoder='path'"
        )
    return leaf[row]
