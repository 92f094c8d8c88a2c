"""The student's prompts in place of those that a teacher would make itself."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from renyi_kd.sam.inputs import Inputs


@contextmanager
def replaying_prompts(prompt_encoder: nn.Module | None, student: Inputs | None) -> Iterator[None]:
    """Hand a prompt encoder what reached the student's, call by call; masks stay those of its own model.

    Raises:
        ValueError: there is no prompt encoder, nothing is known of the student's, or its calls are other in number.

    """
    if prompt_encoder is None or student is None:
        raise ValueError(
            "tap: replay_prompts must have a prompt encoder of the teacher and the tap of a student, got "
            f"{'no prompt encoder' if prompt_encoder is None else 'no tap'}; run both by one function: tap(model, "
            "call=...)"
        )
    waiting = list(student.all_prompts)

    def replace(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if not waiting:
            raise ValueError(_unlike(len(student.all_prompts), "more"))
        names = list(inspect.signature(module.forward).parameters)
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        theirs = {name: value for name, value in waiting.pop(0).arguments.items() if "mask" not in name}
        return (), {**arguments, **{name: _detached(value) for name, value in theirs.items()}}

    handle = prompt_encoder.register_forward_pre_hook(replace, with_kwargs=True, prepend=True)
    try:
        yield
    finally:
        handle.remove()
    if waiting:
        raise ValueError(_unlike(len(student.all_prompts), f"{len(student.all_prompts) - len(waiting)}"))


def _unlike(n_calls: int, got: str) -> str:
    return (
        f"tap: replay_prompts must have as many calls of both prompt encoders, got {n_calls} of the student's and "
        f"{got} of the teacher's; run both by one function: tap(model, call=...)"
    )


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    return type(value)(map(_detached, value)) if type(value) in (tuple, list) else value
