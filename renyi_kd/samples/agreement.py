"""What processes tell one another before they exchange samples, so that all go on or all stop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import distributed

from renyi_kd.samples.samples import Samples


class Header(NamedTuple):
    """What the processes tell one another of their samples.

    Attributes:
        n_images: of this process.
        n_samples: likewise.
        images: the image of each sample; None when sample i belongs to image i.
        kind: what must be the same in all processes, in words.

    """

    n_images: int
    n_samples: int
    images: Sequence[int] | None
    kind: str


def exchange_headers(function: str, own: Samples, *, group: distributed.ProcessGroup | None = None) -> list[Header]:
    """Return the headers of all processes of a group, which must be alike.

    Args:
        function: whose messages these are.
        own: samples of this process.
        group: of the processes; None for the default one.

    Raises:
        ValueError: in every process, if shapes, dtypes or gradient modes differ, or a process has called
            :func:`announce_refusal` instead.

    """
    headers = []
    for rank, header in enumerate(_exchange(_header(own), own.image_features.device, group)):
        if header is None:
            raise ValueError(
                f"{function}: every process must have features that fit under global_batch, got none of process "
                f"{rank}; see the error that it raised"
            )
        headers.append(header)
    for rank, header in enumerate(headers):
        if header.kind != headers[0].kind:
            raise ValueError(
                f"{function}: features must be of one kind in all processes under global_batch, got "
                f"{headers[0].kind} in process 0 and {header.kind} in process {rank}; use one image size, one "
                "token=, one autocast, one form of the distillation term, and gradients and sample_weight in all or "
                "in none"
            )
    return headers


def announce_refusal(device: torch.device, *, group: distributed.ProcessGroup | None = None) -> None:
    """Let the other processes' :func:`exchange_headers` raise: this one has no samples for it, and raises itself."""
    _exchange(None, device, group)


def _header(own: Samples) -> Header:
    maps, tokens = own.image_features, own.mask_tokens
    dtypes = ", ".join(str(value.dtype) for value in (maps, tokens, own.teacher_scores))
    gradient = "with" if torch.is_grad_enabled() else "without"
    form = "together" if not own.in_pairs else "one by one" if own.weight is None else "one by one with weights"
    return Header(
        len(maps),
        len(tokens),
        own.images,
        kind=f"maps {list(maps.shape[1:])}, {tokens.shape[1]} tokens, {dtypes}, compared {form}, {gradient} gradient",
    )


def _exchange(own: Header | None, device: torch.device, group: distributed.ProcessGroup | None) -> list[Header | None]:
    """Return what every process has sent; None is that of a process without samples."""
    headers: list[Header | None] = [None] * distributed.get_world_size(group)
    # NCCL takes the current device, which need not be that of the features.
    with torch.cuda.device(device if device.type == "cuda" else -1):
        distributed.all_gather_object(headers, own, group=group)
    return headers
