"""Where an ``autograd.Function`` will do, and what a gradient by hand says to a request for its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

_PLAIN = (Tensor, nn.Parameter)


def refuse_second_derivative(operation: str, way_out: str) -> None:
    """Raise in the backward of an ``autograd.Function`` whose gradient itself has none.

    Grad mode is on there only under ``create_graph=True``. ``once_differentiable`` would not do: with a constant
    upstream gradient it detaches silently, and a gradient penalty becomes zero.

    Raises:
        NotImplementedError: gradients are on.

    """
    if torch.is_grad_enabled():
        second_derivative_refusal(operation, way_out)(None)


def second_derivative_refusal(operation: str, way_out: str) -> Callable[..., NoReturn]:
    """Return the formula of an operator that is a gradient: it raises NotImplementedError.

    As a formula it also refuses under a constant upstream gradient and, unlike a look at the grad mode, survives
    ``torch.compile``.
    """

    def refuse(ctx: Any, *grads: Any) -> NoReturn:
        raise NotImplementedError(
            f"{operation}: backward must run without create_graph=True, got a request for a second derivative; "
            f"{way_out}"
        )

    return refuse


def is_traced(*tensors: Tensor) -> bool:
    """Return whether somebody follows operations on the tensors, and must find operators that say what they are.

    That is torch.compile and export, functorch, whatever sees every operation (fake tensors, counters), and tensors
    that are not plain memory.
    """
    if torch.compiler.is_compiling():
        return True
    # PyTorch asks itself the same before it runs an autograd function.
    if torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack():
        return True
    for tensor in tensors:
        if type(tensor) not in _PLAIN and type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
            return True
    return False
