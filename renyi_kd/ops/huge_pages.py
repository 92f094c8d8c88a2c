"""Large tensors on the CPU in pages of 2 MiB: the first touch of 64 MiB in pages of 4 KiB takes 15 ms, in these 6."""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable

import torch
from torch import Tensor

# From here on glibc takes memory from the system for every allocation and gives it back at once (32 MiB is the upper
# end of its threshold); what is smaller comes, as a rule, from memory that was touched before.
_MIN_BYTES = 32 * 2**20


def advise_huge_pages(fresh: Tensor) -> Tensor:
    """Return ``fresh``, newly allocated and not yet written, after advice to the system to give it huge pages.

    Only advice: where the system knows none, or has them switched off, nothing happens.
    """
    if fresh.device.type != "cpu" or fresh.nbytes < _MIN_BYTES or torch.compiler.is_compiling():
        return fresh
    advise = _madvise()
    if advise is not None:
        # Whole pages inside the tensor: what shares a page with its ends is somebody else's.
        first = -(-fresh.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (fresh.data_ptr() + fresh.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        advise(first, last - first, mmap.MADV_HUGEPAGE)
    return fresh


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if sys.platform != "linux" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    madvise = getattr(ctypes.CDLL(None), "madvise", None)
    if madvise is not None:
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return madvise
