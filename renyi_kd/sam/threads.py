"""One teacher's run of a model at a time: it switches modes, adapters and forwards, which all threads share."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from torch import nn

from renyi_kd.sam.run import unwrapped


class _Turn:
    """Whose turn it is to observe with a model."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        # Of the thread that has the lock. To ask the lock itself is to take it, and those who ask would see each other.
        self.owner: int | None = None


# Of models inside their wrappers. Each its own: threads with a model each need not wait, and may wait for each other.
_turns: WeakKeyDictionary[nn.Module, _Turn] = WeakKeyDictionary()
# A process that is forked has a copy of what another thread held, and nobody who would let go of it.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_turns.clear)


@contextmanager
def observing(model: nn.Module) -> Iterator[None]:
    """Let no other thread observe with a model; the thread that does may do so again inside."""
    turn = _turns.setdefault(unwrapped(model), _Turn())
    with turn.lock:
        outer = turn.owner
        try:
            turn.owner = threading.get_ident()
            yield
        finally:
            turn.owner = outer


def observed_elsewhere(model: nn.Module) -> bool:
    """Return whether another thread observes with a model at this moment."""
    turn = _turns.get(unwrapped(model))
    return turn is not None and turn.owner not in (None, threading.get_ident())
