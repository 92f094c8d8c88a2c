"""The samples of all processes, so that the loss of a batch which they share is that of the whole batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn

from renyi_kd.samples.agreement import exchange_headers
from renyi_kd.samples.samples import Samples, images_of_parts


def n_processes() -> int:
    """Return how many processes train together: 1 where no process group was set up."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def gather_samples(function: str, own: Samples, settings: Mapping[str, object], relation: nn.Module) -> Samples:
    """Return the samples of all processes in the order of their ranks, bit for bit the same in each.

    Each process gets the gradient of its own scores, times the number of processes. So where all of them compute one
    loss of all samples, and then average the gradients of their parameters as DDP and FSDP do, the average is the
    gradient of that loss.

    Args:
        function: whose messages these are.
        own: of this process. Numbers of images and samples may differ between processes.
        settings: what must be the same in all processes beside the kind of the samples, by name.
        relation: the module whose weights must be the same, see :func:`exchange_headers`.

    Raises:
        ValueError: in every process, if shapes, dtypes, gradient modes, settings or weights differ, or a process has
            raised before.

    Cost: one exchange of sizes and image indices, then one each for maps, tokens and scores. The first is PyTorch's
    exchange of objects: two small messages, for which the host waits. Where NCCL is the only backend it waits until the
    device has done what is queued, and then for a few short copies per process; with one for the CPU
    ("cpu:gloo,cuda:nccl") it waits for the other processes alone. Extra memory: the teacher's maps of all processes,
    twice where their numbers differ.

    """
    headers = exchange_headers(function, own, settings, relation)
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
