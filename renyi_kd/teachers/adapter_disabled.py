"""The student without its adapters as a teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import nn

from renyi_kd.sam.features import SAMFeatures
from renyi_kd.sam.memory import version
from renyi_kd.sam.tap import Tap
from renyi_kd.sam.threads import observing
from renyi_kd.teachers.adapters import adapter_model, adapters_off, base_parameters

# Ways of peft to initialise LoRA that subtract what the adapter begins with from the base weights.
_MOVES_WEIGHTS = ("pissa", "olora", "corda", "loftq", "lora_ga")


class AdapterDisabled:
    """The student with its adapters and saved modules switched off: a teacher that needs no second copy of the weights.

    Loss and gradients are those of a frozen copy of the pre-trained model, bit for bit. Everything that is trained must
    be something that can be switched off: adapters and ``modules_to_save`` of peft (0.20 or later). Which parameters
    require grad is as before after every run.

    Args:
        student: the tap of the model in training.
        disable: returns a context manager that switches off what is trained, all of it, which is then yours to see to;
            None for ``disable_adapter`` of the peft model inside.

    Raises:
        TypeError: ``student`` is not a tap.
        ValueError: no adapters of peft or transformers are found, and ``disable`` is not given. Or they began with a
            part of the pre-trained weights (PiSSA, OLoRA, ...): without them the model is another.

    Cost: the teacher's forward, and the switching: some walks over all modules; no memory for weights.

    """

    def __init__(self, student: Tap, *, disable: Callable[[], AbstractContextManager[Any]] | None = None) -> None:
        if not isinstance(student, Tap):
            raise TypeError(
                f"AdapterDisabled: student must be a tap, got {type(student).__name__}; attach first: tap(model)"
            )
        self.student = student
        self._disable = disable
        if disable is None:
            _refuse_moved_weights(_adapter_model(student.model))
            self._base_versions = _versions(student.model)

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy's weights are written as they are made: it begins anew.
        return _adapter_disabled_again, (self.student, self._disable)

    def observe(self, step: Any) -> SAMFeatures:
        """Return the features of a step, or a batch, without adapters; what the student's tap has collected stays.

        Raises:
            RuntimeError: another thread trains the model at that moment.
            ValueError: the running statistics of a BatchNorm are trained; or, of a peft model, a parameter outside the
                adapters is, or adapters are merged or switched off already.

        """
        model = self.student.model
        _refuse_running_statistics(model)
        with observing(model), self.student.set_aside(), _same_requires_grad(model):
            if self._disable is not None:
                with self._disable():
                    return self.student.observe(step)
            _refuse_adapters_that_are_off(model)
            holder = _adapter_model(model)
            _refuse_moved_weights(holder)
            self._refuse_changed_base(model)
            with adapters_off(holder):
                trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
                if trained:
                    raise ValueError(
                        "AdapterDisabled: what is trained must be switched off with the adapters, got parameters that "
                        f"stay on: {', '.join(trained[:3])}{' ...' if len(trained) > 3 else ''}; put their modules "
                        "into peft's modules_to_save, or take a copy as teacher: tap(copy.deepcopy(model))"
                    )
                return self.student.observe(step)

    def _refuse_changed_base(self, model: nn.Module) -> None:
        for name, parameter in base_parameters(model).items():
            if self._base_versions.get(id(parameter), 0) != version(parameter):
                raise ValueError(
                    "AdapterDisabled: the weights outside the adapters must stay as they were when it was made, got "
                    f"{name} written to since; put what is trained into peft's modules_to_save, take a copy as "
                    "teacher, or make AdapterDisabled after the checkpoint is loaded"
                )


def _adapter_disabled_again(student: Tap, disable: Callable[[], AbstractContextManager[Any]] | None) -> AdapterDisabled:
    return AdapterDisabled(student, disable=disable)


def _versions(model: nn.Module) -> dict[int, int]:
    """Return how often each parameter of the base model was written to, by its identity."""
    return {id(parameter): version(parameter) for parameter in base_parameters(model).values()}


def _adapter_model(model: nn.Module) -> Any:
    found = adapter_model(model)
    if found is None:
        raise ValueError(
            f"AdapterDisabled: student must hold a peft model, got {type(model).__name__} without one; wrap it with "
            "peft.get_peft_model, call add_adapter() of transformers, pass disable=, or use a copy as teacher: "
            "tap(copy.deepcopy(model))"
        )
    return found


def _refuse_moved_weights(peft_model: Any) -> None:
    for name, config in peft_model.peft_config.items():
        start = getattr(config, "init_lora_weights", None)
        if isinstance(start, str) and start.lower().startswith(_MOVES_WEIGHTS):
            raise ValueError(
                f"AdapterDisabled: adapters must leave the pre-trained weights as they are, got init_lora_weights="
                f"{start!r} of adapter {name!r}, which moves a part of them into the adapter; take a copy as teacher, "
                "made before peft: tap(copy.deepcopy(model))"
            )


def _refuse_adapters_that_are_off(model: nn.Module) -> None:
    for name, module in model.named_modules():
        merged, off = getattr(module, "merged", False), getattr(module, "disable_adapters", False)
        if merged is True or off is True:
            raise ValueError(
                f"AdapterDisabled: adapters must be on and not merged, got {'merged' if merged is True else 'disabled'}"
                f" ones at {name!r}, which peft would not leave so; unmerge them, and switch them on or remove them"
            )


def _refuse_running_statistics(model: nn.Module) -> None:
    for name, module in model.named_modules():
        is_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        # Of what peft saves, the teacher does not use the copy, nor the student the original.
        one_sided = "modules_to_save" in name or "original_module" in name
        if is_norm and module.training and module.track_running_stats and not one_sided:
            raise ValueError(
                "AdapterDisabled: BatchNorm outside the adapters must be in eval mode, got train mode, in which its "
                f"running statistics follow the student, at {name!r}; call .eval() on it after train(), or take a copy "
                "as teacher"
            )


@contextmanager
def _same_requires_grad(model: nn.Module) -> Iterator[None]:
    """Put back which parameters require grad; peft switches all of its own on again."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, requires_grad in before:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)
