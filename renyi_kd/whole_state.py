"""State dicts that are loaded whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class LoadsWhole(nn.Module):
    """A module that an error in ``load_state_dict`` leaves as it was; PyTorch's own would keep what came before it."""

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
        dense = {name for name, value in self._named_values() if _is_dense(value)}
        try:
            loaded = super().load_state_dict(state_dict, strict, assign)
            for name, value in self._named_values():
                # With assign=True they are those of the state dict, whatever these are.
                if name in dense and not _is_dense(value):
                    raise RuntimeError(
                        f"{name} must be a dense tensor of floating point, got {value.dtype}, {value.layout}"
                    )
            return loaded
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

    def _named_values(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.named_parameters()
        yield from self.named_buffers()


def _is_dense(value: Tensor) -> bool:
    return value.is_floating_point() and value.layout == torch.strided


@contextmanager
def listed_errors(messages: list[str]) -> Iterator[None]:
    """Add the message of an error to those that ``load_state_dict`` raises together, with all that does not fit."""
    try:
        yield
    except ValueError as error:
        messages.append(str(error))
