"""Whether a step of training will fit, asked before the first: a machine out of memory kills, and does not say why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn

# Over what is kept for the backward: gradients on their way, and what operators need while they run.
MARGIN = 1.3
# A gradient and Adam's two moments for every trained number.
TRAINED_COPIES = 3


def check_fits(model: nn.Module, loss_of_one: Callable[[], Tensor], batch_size: int, device: torch.device) -> None:
    """Raise unless a step of ``batch_size`` images will fit, judged by the forward of one.

    Args:
        model: of which the trained parameters count.
        loss_of_one: runs the forward of one image.
        batch_size: images per step.
        device: on which it will run.

    Raises:
        MemoryError: it will not.

    """
    free = free_bytes(device)
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    needed = MARGIN * batch_size * kept_bytes(loss_of_one, model) + TRAINED_COPIES * trained
    if needed > free:
        raise MemoryError(
            f"a step of {batch_size} images must fit in memory, got {free / 2**30:.1f} GiB free on {device} and "
            f"{needed / 2**30:.1f} needed, by the forward of one image; lower --batch-size or --image-size"
        )


def kept_bytes(forward: Callable[[], Tensor], model: nn.Module) -> int:
    """Return the bytes that a forward keeps for its backward, without those of the model's own weights."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def note(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
        result = forward()
    del result
    return sum(kept.values())


def free_bytes(device: torch.device) -> int:
    """Return the free memory of a device, within the limit of this process's control group."""
    if device.type == "cuda":
        # What PyTorch keeps of the run before is free as well.
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    limit, used = (_number(group / name) for name in ("memory.max", "memory.current"))
    return free if limit is None or used is None else min(free, max(0, limit - used))


def _number(path: Path) -> int | None:
    """Return the number in a file; None if there is none, or the word for no limit."""
    text = path.read_text().strip() if path.is_file() else ""
    return int(text) if text.isdigit() else None
