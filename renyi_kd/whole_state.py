"""State dicts that are loaded whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class LoadsWhole(nn.Module):
    """A module that an error in ``load_state_dict`` leaves as it was; PyTorch's own would keep what came before it.

    The one of a module that holds this one is PyTorch's, which calls that of none of its parts: it raises the same
    errors, and keeps what came before them.

    """

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state dict as ``torch.nn.Module`` does, whole or not at all.

        Raises:
            RuntimeError: it is not that of such a module, or of one of another size; nothing of it is loaded.
            TypeError: it is no mapping.

        Cost: a copy of parameters and buffers.

        """
        parts = [
            (part, {**vars(part), "_parameters": dict(part._parameters), "_buffers": dict(part._buffers)})
            for part in self.modules()
        ]
        values = [(value, value.detach().clone()) for value in (*self.parameters(), *self.buffers())]
        try:
            return super().load_state_dict(state_dict, strict, assign)
        except BaseException as error:
            for part, before in parts:
                vars(part).update(before)
            with torch.no_grad():
                for value, numbers in values:
                    value.copy_(numbers)
            if not isinstance(error, RuntimeError):
                raise
            name = type(self).__name__
            raise RuntimeError(
                f"{error}\n{name}: load_state_dict must be given the state of a module with the same arguments, got "
                f"the differences above, and has loaded nothing; make the {name} with those of the one that was saved"
            ) from error

    # Which a module that holds this one calls too.
    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        # With assign=True parameters and buffers become those of the state dict, whatever these are.
        if local_metadata.get("assign_to_params_buffers", False):
            errors: list[str] = args[-1]
            for name, value in (*self.named_parameters(), *self.named_buffers()):
                given = state_dict.get(f"{prefix}{name}")
                if not is_dense(value) or not isinstance(given, Tensor) or is_dense(given):
                    continue
                message = (
                    f"load_state_dict: {prefix}{name} must be a dense tensor of floating point with assign=True, got "
                    f"{given.dtype}, {given.layout}; load what was saved, or without assign=True, which converts it"
                )
                # Such a module within another has the same to say.
                if message not in errors:
                    errors.append(message)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


def is_dense(value: Tensor) -> bool:
    """Return whether a tensor is a dense one of floating point."""
    return value.is_floating_point() and value.layout == torch.strided


@contextmanager
def listed_errors(messages: list[str]) -> Iterator[None]:
    """Add the message of an error to those that ``load_state_dict`` raises together, with all that does not fit."""
    try:
        yield
    except ValueError as error:
        messages.append(str(error))
