"""Triton's interpreter, quicker: by itself it spends most of the time of the kernels' tests on what it does again.

In every call of a function of a kernel it puts its own functions in the place of the language's, and for every number
it makes types and their names anew.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl
from triton.language import core, semantic
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


def make_types_when_needed() -> None:
    """Have the language ask for types and names when somebody reads them; of the version whose insides are known."""
    if not triton.__version__.startswith("3.9."):
        return
    _replace(interpreter, "_get_np_dtype", _numpy_dtype)
    _replace(core, "_unwrap_if_constexpr", _unwrapped)
    semantic._unwrap_if_constexpr = core._unwrap_if_constexpr
    _replace(semantic.TritonSemantic, "broadcast_impl_value", _broadcast)
    _replace(core.tuple, "__init__", _init_tuple)
    _make_late(core.tuple, "type", lambda self: core._type_for_tuple_values(self.values))
    core.block_type.__init__ = _init_block_type
    _make_late(core.block_type, "name", lambda self: f"<{self.shape}, {self.element_ty}>")


def _replace(owner: Any, name: str, function: Callable[..., Any]) -> None:
    """Put a function in the place of another, which it gets as its first argument."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def replaced(*arguments: Any, **named: Any) -> Any:
        return function(original, *arguments, **named)

    setattr(owner, name, replaced)


def _make_late(owner: type, name: str, function: Callable[[Any], Any]) -> None:
    attribute = functools.cached_property(function)
    attribute.__set_name__(owner, name)
    setattr(owner, name, attribute)


_numpy_dtypes: dict[str, Any] = {}


def _numpy_dtype(original: Any, dtype: Any) -> Any:
    scalar = dtype.scalar
    if scalar.is_ptr():
        return original(scalar)
    if scalar.name not in _numpy_dtypes:
        _numpy_dtypes[scalar.name] = original(scalar)
    return _numpy_dtypes[scalar.name]


_NOT_WRAPPED = {int, float, bool, str, type(None), core.tensor, core.dtype}


def _unwrapped(original: Any, value: Any) -> Any:
    kind = type(value)
    if kind is core.constexpr:
        return value.value
    return value if kind in _NOT_WRAPPED else original(value)


def _broadcast(original: Any, self: Any, lhs: Any, rhs: Any) -> Any:
    of_lhs, of_rhs = lhs.type, rhs.type
    if of_lhs.is_block() and of_rhs.is_block() and of_lhs.shape.values == of_rhs.shape.values:
        return lhs, rhs
    return original(self, lhs, rhs)


def _init_tuple(original: Any, self: Any, values: Any, type: Any = None) -> None:  # noqa: A002
    if type is None:
        self.values = list(values)
    else:
        original(self, values, type)


def _init_block_type(self: Any, element_ty: Any, shape: Any) -> None:
    self.element_ty = element_ty
    self.shape = core.tuple(core._unwrap_shape(shape))
    if not self.shape:
        raise TypeError("0d block_type is forbidden")
    self.numel = core.validate_block_shape(self.shape)
