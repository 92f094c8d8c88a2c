"""Running a model ahead of the run that counts: nothing is kept for a backward, and the model stays as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from renyi_kd.sam.memory import leaves

_WITHOUT_GENERATOR = {"cpu", "meta"}


class RandomState(NamedTuple):
    """What PyTorch's random numbers follow from, on the CPU and on the devices of a run."""

    cpu: Tensor
    devices: tuple[tuple[torch.device, Tensor], ...]

    def restore(self) -> None:
        """Let the numbers be drawn that followed this state."""
        torch.set_rng_state(self.cpu)
        for device, state in self.devices:
            # MPS is a single device, which it takes no name of.
            where = () if device.type == "mps" else (device,)
            torch.get_device_module(device).set_rng_state(state, *where)


def random_state(model: nn.Module, batch: Any) -> RandomState:
    """Return the random state on the devices of a model and a batch; reading it waits for none of them."""
    values = [*model.parameters(), *model.buffers(), *(leaf for leaf in leaves(batch) if isinstance(leaf, Tensor))]
    devices = dict.fromkeys(value.device for value in values if value.device.type not in _WITHOUT_GENERATOR)
    states = []
    for device in devices:
        where = () if device.type == "mps" else (device,)
        states.append((device, torch.get_device_module(device).get_rng_state(*where)))
    return RandomState(torch.get_rng_state(), tuple(states))


@contextmanager
def rehearsing(model: nn.Module) -> Iterator[None]:
    """Let a model run as in training, with nothing saved for a backward, and put its buffers back in the end.

    Gradients are on, so that the model computes by the kernels and the branches of the run that counts, and so that
    passes of its own without gradient can be told apart. Under DDP processes exchange nothing.

    Cost: a copy of the model's buffers.
    """
    buffers = [
        (module._buffers, name, value, value.detach().clone())
        for module in model.modules()
        for name, value in module._buffers.items()
        if value is not None
    ]
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, DistributedDataParallel):
                # It would wait for a backward. And processes may have different numbers of such runs, so that their
                # buffers are exchanged when it counts.
                exchanges = module.require_forward_param_sync
                stack.callback(setattr, module, "require_forward_param_sync", exchanges)
                module.require_forward_param_sync = False
                stack.enter_context(module.no_sync())
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(_forget, _refuse))
        try:
            yield
        finally:
            for holder, name, value, numbers in buffers:
                holder[name] = value
                # All of them, as batch norm writes past their versions; and past their versions, as they are as before.
                value.data.copy_(numbers)


def _forget(_saved: Tensor) -> None:
    return None


def _refuse(_nothing: None) -> Tensor:
    raise RuntimeError(
        "Accumulation: the first pass must run without backward, got one inside the student's forward; what it needs "
        "was not kept: compute the loss on the whole batch, or leave the backward out of the forward"
    )
