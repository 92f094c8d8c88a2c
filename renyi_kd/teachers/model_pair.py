"""Whether two models can be teacher and student."""

from __future__ import annotations

import re
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from renyi_kd.sam.memory import storage_of
from renyi_kd.sam.module_paths import plain

_ADAPTER = re.compile(r"(^|[._])(lora|adapter|adaptor)", re.IGNORECASE)


class ModelPair:
    """Watches that what is trained in the student is nothing of the teacher's.

    Modules and memory that are not trained may be shared. It is looked at in every step: weights can come to be shared,
    or trained, later.

    Cost: a walk over the parameters of both models on the host.

    """

    def __init__(self) -> None:
        self._known: tuple[weakref.ref[nn.Module], weakref.ref[nn.Module]] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # What was seen stays with the models of this program.
        return ModelPair, ()

    def check(self, teacher: nn.Module, student: nn.Module) -> None:
        """Raise where the teacher would move with the student.

        Raises:
            ValueError: it would.

        Warns:
            UserWarning: adapters that are trained in the student are part of the teacher too, and not neutral there.

        """
        trained = {storage_of(value) for value in _trained(student)} - {None}
        name = next((name for name, value in _values(teacher) if storage_of(value) in trained), None)
        if name is not None or teacher is student:
            raise ValueError(
                "InfoSAMLoss: teacher and student must be models of their own, got models that share "
                f"{'all modules' if name is None else f'the memory of {name}, which is trained'}; copy the teacher "
                "before PEFT changes the model in place: teacher = tap(copy.deepcopy(model)), or use "
                "AdapterDisabled(student)"
            )
        if self._known is None or self._known[0]() is not teacher or self._known[1]() is not student:
            self._known = weakref.ref(teacher), weakref.ref(student)
            _warn_of_adapters(teacher, student)


def _values(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters and buffers by name, in one walk; those that several modules share more than once."""
    for name, module in model.named_modules():
        for values in (module._parameters, module._buffers):
            yield from ((f"{name}.{own}".strip("."), value) for own, value in values.items() if value is not None)


def _trained(student: nn.Module) -> list[Tensor]:
    """Return what changes as the student is trained: parameters, and running statistics."""
    trained: list[Tensor] = []
    for module in student.modules():
        trained += [value for value in module._parameters.values() if value is not None and value.requires_grad]
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training and module.track_running_stats:
            trained += module.buffers(recurse=False)
    return trained


def _warn_of_adapters(teacher: nn.Module, student: nn.Module) -> None:
    trained = {plain(name) for name, parameter in student.named_parameters() if parameter.requires_grad}
    for name, parameter in teacher.named_parameters():
        if _ADAPTER.search(name) is None or plain(name) not in trained or _is_neutral(name, parameter):
            continue
        warnings.warn(
            "InfoSAMLoss: the teacher must be the pre-trained model, got one with adapters that are trained in the "
            f"student, such as {name}; copy the model before they are added, switch them off "
            "(AdapterDisabled(student, disable=...)), or leave it so if the teacher was trained with its own",
            stacklevel=5,
        )
        return


def _is_neutral(name: str, parameter: Tensor) -> bool:
    """Return whether a part of LoRA changes nothing: B is zero as it begins, and A alone does nothing."""
    if "lora" not in name.lower():
        return False
    return not any(part in name for part in ("lora_B", "lora_E", "lora_embedding_B")) or not parameter.any()
