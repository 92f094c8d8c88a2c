"""One teacher's run of a model at a time: it switches modes, adapters and forwards, which all threads share."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from torch import nn

from renyi_kd.sam.run import unwrapped

# Of models inside their wrappers. Each its own: threads with a model each need not wait, and may wait for each other.
_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
# A process that is forked has a copy of what another thread held, and nobody who would let go of it.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_locks.clear)


@contextmanager
def observing(model: nn.Module) -> Iterator[None]:
    """Let no other thread observe with a model; the thread that does may do so again inside."""
    with _locks.setdefault(unwrapped(model), threading.RLock()):
        yield


def observed_elsewhere(model: nn.Module) -> bool:
    """Return whether another thread observes with a model at this moment."""
    lock = _locks.get(unwrapped(model))
    if lock is None:
        return False
    free = lock.acquire(blocking=False)
    if free:
        lock.release()
    return not free
