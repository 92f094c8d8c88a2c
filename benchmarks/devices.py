"""Where a model runs and in which precision."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

Amp = Literal["off", "bf16", "fp16"]


def best_device() -> torch.device:
    """Return a GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def on_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Return the batch with its tensors on the device."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }


def autocast(device: torch.device, amp: Amp) -> torch.autocast:
    """Return the context in which a model runs in a precision."""
    dtype = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
    return torch.autocast(device.type, dtype, enabled=dtype is not None)
