"""Which implementation of an operation runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Impl = Literal["auto", "reference", "triton"]
_IMPLS = get_args(Impl)

# The oldest on which every kernel was tested, and compiled for every GPU but Blackwell, for which 3.6 fails on one.
_OLDEST_TRITON, _OLDEST_TRITON_FOR_BLACKWELL = (3, 6), (3, 7)
# For the older one everything compiles and fits; not run.
_OLDEST_GPU, _OLDEST_GPU_BY_DEFAULT = (7, 5), (8, 0)
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
    8.0 on, AMD), the reference for everything else. An explicit choice never falls back. On capability 7.5, a T4's, the
    kernels compile and fit but have not run: ``"triton"`` takes them there, and ``"auto"`` does not.

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
    obstacle = _obstacle(tensors) or next(iter(limits), "") or ("" if impl == "triton" else _untried(tensors))
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
    if impl not in _IMPLS:
        raise ValueError(f"{function}: impl must be one of {_IMPLS}, got {impl!r}; 'auto' is always right")


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
    for device in {tensor.device for tensor in tensors}:
        if device.type == "cuda":
            unsupported = _unsupported(device)
            if unsupported:
                return unsupported
        elif not _interprets():
            return f"tensors on {device}"
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


def _unsupported(device: torch.device) -> str:
    if torch.version.hip is not None:
        return ""
    capability = _capability(device)
    if capability < _OLDEST_GPU:
        return f"a GPU of compute capability {capability[0]}.{capability[1]}, below 7.5"
    import triton

    return _older(triton.__version__, _OLDEST_TRITON_FOR_BLACKWELL) if capability >= (10, 0) else ""


def _capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of a GPU, which a step asks for many times."""
    # torch.compile traces no cache, and asks once anyway.
    if torch.compiler.is_compiling():
        return torch.cuda.get_device_capability(device)
    return _known_capability(device)


@lru_cache
def _known_capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _untried(tensors: tuple[Tensor, ...]) -> str:
    """Return why kernels that an explicit choice gets are nobody's default; empty if they are."""
    if torch.version.hip is not None:
        return ""
    for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
        major, minor = _capability(device)
        if (major, minor) < _OLDEST_GPU_BY_DEFAULT:
            return (
                f"a GPU of compute capability {major}.{minor}, for which the kernels compile (impl='triton' takes them)"
            )
    return ""


def _interprets() -> bool:
    """Return whether Triton's interpreter stands in for a GPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
