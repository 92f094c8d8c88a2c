"""Which implementation of an operation runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Impl = Literal["auto", "reference", "triton"]

# The oldest on which every kernel was tested, and compiled for every GPU but Blackwell, for which 3.6 fails on one.
_OLDEST_TRITON, _OLDEST_TRITON_FOR_BLACKWELL = (3, 6), (3, 7)
_TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Implementation(NamedTuple):
    """What runs an operation, and why.

    Attributes:
        name: ``"reference"`` or ``"triton"``.
        reason: why Triton does not run it; empty where it does.

    """

    name: Literal["reference", "triton"]
    reason: str


def implementation(*tensors: Tensor, impl: Impl = "auto", limits: Sequence[str] = ()) -> Implementation:
    """Return which implementation runs operations on ``tensors`` under ``impl``.

    ``"auto"`` takes Triton for fp16, bf16 and fp32 tensors on a GPU that it supports (NVIDIA from compute capability
    8.0 on, AMD), the reference for everything else. An explicit choice never falls back.

    Args:
        tensors: what the operation gets; none to ask only whether ``impl`` is a choice at all.
        impl: ``"auto"``, ``"reference"`` or ``"triton"``.
        limits: what else an operation's kernels do not do, each as what was given; its own to say.

    Raises:
        ValueError: ``impl`` is none of these.
        RuntimeError: ``impl`` is ``"triton"``, and Triton is missing, broken or does not support the tensors.

    >>> implementation(torch.ones(2)).name
    'reference'

    """
    check_impl("implementation", impl)
    if impl == "reference":
        return Implementation("reference", "impl='reference' asks for it")
    if impl == "auto" and not (tensors and all(tensor.is_cuda for tensor in tensors)):
        # Before Triton is imported: on a CPU nobody waits for it.
        return Implementation("reference", "the tensors are not on a GPU")
    obstacle = _obstacle(tensors) or next(iter(limits), "")
    if not obstacle:
        return Implementation("triton", "")
    if impl == "triton":
        raise RuntimeError(
            f"renyi_kd: impl='triton' must have what Triton needs, got {obstacle}; "
            "use impl='auto', which takes the reference there"
        )
    return Implementation("reference", obstacle)


def check_impl(function: str, impl: Impl) -> None:
    """Raise ValueError unless there is such a choice; ``function`` begins the message."""
    if impl not in get_args(Impl):
        raise ValueError(f"{function}: impl must be one of {get_args(Impl)}, got {impl!r}; 'auto' is always right")


def resolve(impl: Impl, *tensors: Tensor, limits: Sequence[str] = ()) -> Literal["reference", "triton"]:
    """Return the name of what runs an operation on ``tensors``; raise as :func:`implementation`."""
    return implementation(*tensors, impl=impl, limits=limits).name


def _obstacle(tensors: tuple[Tensor, ...]) -> str:
    """Return what keeps Triton from running an operation on the tensors; empty if nothing does."""
    broken = _broken_triton()
    if broken:
        return broken
    for tensor in tensors:
        if tensor.dtype not in _TRITON_DTYPES:
            return f"{tensor.dtype} (the kernels take float16, bfloat16 and float32)"
        if tensor.is_cuda:
            unsupported = _unsupported(tensor.device.index)
            if unsupported:
                return unsupported
        elif not _interprets():
            return f"tensors on {tensor.device}"
    return ""


def _broken_triton() -> str:
    try:
        import triton.language
    # Whatever a Triton that does not fit the machine raises, auto has the reference to go on with.
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "triton":
            return "no Triton (torch's builds for GPUs bring it; for any other: pip install 'renyi-kd[triton]')"
        return f"a Triton that cannot be imported ({type(error).__name__}: {error})"
    return _older(triton.__version__, _OLDEST_TRITON)


def _older(version: str, oldest: tuple[int, int]) -> str:
    is_older = tuple(int(part) for part in version.split(".")[:2]) < oldest
    return f"Triton {version} (the kernels need {oldest[0]}.{oldest[1]} here)" if is_older else ""


def _unsupported(device: int) -> str:
    if torch.version.hip is not None:
        return ""
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"a GPU of compute capability {capability[0]}.{capability[1]}, below 8.0"
    import triton

    return _older(triton.__version__, _OLDEST_TRITON_FOR_BLACKWELL) if capability >= (10, 0) else ""


def _interprets() -> bool:
    """Return whether Triton's interpreter stands in for a GPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
