"""The samples of all processes, so that the loss of a batch which they share is that of the whole batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from renyi_kd.samples.samples import Samples, images_of_parts


def n_processes() -> int:
    """Return how many processes train together: 1 where no process group was set up."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def gather_samples(function: str, own: Samples) -> Samples:
    """Return the samples of all processes in the order of their ranks, bit for bit the same in each.

    Each process gets the gradient of its own scores, times the number of processes. So where all of them compute one
    loss of all samples, and then average the gradients of their parameters as DDP and FSDP do, the average is the
    gradient of that loss.

    Args:
        function: whose messages these are.
        own: of this process. Numbers of images and samples may differ between processes.

    Raises:
        ValueError: in every process, if shapes, dtypes or gradient modes differ, or a process has called
            :func:`announce_refusal` instead.

    Cost: one exchange of sizes and image indices, then one each for maps, tokens and scores. The first is PyTorch's
    exchange of objects: two small messages, for which the host waits. Where NCCL is the only backend it waits until the
    device has done what is queued, and then for a few short copies per process; with one for the CPU
    ("cpu:gloo,cuda:nccl") it waits for the other processes alone. Extra memory: the teacher's maps of all processes,
    twice where their numbers differ.

    """
    headers = _gather_headers(function, _header(own), own.image_features.device)
    n_images = [header.n_images for header in headers]
    n_samples = [header.n_samples for header in headers]
    # Both relations in one exchange.
    scores: Tensor = _DifferentiableGather.apply(  # type: ignore[no-untyped-call]
        torch.stack([own.teacher_scores, own.student_scores], 1), n_samples
    )
    teacher_scores, student_scores = scores.unbind(1)
    return Samples(
        _gather(own.image_features, n_images),
        images_of_parts([header.images for header in headers], n_images),
        _gather(own.mask_tokens, n_samples),
        teacher_scores,
        student_scores,
        None if own.weight is None else _gather(own.weight, n_samples),
        own.in_pairs,
    )


def announce_refusal(device: torch.device) -> None:
    """Let the other processes' :func:`gather_samples` raise: this one has no samples for it, and raises itself."""
    _exchange(None, device)


class _Header(NamedTuple):
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


def _header(own: Samples) -> _Header:
    maps, tokens = own.image_features, own.mask_tokens
    dtypes = ", ".join(str(value.dtype) for value in (maps, tokens, own.teacher_scores))
    gradient = "with" if torch.is_grad_enabled() else "without"
    form = "together" if not own.in_pairs else "one by one" if own.weight is None else "one by one with weights"
    return _Header(
        len(maps),
        len(tokens),
        own.images,
        kind=f"maps {list(maps.shape[1:])}, {tokens.shape[1]} tokens, {dtypes}, compared {form}, {gradient} gradient",
    )


def _gather_headers(function: str, own: _Header, device: torch.device) -> list[_Header]:
    """Return the headers of all processes, which must be alike."""
    headers = []
    for rank, header in enumerate(_exchange(own, device)):
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


def _exchange(own: _Header | None, device: torch.device) -> list[_Header | None]:
    """Return what every process has sent; None is that of a process without samples."""
    headers: list[_Header | None] = [None] * n_processes()
    # NCCL takes the current device, which need not be that of the features.
    with torch.cuda.device(device if device.type == "cuda" else -1):
        distributed.all_gather_object(headers, own)
    return headers


def _gather(own: Tensor, counts: Sequence[int]) -> Tensor:
    """Return the rows of all processes, of which each has its number; without gradient."""
    most = max(counts)
    # Every process must send as much, laid out alike.
    sent = own.contiguous()
    if len(own) < most:
        sent = own.new_zeros(most, *own.shape[1:])
        sent[: len(own)] = own
    received = own.new_empty(len(counts), *sent.shape)
    distributed.all_gather(list(received), sent)
    if min(counts) == most:
        return received.flatten(0, 1)
    return torch.cat([rows[:n] for rows, n in zip(received, counts, strict=True)])


class _DifferentiableGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, counts: Sequence[int]) -> Tensor:
        first = sum(counts[: distributed.get_rank()])
        ctx.own, ctx.n_processes = slice(first, first + len(own)), len(counts)
        return _gather(own, counts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.n_processes * grad[ctx.own], None
