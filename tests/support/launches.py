"""What a step would launch on a GPU, counted anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime import JITFunction
from triton.runtime.interpreter import InterpretedFunction

from renyi_kd.ops import launches as launch_plans
from renyi_kd.ops import plan

# They allocate and fill nothing, say how memory is laid out, or compute with dtypes alone.
_WITHOUT_LAUNCH = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
    *("set_", "promote_types"),
}


@contextmanager
def launches() -> Iterator[list[str]]:
    """Note the kernels that are launched, of Triton's and of PyTorch's operations, inside operators too.

    An operation of PyTorch counts as one launch, unless it makes a view or only allocates.
    """
    names: list[str] = []

    def launcher(original: Any) -> Any:
        def launch(self: Any, grid: Any) -> Any:
            def run(*args: Any, **kwargs: Any) -> None:
                names.append(self.__name__)
                # The interpreter computes with PyTorch too.
                with _disable_current_modes():
                    original(self, grid)(*args, **kwargs)

            return run

        return launch

    with ExitStack() as stack:
        for kind in (JITFunction, InterpretedFunction):
            stack.enter_context(mock.patch.object(kind, "__getitem__", launcher(kind.__getitem__)))
        # As for a profiler, plans launch through Triton.
        stack.enter_context(mock.patch.object(plan, "_is_observed", return_value=True))
        stack.enter_context(_Operations(names))
        yield names


class _Operations(TorchDispatchMode):
    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        schema = function._schema
        if schema.name.startswith("renyi_kd::"):
            # The dispatcher would run what is inside without this mode.
            with self:
                return OPDEFS[schema.name]._init_fn(*args, **(kwargs or {}))
        is_view = any(value.alias_info is not None and not value.alias_info.is_write for value in schema.returns)
        result = function(*args, **(kwargs or {}))
        # While a plan is made, nothing runs.
        is_planning = getattr(launch_plans._thread, "recorder", None) is not None
        if not (is_view or is_planning or schema.name.removeprefix("aten::") in _WITHOUT_LAUNCH):
            self.names.append(schema.name)
        return result
