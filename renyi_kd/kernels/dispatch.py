"""Which implementation of an operation runs."""

from __future__ import annotations

from typing import Literal, get_args

Impl = Literal["auto", "reference", "triton"]


def resolve(impl: Impl) -> Literal["reference"]:
    """Return the implementation that ``impl`` stands for; an explicit choice never falls back.

    Args:
        impl: ``"auto"`` (the fastest there is), ``"reference"`` or ``"triton"``.

    Raises:
        ValueError: ``impl`` is none of these.
        RuntimeError: ``impl`` is ``"triton"``: this version has no Triton kernels.

    """
    if impl not in get_args(Impl):
        raise ValueError(f"renyi_kd: impl must be one of {get_args(Impl)}, got {impl!r}; 'auto' is always right")
    if impl == "triton":
        raise RuntimeError(
            "renyi_kd: impl='triton' must have Triton kernels to run, got a version without them; "
            "use impl='auto' or impl='reference'"
        )
    return "reference"
