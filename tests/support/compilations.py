"""What Triton would compile for steps of varying size; prints one JSON row per step that compiles something.

    python -m tests.support.compilations 2 3 4

The launches of real calls are recorded in place of being run.
"""

from __future__ import annotations

import argparse
import inspect
import json
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton.runtime import JITFunction

from renyi_kd.objective import Objective
from tests.support.ahead_of_time import call_loss

# What a launch says of its programs, beside the arguments of the kernel.
OPTIONS = ("num_warps", "num_stages")


def specialised(value: Any) -> Any:
    """Return what the compiled code may assume of an argument."""
    if isinstance(value, Tensor):
        return str(value.dtype), value.data_ptr() % 16 == 0
    if isinstance(value, int) and not isinstance(value, bool):
        return 1 if value == 1 else ("i32" if abs(value) < 2**31 else "i64", value % 16 == 0)
    return "fp32" if isinstance(value, float) else value


def recorder(found: dict[str, set[str]]) -> Callable[[Any, tuple[int, ...]], Callable[..., None]]:
    """Return what stands in for ``kernel[grid]`` and writes down what would be compiled, by the kernel's name."""

    def stand_in(kernel: Any, _grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **keywords: Any) -> None:
            options = {name: keywords.pop(name) for name in OPTIONS if name in keywords}
            values = inspect.signature(kernel.fn).bind(*args, **keywords).arguments
            key: dict[str, Any] = dict(options)
            for parameter in kernel.params:
                value = values[parameter.name]
                if parameter.is_constexpr:
                    key[parameter.name] = value
                elif parameter.do_not_specialize_on_alignment:
                    key[parameter.name] = value if value is None else str(value.dtype)
                elif not parameter.do_not_specialize:
                    key[parameter.name] = specialised(value)
            found.setdefault(kernel.__name__, set()).add(str(key))

        return launch

    return stand_in


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples", type=int, nargs="+")
    known: dict[str, set[str]] = {}
    for samples in parser.parse_args().samples:
        found: dict[str, set[str]] = {}
        with mock.patch.object(JITFunction, "__getitem__", recorder(found)):
            call_loss(samples, torch.float32, torch.contiguous_format, Objective())
        new = {name: sorted(keys - known.get(name, set())) for name, keys in found.items()}
        for name, keys in found.items():
            known.setdefault(name, set()).update(keys)
        if any(new.values()):
            print(json.dumps({"samples": samples, "compiled": {name: keys for name, keys in new.items() if keys}}))


if __name__ == "__main__":
    main()
