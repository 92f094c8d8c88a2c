"""What is in memory, and what an operation adds to it."""

from __future__ import annotations

import gc

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def living() -> tuple[int, int]:
    """Return how many objects there are, and the bytes of all tensors among them.

    A compiler's tensors, which other tests may have left, are not counted: they have no size.
    """
    gc.collect()
    things = gc.get_objects()
    return len(things), sum(
        thing.nbytes for thing in things if type(thing) in (Tensor, nn.Parameter) and thing.layout == torch.strided
    )


class LargestNewTensor(TorchDispatchMode):
    """Record the bytes of every storage that an operation allocated."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    @property
    def bytes(self) -> int:
        """The bytes of the largest."""
        return max(self.sizes, default=0)

    def __torch_dispatch__(self, function, _types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for t in tree_leaves(result):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in given:
                self.sizes.append(t.untyped_storage().nbytes())
        return result


class PeakBytes(TorchDispatchMode):
    """Record the most bytes that storages held at once, of those that an operation allocated under it."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self._living: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function, _types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self._living = {key: each for key, each in self._living.items() if not each[0].expired()}
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for t in tree_leaves(result):
            if isinstance(t, Tensor) and (key := t.untyped_storage()._cdata) not in given:
                self._living[key] = StorageWeakRef(t.untyped_storage()), t.untyped_storage().nbytes()
        self.bytes = max(self.bytes, sum(size for _, size in self._living.values()))
        return result
