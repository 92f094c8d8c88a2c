"""Triton's interpreter, quicker: it puts its own functions in the place of the language's once a launch.

By itself it does so again in every call of a function of a kernel, which takes half of the time of the kernels' tests.
"""

from __future__ import annotations

import inspect
import threading
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

_thread = threading.local()


class _Launch:
    """What a launch has put in place, until it takes it out."""

    def __init__(self, scope: Any) -> None:
        self.scope = scope

    def restore(self) -> None:
        _thread.patched = None
        self.scope.restore()


def patch_once_a_launch() -> None:
    """Have the interpreter patch each module of the language once a launch from now on."""
    original = interpreter._patch_lang
    if not hasattr(interpreter, "_LangPatchScope"):
        # An older one, which undoes nothing.
        return
    known: dict[int, set[str]] = {}

    def patch(function: Any) -> Any:
        seen = id(function.__globals__)
        if seen not in known:
            modules = filter(inspect.ismodule, function.__globals__.values())
            known[seen] = {module.__name__ for module in modules if module in (tl, tl.core)}
        patched: set[str] | None = getattr(_thread, "patched", None)
        if patched is None:
            _thread.patched = set(known[seen])
            return _Launch(original(function))
        if not known[seen] <= patched:
            patched |= known[seen]
            original(function)
        return None

    interpreter._patch_lang = patch
